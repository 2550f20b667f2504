"""Pack images into a shard set that is either whole or not there."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fastclr.config import ConfigError
from fastclr.files import sha256_of, write_durably, write_json
from pipelines.decode import DamagedImage, check_image
from pipelines.index import dali_index, packed_members
from pipelines.order import permutation
from pipelines.shards import FORMAT, MANIFEST, VERSION, Sample, ShardSet

_MAX_NAMED = 10  # damaged files named in an error


@dataclass(frozen=True)
class SourceImage:
    """One image to be packed.

    Attributes:
        name: Path relative to the source.
        class_name: First folder of it; None for a source without class folders.
        file: File that holds the bytes.
        offset: Place of the first byte in it.
        num_bytes: Length in bytes; -1 for all.
    """

    name: str
    class_name: str | None
    file: Path
    offset: int = 0
    num_bytes: int = -1

    def read(self) -> bytes:
        """Return the encoded image."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.num_bytes)


def list_source(source: Path) -> list[SourceImage]:
    """List the images of a folder of class folders, a flat folder, or a plain tar of one of these.

    Files whose name begins with a dot are left out; every other file has to be an image.

    Raises:
        ConfigError: If the source is missing, mixes both layouts, has no image or an empty class.
    """
    if source.is_dir():
        files = [p for p in source.rglob("*") if p.is_file()]
        images = [_source_image(p.relative_to(source).as_posix(), p) for p in files]
        classes = {p.name for p in source.iterdir() if p.is_dir() and p.name[0] != "."}
    elif source.is_file():
        images = list(_list_tar(source))
        classes = set()
    else:
        raise ConfigError(
            f"source {source} does not exist: give a folder of class folders, a folder of images, "
            "or a plain tar of one of these."
        )
    images = [i for i in images if not any(p.startswith(".") for p in i.name.split("/"))]
    images.sort(key=lambda image: image.name)  # a folder and its tar give the same order
    _check_classes(source, images, classes)
    return images


def _source_image(name: str, file: Path, offset: int = 0, num_bytes: int = -1) -> SourceImage:
    """Take the first folder of a name as its class."""
    parts = name.split("/")
    return SourceImage(name, parts[0] if len(parts) > 1 else None, file, offset, num_bytes)


def _list_tar(source: Path) -> Iterator[SourceImage]:
    """List a tar's files without extracting any."""
    try:
        with tarfile.open(source, "r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise ConfigError(
                        f"{source} has a member {member.name!r} that leaves its folder: this is "
                        "no tar of class/name.ext; do not trust it."
                    )
                if member.issym() or member.islnk():
                    raise ConfigError(
                        f"{source} has a link {member.name!r} instead of the file: write the tar "
                        "with `tar --dereference --hard-dereference`."
                    )
                if member.isfile():
                    yield _source_image(str(path), source, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ConfigError(
            f"{source} is no plain tar ({error}): give a folder or an uncompressed tar; "
            "decompress a .tar.gz first."
        ) from error


def _check_classes(source: Path, images: list[SourceImage], folders: set[str]) -> None:
    """Refuse what would give labels nobody meant."""
    if not images:
        raise ConfigError(f"source {source} has no files: there is nothing to pack.")
    classes = {image.class_name for image in images}
    if None in classes and len(classes) > 1:
        loose = next(image.name for image in images if image.class_name is None)
        raise ConfigError(
            f"source {source} has class folders and files beside them ({loose}): its label is "
            "unknown. Move it into a class folder or out of the source."
        )
    if empty := sorted(folders - {c for c in classes if c}):
        raise ConfigError(
            f"class folder {source / empty[0]} is empty: a class without images would shift "
            "every score. Remove the folder or add images."
        )


def write_shards(
    source: Path,
    out: Path,
    *,
    samples_per_shard: int = 4096,
    seed: int = 0,
    num_threads: int = 0,
    on_start: Callable[[int], None] = lambda _: None,
    on_image: Callable[[], None] = lambda: None,
) -> ShardSet:
    """Pack a source into a shard set, in an order shuffled by ``seed``.

    Every image is decoded once as a check; the bytes are packed as they are. The same source and
    seed give the same bytes. Nothing appears under ``out`` before everything is written.

    Args:
        source: See :func:`list_source`.
        out: Folder to make, e.g. ``data/train``; its name becomes the shards' prefix.
        samples_per_shard: Images in one tar.
        seed: Seed of the order.
        num_threads: Threads that read and check; 0 for one a core.
        on_start: Called with the number of images.
        on_image: Called after each image.

    Returns:
        The finished shard set, opened.

    Raises:
        ConfigError: If the source or target is unusable, or any file is no image; all are counted,
            the first ones named.
    """
    if samples_per_shard < 1:
        raise ConfigError(f"samples_per_shard is {samples_per_shard}: give 1 or more.")
    with atomic_folder(out) as folder:
        images = list_source(source)
        on_start(len(images))
        class_names = sorted({image.class_name for image in images if image.class_name})
        shuffled = [images[i] for i in permutation(len(images), seed, epoch=0)]
        rejected: list[str] = []
        shards = []
        with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
            for number, first in enumerate(range(0, len(shuffled), samples_per_shard)):
                part = shuffled[first : first + samples_per_shard]
                checked = _check_all(part, pool, rejected, on_image)
                shard = _Shard(folder, f"{out.name}-{number:06d}", first, class_names)
                shards.append(shard.write(checked))
        _refuse_rejected(rejected, len(images))
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "num_samples": len(images),
            "class_names": class_names,
            "seed": seed,
            "source": source.name,
            "num_rejected": 0,
            "num_duplicates": 0,
            "shards": shards,
        }
        write_json(folder / MANIFEST, manifest)
    return ShardSet.open(out)


Checked = tuple[SourceImage, bytes, tuple[str, int, int]]


def _check_all(
    images: Sequence[SourceImage],
    pool: ThreadPoolExecutor,
    rejected: list[str],
    on_image: Callable[[], None],
) -> Iterator[Checked]:
    """Read and check images in order, a few hundred in memory at a time."""

    def check(image: SourceImage) -> Checked | str:
        try:
            data = image.read()
            return image, data, check_image(data)
        except (OSError, DamagedImage) as error:
            return f"{image.name} {error}"

    for first in range(0, len(images), 256):
        for result in pool.map(check, images[first : first + 256]):
            on_image()
            if isinstance(result, str):
                rejected.append(result)
            else:
                yield result


def _refuse_rejected(rejected: list[str], num_images: int) -> None:
    """Raise if any file was no image."""
    if rejected:
        more = f"\n  ... and {len(rejected) - _MAX_NAMED} more" * (len(rejected) > _MAX_NAMED)
        raise ConfigError(
            f"{len(rejected)} of {num_images} files cannot be used, so nothing was written:\n  "
            + "\n  ".join(rejected[:_MAX_NAMED])
            + more
            + "\nRemove or repair them and run again."
        )


@dataclass(frozen=True)
class _Shard:
    """One tar and its index in the making."""

    folder: Path
    name: str
    first_number: int
    class_names: list[str]

    def write(self, images: Iterator[Checked]) -> dict[str, str | int]:
        """Write tar and index; return their entry for the manifest."""
        samples: list[Sample] = []
        file = self.folder / f"{self.name}.tar"
        with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
            for image, data, (extension, height, width) in images:
                key = f"{self.first_number + len(samples):09d}"
                label = self.class_names.index(image.class_name) if image.class_name else None
                offset = _add(tar, f"{key}.{extension}", data)
                if label is not None:
                    _add(tar, f"{key}.cls", str(label).encode())
                samples.append(
                    Sample(key, extension, offset, len(data), height, width, label, image.name)
                )
        index = self.folder / f"{self.name}.index.jsonl"
        write_durably(index, "".join(sample.line() for sample in samples))
        dali = self.folder / f"{self.name}.idx"
        write_durably(dali, dali_index(packed_members(sample) for sample in samples))
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        return {
            "file": file.name,
            "index": index.name,
            "dali_index": dali.name,
            "num_samples": len(samples),
            "num_bytes": file.stat().st_size,
            "sha256": sha256_of(file),
            "index_sha256": sha256_of(index),
            "dali_index_sha256": sha256_of(dali),
        }


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a member with a fixed header; return the place of its first byte."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    header_at = tar.offset  # pyright: ignore[reportAttributeAccessIssue]
    tar.addfile(member, io.BytesIO(data))
    return header_at + tarfile.BLOCKSIZE


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes ``out`` if the block ends well, and vanishes if not.

    Raises:
        ConfigError: If ``out`` exists and is not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"target {out} exists and is not empty: nothing is ever overwritten. Remove it or "
            "choose another --out."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)
        folder.replace(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
