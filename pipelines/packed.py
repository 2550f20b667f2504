"""The files of a packed shard set: its manifest, and its tars and indexes in a folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastclr.files import sha256_of
from fastclr.world import World
from pipelines.comparing import Comparison
from pipelines.errors import ShardError
from pipelines.index import Index, parse_index
from pipelines.order import Int64

FORMAT = "fastclr-shards"
VERSION = 2
MANIFEST = "manifest.json"

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard.

    Attributes:
        file: Name of the tar.
        index: Name of its index, JSON lines.
        dali_index: Name of DALI's index.
        num_samples: Samples in it.
        num_bytes: Length of the tar in bytes.
        sha256: Of the tar.
        index_sha256: Of the index.
        dali_index_sha256: Of DALI's index.
    """

    file: str
    index: str
    dali_index: str
    num_samples: int
    num_bytes: int
    sha256: str
    index_sha256: str
    dali_index_sha256: str

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> ShardEntry:
        """Check an entry's fields; raise KeyError, TypeError or ValueError naming the wrong one."""
        values = {name: fields[name] for name in cls.__dataclass_fields__}
        for name, value in values.items():
            if name.startswith("num_"):
                if type(value) is not int or value < 0:
                    raise TypeError(f"{name} of a shard is {value!r}")
            elif not isinstance(value, str):
                raise TypeError(f"{name} of a shard is {value!r}")
            elif name.endswith("sha256") and not _SHA256.fullmatch(value):
                raise ValueError(f"{name} of a shard is {value!r}")
        return cls(**values)

    @property
    def names(self) -> tuple[str, str, str]:
        """Names of its three files."""
        return self.file, self.index, self.dali_index


@dataclass(frozen=True)
class Manifest:
    """What a reader needs of a manifest.

    Attributes:
        class_names: Names of the labels; empty without labels.
        shards: Its shards.
        fields: Everything in it.
        digest: sha256 of the file, which holds the sha256 of everything else.
    """

    class_names: list[str]
    shards: list[ShardEntry]
    fields: dict[str, Any]
    digest: str

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names)

    @property
    def samples_of_shards(self) -> Int64:
        """Samples in each shard, int64 (S,)."""
        return np.array([shard.num_samples for shard in self.shards], np.int64)


def parse_manifest(raw: bytes, place: str) -> Manifest:
    """Parse a manifest and check its own fields.

    Args:
        raw: The file.
        place: Where it is, for errors.

    Raises:
        ShardError: If it is damaged, of another version, contradicts itself, or names files outside
            its folder.
    """
    try:
        fields = json.loads(raw)
        kind = (fields["format"], fields["version"])
        if kind != (FORMAT, VERSION):
            raise ShardError(
                f"{place} is {kind[0]} version {kind[1]}, this fastclr reads {FORMAT} "
                f"version {VERSION}: pack again with this version."
            )
        shards = [ShardEntry.parse(shard) for shard in fields["shards"]]
        num_samples, class_names = fields["num_samples"], fields["class_names"]
        if type(num_samples) is not int:
            raise TypeError("num_samples is no integer")
        if not all(isinstance(name, str) for name in class_names):
            raise TypeError("class_names are no strings")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(f"{place} is damaged ({error!r}): pack again.") from error
    names = [name for shard in shards for name in shard.names]
    for name in names:
        if Path(name).name != name or name in ("", ".."):
            raise ShardError(f"{place} names {name!r}: only its own folder's files.")
    if len(set(names)) != len(names):
        raise ShardError(f"{place} names a file twice; pack again.")
    found = sum(shard.num_samples for shard in shards)
    if found != num_samples or found == 0:
        raise ShardError(
            f"{place}: the shards hold {found} samples, the manifest says {num_samples} "
            "(and 0 is not a data set); pack again."
        )
    return Manifest(list(class_names), shards, fields, hashlib.sha256(raw).hexdigest())


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder.

    Raises:
        ShardError: If there is none, or see :func:`parse_manifest`.
    """
    try:
        raw = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise no_shard_set(str(folder), str(error.strerror)) from error
    return parse_manifest(raw, str(folder / MANIFEST))


def no_shard_set(place: str, why: str) -> ShardError:
    """Make the error for a place without a manifest."""
    return ShardError(
        f"{place} is no shard set: {MANIFEST} cannot be read ({why}). It is written last, so "
        "packing was never finished here, or the path is wrong; run `fastclr shards SOURCE --out "
        "DIR`."
    )


def check_index(raw: bytes, shard: ShardEntry, num_classes: int, place: str) -> Index:
    """Compare an index with its hash in the manifest, and parse it.

    Raises:
        ShardError: If it is not the index of its manifest, or does not fit its tar.
    """
    if hashlib.sha256(raw).hexdigest() != shard.index_sha256:
        raise ShardError(
            f"{place} does not have the sha256 of its manifest; mend it with "
            "`fastclr check DIR --repair-index`, or pack again."
        )
    try:
        index = parse_index(raw, tar_bytes=shard.num_bytes, num_classes=num_classes)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ShardError(f"{place} is damaged ({error}): pack again.") from error
    if len(index) != shard.num_samples:
        raise ShardError(
            f"{place} does not fit {shard.file}: it lists {len(index)} samples, the manifest says "
            f"{shard.num_samples}; pack again."
        )
    if len(set(index.keys)) != len(index):
        raise ShardError(f"{place}: a key appears twice; pack again.")
    return index


class LocalShards:
    """A packed set in a folder; see :class:`~pipelines.shards.Storage`."""

    has_hashes = True

    def __init__(self, folder: Path) -> None:
        self.path: Path | str = folder
        self.manifest = read_manifest(folder)
        self.digest, self.class_names = self.manifest.digest, self.manifest.class_names
        self.samples_of_shards = self.manifest.samples_of_shards
        self._folder, self._shards = folder, self.manifest.shards
        self._comparison = Comparison(self.verify)
        for shard in self._shards:
            if problem := presence_problem(folder, shard):
                raise ShardError(problem)

    def file(self, number: int) -> str:
        """Name a tar for an error."""
        return str(self._folder / self._shards[number].file)

    def open(self, number: int) -> int:
        """Open a tar; return its file descriptor, which the caller closes."""
        return os.open(self._folder / self._shards[number].file, os.O_RDONLY | os.O_CLOEXEC)

    def index(self, number: int) -> Index:
        """Read a shard's index."""
        shard = self._shards[number]
        file = self._folder / shard.index
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise ShardError(
                f"{file} is missing or damaged ({error}): restore it, or pack again."
            ) from error
        return check_index(raw, shard, len(self.class_names), str(file))

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Do nothing: the files are here."""

    def compare(self, numbers: Sequence[int], tolerant: bool) -> None:
        """Begin to compare this rank's part of some tars with the manifest, in a thread."""
        world = World.detect()  # the ranks of a machine read the same tars
        mine = [n for n in numbers if n % world.num_local_ranks == world.local_rank]
        self._comparison.begin(mine, tolerant)

    def check(self) -> None:
        """Raise ShardError if a tar was found to differ from its manifest."""
        self._comparison.check()

    def verify(self, number: int) -> int:
        """Compare a tar's sha256 with the manifest; return its length in bytes."""
        shard, file = self._shards[number], self._folder / self._shards[number].file
        try:
            found = sha256_of(file)
        except OSError as error:
            raise ShardError(f"{file} cannot be read: {error}.") from error
        if found != shard.sha256:
            raise ShardError(sha256_problem(file, found, shard))
        return shard.num_bytes


def presence_problem(folder: Path, shard: ShardEntry) -> str:
    """Say which file of a shard is missing, or that its tar has another length; "" if all is well.

    DALI's index is not among them: a copy without it is read as well.
    """
    try:
        tar = folder / shard.file
        actual = tar.stat().st_size if tar.is_file() else None
        has_index = (folder / shard.index).is_file()
    except (OSError, ValueError):  # no name the file system could hold
        actual, has_index = None, False
    if actual != shard.num_bytes:
        return (
            f"{folder / shard.file} has {actual} bytes, its manifest says {shard.num_bytes}: it is "
            "missing or cut; restore it or pack again."
        )
    if not has_index:
        return (
            f"{folder / shard.index} is missing or damaged: mend it with `fastclr "
            f"check {folder} --repair-index`, or pack again."
        )
    return ""


def sha256_problem(file: Path, found: str, shard: ShardEntry) -> str:
    """Say that a tar has changed."""
    return (
        f"{file} has sha256 {found}, its manifest says {shard.sha256}: its bytes "
        "changed after packing; restore it or pack again."
    )
