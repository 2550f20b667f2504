"""Pack one shard of a plan: a pure function of the work folder and the shard's number."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from json.encoder import encode_basestring_ascii as quote
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fastclr.files import write_json
from pipelines import ustar
from pipelines.decode import DamagedImage, Pixels, check_and_decode
from pipelines.plan import Plan
from pipelines.sources import SourceImage
from pipelines.transform import Transform

SET = "set"  # folder that becomes the target
FACTS = "facts"  # a file a finished shard, with what the manifest needs

_FLUSH = 1 << 20  # bytes held back before a write


@dataclass(frozen=True)
class ShardFacts:
    """What the manifest needs of a finished shard.

    Attributes:
        entry: Its entry in the manifest; None if every image was rejected and no file written.
        rejected: Source and reason of each image left out.
        num_pixels: Pixels packed.
        pixel_sum: Sum of all red, green and blue values, 0 to 255.
        pixel_square_sum: Sum of their squares.
    """

    entry: dict[str, Any] | None
    rejected: list[tuple[str, str]]
    num_pixels: int
    pixel_sum: list[int]
    pixel_square_sum: list[int]


def facts_file(work: Path, number: int) -> Path:
    """Return where a shard's facts lie: it is there if the shard is finished."""
    return work / FACTS / f"{number:06d}.json"


def read_facts(work: Path, number: int) -> ShardFacts:
    """Read the facts of a finished shard."""
    return ShardFacts(**json.loads(facts_file(work, number).read_bytes()))


def pack_shard(work: str, number: int) -> int:
    """Read, check and transform the images of a shard; write tar, index, DALI's index, facts.

    Each file appears whole, the facts last. Two processes that pack the same shard write the same
    bytes and do not disturb each other.

    Returns:
        Images read.
    """
    folder = Path(work)
    plan = Plan.load(folder)
    count, first, _ = plan.shards[number]
    packer = _Packer(folder, f"{plan.settings['name']}-{number:06d}", plan.transform())
    labels = {name: label for label, name in enumerate(plan.class_names)}
    try:
        for place, (image, sha256) in enumerate(plan.entries(folder, number), first):
            label = None if image.class_name is None else labels[image.class_name]
            packer.add(f"{place:09d}", image, sha256, label)
        facts = packer.finish()
    finally:
        packer.remove()
    write_json(facts_file(folder, number), asdict(facts))
    return count


@dataclass
class _HashedFile:
    """A file in the making that knows its length and sha256."""

    path: Path
    size: int = 0
    _parts: list[bytes] = field(default_factory=list)
    _held: int = 0

    def __post_init__(self) -> None:
        self._stream: IO[bytes] = self.path.open("wb", buffering=0)
        self._hash = hashlib.sha256()

    def write(self, part: bytes) -> None:
        """Append; in pieces of a mebibyte."""
        self._parts.append(part)
        self.size += len(part)
        self._held += len(part)
        if self._held >= _FLUSH:
            self._flush()

    def finish(self, target: Path) -> str:
        """Put it on disk under its name; return its sha256."""
        self._flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self.path.replace(target)
        return self._hash.hexdigest()

    def remove(self) -> None:
        """Close and delete what was not finished."""
        self._stream.close()
        self.path.unlink(missing_ok=True)

    def _flush(self) -> None:
        block = memoryview(b"".join(self._parts))
        self._hash.update(block)
        while block:
            block = block[self._stream.write(block) :]
        self._parts, self._held = [], 0


class _PixelSums:
    """Exact sums over pixels, so that their order does not count."""

    _TAKE = 65536  # pixels at a time: squares of 256 rows of 256 pixels fit float32 exactly

    def __init__(self) -> None:
        self.num_pixels = 0
        self.sums = np.zeros((2, 3), np.int64)
        self._held: list[npt.NDArray[np.uint8]] = []
        self._num_held = 0

    def add(self, pixels: Pixels) -> None:
        """Take an image, uint8 (H, W, 3)."""
        flat = pixels.reshape(-1, 3)
        self._held.append(flat)
        self._num_held += len(flat)
        if self._num_held >= self._TAKE:
            self.close()

    def close(self) -> None:
        """Sum what is held."""
        for block in _blocks(self._held, self._TAKE):
            rows = np.zeros((-(-len(block) // 256), 768), np.float32)
            rows.reshape(-1)[: block.size] = block.reshape(-1)
            self.sums[0] += rows.sum(0).reshape(-1, 3).sum(0, dtype=np.float64).astype(np.int64)
            rows *= rows
            self.sums[1] += rows.sum(0).reshape(-1, 3).sum(0, dtype=np.float64).astype(np.int64)
        self.num_pixels += self._num_held
        self._held, self._num_held = [], 0


def _blocks(parts: list[npt.NDArray[np.uint8]], size: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Join small images and cut large ones."""
    if parts:
        joined = np.concatenate(parts) if len(parts) > 1 else parts[0]
        for at in range(0, len(joined), size):
            yield joined[at : at + size]


class _Packer:
    """One shard in the making."""

    def __init__(self, work: Path, name: str, transform: Transform | None) -> None:
        self._set, self._name, self._transform = work / SET, name, transform
        # The process's number keeps two that pack the same shard apart.
        begin = work / f".{name}.{os.uname().nodename}.{os.getpid()}"
        self._tar, self._index, self._dali, self._dali_lines = self._files = [
            _HashedFile(begin.with_name(begin.name + suffix))
            for suffix in (".tar", ".index.jsonl", ".idx", ".lines")
        ]
        self._count = 0
        self._rejected: list[tuple[str, str]] = []
        self._sums = _PixelSums()

    def add(self, key: str, image: SourceImage, sha256: str | None, label: int | None) -> None:
        """Pack an image or note why not."""
        try:
            data = image.read()
            if sha256 and hashlib.sha256(data).hexdigest() != sha256:
                raise DamagedImage("changed while it was packed")
            extension, pixels = check_and_decode(data)
            if self._transform:
                data = self._transform.apply(data, pixels)
                extension, pixels = check_and_decode(data)
        except (OSError, DamagedImage) as error:
            reason = isinstance(error, OSError) and error.strerror  # without the path
            self._rejected.append((image.name, reason or str(error)))
            return
        self._sums.add(pixels)
        self._write(key, extension, data, pixels.shape[:2], label, image.name)

    def _write(
        self,
        key: str,
        extension: str,
        data: bytes,
        size: tuple[int, ...],
        label: int | None,
        source: str,
    ) -> None:
        length, offset = len(data), self._tar.size + ustar.BLOCK
        image, text = f"{key}.{extension}", "null"
        line = f"{extension} {offset} {length} {image}\n"
        blocks = ustar.header(image.encode(), length) + data + ustar.padding(length)
        if label is not None:
            text = str(label)
            at = offset + len(blocks)  # the label's header ends a block after the image's did
            line = f"{line[:-1]} cls {at} {len(text)} {key}.cls\n"
            header = ustar.header(f"{key}.cls".encode(), len(text))
            blocks += header + text.encode() + ustar.padding(len(text))
        self._tar.write(blocks)
        self._dali_lines.write(line.encode())
        self._index.write(
            f'{{"key": "{key}", "extension": "{extension}", "offset": {offset}, '
            f'"num_bytes": {length}, "height": {size[0]}, "width": {size[1]}, '
            f'"label": {text}, "source": {quote(source)}}}\n'.encode()
        )
        self._count += 1

    def finish(self) -> ShardFacts:
        """Complete the files and put them in place."""
        self._sums.close()
        entry = self._finish_files() if self._count else None
        totals = self._sums.sums.tolist()
        return ShardFacts(entry, self._rejected, self._sums.num_pixels, *totals)

    def _finish_files(self) -> dict[str, Any]:
        self._tar.write(ustar.end(self._tar.size))
        # The number of samples comes first, and is known last.
        self._dali_lines.finish(lines := self._dali_lines.path.with_suffix(".body"))
        self._dali.write(f"v1.2 {self._count}\n".encode())
        with lines.open("rb") as stream:
            while block := stream.read(_FLUSH):
                self._dali.write(block)
        lines.unlink()
        names = [f"{self._name}{suffix}" for suffix in (".tar", ".index.jsonl", ".idx")]
        files = (self._tar, self._index, self._dali)
        hashes = [f.finish(self._set / name) for f, name in zip(files, names, strict=True)]
        return {
            "file": names[0],
            "index": names[1],
            "dali_index": names[2],
            "num_samples": self._count,
            "num_bytes": self._tar.size,
            "sha256": hashes[0],
            "index_sha256": hashes[1],
            "dali_index_sha256": hashes[2],
        }

    def remove(self) -> None:
        """Delete what was not finished."""
        for file in self._files:
            file.remove()
