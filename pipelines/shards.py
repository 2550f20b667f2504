"""A shard set: WebDataset tars, an index of every sample, and a manifest that is written last."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastclr.files import sha256_of
from pipelines.decode import MAX_PIXELS, DamagedImage, Pixels, decode
from pipelines.order import BlockOrder, Int64

FORMAT = "fastclr-shards"
VERSION = 2
MANIFEST = "manifest.json"
_SHARD_FIELDS = {
    "file": str,
    "index": str,
    "dali_index": str,
    "num_samples": int,
    "num_bytes": int,
    "sha256": str,
    "index_sha256": str,
    "dali_index_sha256": str,
}


class ShardError(RuntimeError):
    """Shards that are missing, damaged or not what the manifest says; names shard and key."""


@dataclass(frozen=True)
class Sample:
    """One row of a shard's index, a line of JSON.

    Attributes:
        key: WebDataset key; the tar holds ``key.extension`` and, with a label, ``key.cls``.
        extension: ``jpg``, ``png`` or ``webp``.
        offset: Place of the image's first byte in the tar.
        num_bytes: Length of the image in bytes.
        height: Height in pixels.
        width: Width in pixels.
        label: Class index, or None.
        source: Where the image came from, relative to the packed source.
    """

    key: str
    extension: str
    offset: int
    num_bytes: int
    height: int
    width: int
    label: int | None
    source: str


class ShardSet:
    """A validated shard set on local disk; `shard_set[i]` is image i, from any thread.

    Attributes:
        path: Its folder.
        class_names: Names of the labels; empty without labels.
        digest: sha256 of the manifest, which holds the sha256 of everything else.
        label_N: int64 labels, -1 where there is none.
        size_N2: int32 heights and widths in pixels.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], digest: str) -> None:
        self.path = path
        self.digest = digest
        self.class_names: list[str] = manifest["class_names"]
        self._manifest = manifest
        self._files = [path / shard["file"] for shard in manifest["shards"]]
        indexes = [_read_index(path, shard) for shard in manifest["shards"]]
        self._samples = [sample for index in indexes for sample in index]
        self._shard_N = np.repeat(np.arange(len(indexes)), [len(index) for index in indexes])
        labels = [-1 if s.label is None else s.label for s in self._samples]
        self.label_N: npt.NDArray[np.int64] = np.array(labels, np.int64)
        sizes = [(s.height, s.width) for s in self._samples]
        self.size_N2: npt.NDArray[np.int32] = np.array(sizes, np.int32).reshape(-1, 2)
        self._check_samples()

    @classmethod
    def open(cls, path: str | Path) -> ShardSet:
        """Open a folder made by ``tools/make_shards.py`` and check it against its manifest.

        Presence, sizes, indexes and their hashes are checked here; the hashes of the tars are in
        :meth:`verify`, which reads everything.

        Raises:
            ShardError: If there is no manifest, or anything contradicts it.
        """
        path = Path(path)
        try:
            raw = (path / MANIFEST).read_bytes()
        except OSError as error:
            raise ShardError(
                f"{path} is no shard set: {MANIFEST} cannot be read ({error.strerror}). It is "
                "written last, so packing was never finished here, or the path is wrong; run "
                "`python tools/make_shards.py SOURCE --out DIR`."
            ) from error
        return cls(path, _parse_manifest(raw, path), hashlib.sha256(raw).hexdigest())

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names)

    def sizes(self, sample_ids: Int64) -> npt.NDArray[np.int32]:
        """Return heights and widths in pixels, int32 (n, 2)."""
        return self.size_N2[sample_ids]

    def labels(self, sample_ids: Int64) -> Int64:
        """Return labels, int64 (n,); -1 where there is none."""
        return self.label_N[sample_ids]

    def order(self, seed: int) -> BlockOrder:
        """Return which sample stands where in each epoch."""
        sizes = [shard["num_samples"] for shard in self._manifest["shards"]]
        return BlockOrder(np.array(sizes, np.int64), seed=seed)

    def read(self, sample_id: int) -> bytes:
        """Return the encoded image.

        Raises:
            ShardError: If the shard ends before it.
        """
        sample, file = self._samples[sample_id], self._files[self._shard_N[sample_id]]
        try:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                data = os.pread(descriptor, sample.num_bytes, sample.offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ShardError(f"{self._place(sample_id)} cannot be read: {error}.") from error
        if len(data) != sample.num_bytes:
            raise ShardError(
                f"{self._place(sample_id)}: {len(data)} of {sample.num_bytes} bytes are there. The "
                "shard was cut after it was opened; restore it or pack again."
            )
        return data

    def __getitem__(self, sample_id: int) -> Pixels:
        """Return the decoded image, uint8 (H, W, 3) RGB.

        Raises:
            ShardError: If it cannot be read or decoded, or has another size than the index says.
        """
        try:
            pixels = decode(self.read(sample_id))
        except DamagedImage as error:
            raise ShardError(
                f"{self._place(sample_id)} {error}. It was whole when it was packed: check the "
                "shard against its sha256, restore it or pack again."
            ) from error
        expected = tuple(self.size_N2[sample_id].tolist())
        if pixels.shape[:2] != expected:
            raise ShardError(
                f"{self._place(sample_id)} is {pixels.shape[:2]} pixels, its index says "
                f"{expected}: the index belongs to another shard; pack again."
            )
        return pixels

    def verify(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Read every tar and compare its sha256 with the manifest.

        Args:
            progress: Called with the bytes of each shard when it is done.

        Raises:
            ShardError: At the first shard that differs.
        """
        for file, shard in zip(self._files, self._manifest["shards"], strict=True):
            try:
                found = sha256_of(file)
            except OSError as error:
                raise ShardError(f"{file} cannot be read: {error}.") from error
            if found != shard["sha256"]:
                raise ShardError(
                    f"{file} has sha256 {found}, its manifest says {shard['sha256']}: its bytes "
                    "changed after packing; restore it or pack again."
                )
            progress(shard["num_bytes"])

    def source_of(self, sample_id: int) -> str:
        """Return where a sample came from, relative to the packed source."""
        return self._samples[sample_id].source

    def _place(self, sample_id: int) -> str:
        """Name shard, key and source of a sample for an error."""
        sample, file = self._samples[sample_id], self._files[self._shard_N[sample_id]]
        return f"{file}, key {sample.key} (from {sample.source})"

    def _check_samples(self) -> None:
        """Check counts, keys and labels over all shards."""
        if len(self) != self._manifest["num_samples"] or len(self) == 0:
            raise ShardError(
                f"{self.path}: the indexes list {len(self)} samples, the manifest says "
                f"{self._manifest['num_samples']} (and 0 is not a data set); pack again."
            )
        if len({s.key for s in self._samples}) != len(self):
            raise ShardError(f"{self.path}: a key appears twice in the indexes; pack again.")
        if self.label_N.min() < -1 or self.label_N.max() >= self.num_classes:
            raise ShardError(
                f"{self.path}: labels run from {self.label_N.min()} to {self.label_N.max()}, "
                f"there are {self.num_classes} classes; pack again."
            )


def _parse_manifest(raw: bytes, path: Path) -> dict[str, Any]:
    """Parse and check the manifest's own fields, and each tar's presence and size."""
    try:
        manifest = json.loads(raw)
        kind = (manifest["format"], manifest["version"])
        if kind == (FORMAT, VERSION):
            _check_fields(manifest)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(f"{path / MANIFEST} is damaged ({error!r}): pack again.") from error
    if kind != (FORMAT, VERSION):
        raise ShardError(
            f"{path / MANIFEST} is {kind[0]} version {kind[1]}, this fastclr reads {FORMAT} "
            f"version {VERSION}: pack again with this version."
        )
    for shard in manifest["shards"]:
        file, num_bytes = shard["file"], shard["num_bytes"]
        for name in (file, shard["index"]):
            if Path(name).name != name or name == "..":
                raise ShardError(f"{path / MANIFEST} names {name!r}: only its own folder's files.")
        try:
            actual = (path / file).stat().st_size if (path / file).is_file() else None
        except OSError:  # no name the file system could hold
            actual = None
        if actual != num_bytes:
            raise ShardError(
                f"{path / file} has {actual} bytes, its manifest says {num_bytes}: it is "
                "missing or cut; restore it or pack again."
            )
    return manifest


def _check_fields(manifest: dict[str, Any]) -> None:
    """Raise KeyError or TypeError where a field is missing or of another type."""
    if not isinstance(manifest["num_samples"], int):
        raise TypeError("num_samples is no integer")
    if not all(isinstance(name, str) for name in manifest["class_names"]):
        raise TypeError("class_names are no strings")
    for shard in manifest["shards"]:
        for name, kind in _SHARD_FIELDS.items():
            if not isinstance(shard[name], kind):
                raise TypeError(f"{name} of a shard is {shard[name]!r}")


def _read_index(path: Path, shard: dict[str, Any]) -> list[Sample]:
    """Read one shard's index and check it against the manifest."""
    file = path / shard["index"]
    try:
        raw = file.read_bytes()
        if hashlib.sha256(raw).hexdigest() != shard["index_sha256"]:
            raise ShardError(f"{file} does not have the sha256 of its manifest; pack again.")
        samples = [Sample(**json.loads(line)) for line in raw.splitlines()]
        fits = all(_fits(sample, shard["num_bytes"]) for sample in samples)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ShardError(f"{file} is missing or damaged ({error}): pack again.") from error
    if len(samples) != shard["num_samples"] or not fits:
        raise ShardError(f"{file} does not fit {shard['file']}: pack again.")
    return samples


def _fits(sample: Sample, tar_bytes: int) -> bool:
    """Whether an index line has the types of a Sample and lies in its tar."""
    label = -1 if sample.label is None else sample.label
    numbers = (sample.offset, sample.num_bytes, sample.height, sample.width, label)
    return (
        all(isinstance(number, int) for number in numbers)
        and all(isinstance(text, str) for text in (sample.key, sample.source))
        and 0 <= sample.offset <= sample.offset + sample.num_bytes <= tar_bytes
        and min(sample.height, sample.width) > 0
        and sample.height * sample.width <= MAX_PIXELS
        and abs(label) < 2**31
    )
