"""Features on disk: taken once, by all ranks, and gone on with after a kill.

One folder for each layer of one state of the weights, on one set of images in one view:
``LAYER-DIGEST/`` with a file for each block of images while they are being taken, then
``features.npy`` and, last, ``manifest.json``, which says what they are of. The digest in the name
is that of the manifest's ``of``: other weights, data, view or number of images, another folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastclr import collectives
from fastclr.config import ConfigError
from fastclr.evaluation.features import Batches, Features, extract_layers
from fastclr.evaluation.layers import Layers
from fastclr.files import sync, write_json, write_shared

MANIFEST, ARRAY = "manifest.json", "features.npy"
BLOCK, BATCH = 4096, 256  # images of a block, and of a forward pass
_LABEL = "label"

Array = npt.NDArray[Any]
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Images:
    """Labelled images of which features are taken.

    Attributes:
        digest: Tells this data from other data.
        view: Tells how an image is seen, such as "centre 32"; what it says decides the pixels.
        num_images: Images X; the first X of the data.
        read: Given start and stop, uint8 images (n, 3, H, W) and int64 labels (n,) of that range.
        place: Names an image by its number, for errors.
    """

    digest: str
    view: str
    num_images: int
    read: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
    place: Callable[[int], str] = "image {}".format


def cached_features(
    folder: Path,
    layers: Layers,
    images: Images,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    *,
    progress: Progress = lambda _: None,
    block: int = BLOCK,
    batch: int = BATCH,
) -> dict[str, Features]:
    """Return the features of layers, from the disk or in one pass over the images.

    Every rank calls this with the same arguments; each takes every num_ranks-th block, and all
    return everything. Blocks and batches do not depend on the ranks, so neither do the features:
    with equal machines and numbers of torch's threads (which may order a sum) they are the same
    bits. What a killed call had finished is not done again, also on another number of ranks. One
    call at a time writes to a folder.

    Args:
        folder: Where they are kept; all ranks see it.
        layers: What is looked at.
        images: Of what.
        device: Where the layers are.
        progress: Told numbers of images that are done, of this rank's part; in all those of its
            blocks.
        block: Images of a block, the most that a kill loses.
        batch: Images of a forward pass.

    Returns:
        Features mapped into memory, read-only, in the order of ``layers.names``.

    Raises:
        ConfigError: If there are no images, or a folder holds what it does not say.
        FloatingPointError: If a feature is not finite; it names the first such image. On every
            rank, as whatever else stops one.
    """
    if images.num_images < 1:
        raise ConfigError("there are no images to take features of: name a set that has some.")
    whole = {"data": images.digest, "view": images.view, "num_images": images.num_images}
    split = {"block": block, "batch": batch}
    parts = {
        name: _Part(folder, {"layer": name, "weights": weights, **whole, **split})
        for name, weights in layers.digests().items()
    }
    parts[_LABEL] = _Part(folder, {"layer": _LABEL, "weights": "", **whole, **split})
    missing = {name: part for name, part in parts.items() if not part.is_whole()}
    if collectives.any_rank(bool(missing)):
        with collectives.together():
            _take(missing, layers, images, device, progress, block, batch)
        with collectives.together():
            if collectives.rank() == 0:
                for part in missing.values():
                    part.finish(_blocks(images.num_images, block))
    label_X = parts[_LABEL].open(images.num_images)
    return {name: Features(parts[name].open(images.num_images), label_X) for name in layers.names}


def _blocks(num_images: int, block: int) -> list[tuple[int, int]]:
    """Return start and stop of all blocks."""
    return [(k, min(k + block, num_images)) for k in range(0, num_images, block)]


def _take(
    missing: dict[str, _Part],
    layers: Layers,
    images: Images,
    device: torch.device,
    progress: Progress,
    block: int,
    batch: int,
) -> None:
    """Write this rank's blocks of what is missing."""
    for part in missing.values():
        part.folder.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in layers.names if name in missing] or layers.names[:1]
    for start, stop in _blocks(images.num_images, block)[
        collectives.rank() :: collectives.num_ranks()
    ]:
        gaps = [part for part in missing.values() if not part.has(start, stop)]
        if gaps:
            batches = _batches(images, start, stop, batch)
            found = extract_layers(layers.only(wanted), batches, device, start, images.place)
            label_N = next(iter(found.values())).label_X
            if len(label_N) != stop - start:
                raise ConfigError(
                    f"images {start} to {stop} came as {len(label_N)}: the data set does not hold "
                    "what it says. Check it with `fastclr check`."
                )
            for part in gaps:
                rows = label_N if part.layer == _LABEL else found[part.layer].h_XF
                part.write(start, stop, rows)
        progress(stop - start)


def _batches(images: Images, start: int, stop: int, batch: int) -> Batches:
    """Yield the images of a block."""
    for first in range(start, stop, batch):
        yield images.read(first, min(first + batch, stop))


class _Part:
    """One layer's folder.

    Args:
        parent: Where it lies.
        of: What its features are of; ``layer`` is its name.
    """

    def __init__(self, parent: Path, of: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
        self.layer, self.of = of["layer"], of
        self.folder = parent / f"{self.layer}-{digest[:20]}"

    def is_whole(self) -> bool:
        """Whether the manifest stands."""
        return (self.folder / MANIFEST).is_file()

    def has(self, start: int, stop: int) -> bool:
        """Whether a block stands, of as many rows as it should have."""
        try:
            return len(_mapped(self._block(start, stop))) == stop - start
        except (OSError, ValueError):
            return False

    def write(self, start: int, stop: int, rows: Array) -> None:
        """Write a block."""
        stream = io.BytesIO()
        np.save(stream, rows, allow_pickle=False)
        write_shared(self._block(start, stop), stream.getvalue())

    def finish(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Join the blocks to one array, write the manifest, and delete the blocks."""
        files = [self._block(*block) for block in blocks]
        first = _mapped(files[0])
        shape = (blocks[-1][1], *first.shape[1:])
        descriptor, name = tempfile.mkstemp(prefix=f".{ARRAY}.", dir=self.folder)
        os.close(descriptor)
        temporary = Path(name)
        try:
            joined = np.lib.format.open_memmap(name, "w+", first.dtype, shape)
            for (start, stop), file in zip(blocks, files, strict=True):
                joined[start:stop] = _mapped(file)
            joined.flush()
            temporary.chmod(0o644)
            sync(temporary)
            temporary.replace(self.folder / ARRAY)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(self.folder)
        facts = {"shape": list(shape), "dtype": str(first.dtype)}
        write_json(self.folder / MANIFEST, {"of": self.of, **facts})
        for file in files:
            file.unlink()

    def open(self, num_images: int) -> Array:
        """Map the array into memory.

        Raises:
            ConfigError: If the folder does not hold what it says.
        """
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            rows = _mapped(self.folder / ARRAY)
            found = {"of": self.of, "shape": list(rows.shape), "dtype": str(rows.dtype)}
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.folder} cannot be read ({error}): delete it, and the features are taken "
                "anew."
            ) from error
        if manifest != found or len(rows) != num_images:
            raise ConfigError(
                f"{self.folder} holds {found['dtype']} {found['shape']}, and its manifest says "
                f"{manifest}: delete it, and the features are taken anew."
            )
        return rows

    def _block(self, start: int, stop: int) -> Path:
        return self.folder / f"{start:09d}-{stop:09d}.npy"


def _mapped(file: Path) -> Array:
    """Map an array file into memory, read-only."""
    return np.load(file, mmap_mode="r", allow_pickle=False)
