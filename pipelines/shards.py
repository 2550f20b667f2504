"""A shard set: images in WebDataset tars, read by place; nothing is kept but what is in use."""

from __future__ import annotations

import operator
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from fastclr.config import ConfigError
from pipelines.decode import SMALL, SMALL_BYTES, DamagedImage, Pixels, decode
from pipelines.errors import ShardError, StorageError
from pipelines.index import BLOCK, Index, Kept, Sample, header_problem
from pipelines.order import WINDOW, BlockOrder, Int64
from pipelines.packed import FORMAT, MANIFEST, VERSION, LocalShards

if TYPE_CHECKING:
    from pipelines.remote import Patience

__all__ = [
    "FORMAT",
    "MANIFEST",
    "VERSION",
    "DamagedSample",
    "Sample",
    "ShardError",
    "ShardSet",
    "Storage",
]

CACHE_BYTES = 64 * 2**30
MOST_SAMPLES = 2**18  # of the indexes in memory; 250 bytes each
MOST_FILES = 64  # tars open at the same time


class DamagedSample(ShardError):
    """A sample whose bytes were read and are no good image: what ``data.on_damage`` is about.

    Args:
        place: Shard and key.
        reason: What is wrong, a predicate.
    """

    def __init__(self, place: str, reason: object) -> None:
        self.reason = str(reason)
        super().__init__(
            f"{place} {reason}. It was whole when it was packed: check the shard against its "
            "sha256, restore it or pack again."
        )


class Storage(Protocol):
    """Where a set's shards and indexes come from; its methods are called from any thread.

    Attributes:
        path: Folder, pattern or URL, without secrets.
        digest: Changes when any sample does.
        class_names: Names of the labels; empty without labels.
        samples_of_shards: int64 (S,), samples in each shard.
        has_hashes: Whether :meth:`verify` has something to compare with.
    """

    has_hashes: bool
    path: Path | str
    digest: str
    class_names: list[str]
    samples_of_shards: Int64

    def file(self, number: int) -> str:
        """Name a tar for an error."""
        ...

    def open(self, number: int) -> int:
        """Open a tar; return its file descriptor, which the caller closes."""
        ...

    def index(self, number: int) -> Index:
        """Read a shard's index."""
        ...

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Begin to fetch shards that will be needed."""
        ...

    def compare(self, numbers: Sequence[int], tolerant: bool) -> None:
        """Begin to compare tars with the manifest where that was not done before they were here."""
        ...

    def check(self) -> None:
        """Raise ShardError if such a comparison found a difference."""
        ...

    def verify(self, number: int) -> int:
        """Compare a tar's sha256 with the manifest; return its length in bytes."""
        ...


class ShardSet:
    """A shard set; `shard_set[i]` is image i, from any thread.

    A shard's index is read and checked at the first use of the shard. Its tar's length is compared
    with the manifest when the set is opened; its sha256 before a remote copy is used, and beside
    the reading where the tar is local (:meth:`compare`). In memory are the indexes last used, for
    :data:`MOST_SAMPLES` samples or two windows of the order, whichever is more.

    Args:
        storage: Tars and indexes by number; :meth:`open` finds it.

    Attributes:
        path: Its folder, pattern, or URL without secrets.
        class_names: Names of the labels; empty without labels.
        digest: sha256 of the manifest, which holds the sha256 of everything else.
        has_hashes: Whether a manifest states each tar's sha256.
    """

    def __init__(self, storage: Storage) -> None:
        self.path, self.digest = storage.path, storage.digest
        self.class_names, self.has_hashes = storage.class_names, storage.has_hashes
        self._storage = storage
        self._counts = storage.samples_of_shards
        self._ends = np.cumsum(self._counts)
        self._firsts = self._ends - self._counts
        self._bounds: list[int] = self._ends.tolist()  # a list is searched faster for one sample
        most = max(MOST_SAMPLES, 2 * WINDOW * int(self._counts.max()))
        self._indexes: Kept[Index] = Kept(storage.index, most, len)
        self._files: Kept[_Descriptor] = Kept(lambda n: _Descriptor(storage.open(n)), MOST_FILES)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        cache_dir: str | Path | None = None,
        cache_bytes: int = CACHE_BYTES,
        label_field: str | None = None,
        max_damaged: float = 0.01,
        patience: Patience | None = None,
    ) -> ShardSet:
        """Open a set from its manifest alone, or shards that have none.

        Args:
            path: Folder made by ``fastclr shards``, here or behind a URL of any fsspec file
                system; or tars made by others: a folder of them, one, a glob pattern, or names with
                ``{000000..000099}``, here or behind a URL. These are indexed when they are first
                opened, for which those behind a URL are fetched.
            cache_dir: Folder for copies of remote shards, and for indexes of others' tars whose own
                folder is read-only; None for ``fastclr`` in the user's cache folder.
            cache_bytes: Bound of the copies of remote shards.
            label_field: Field of a sample's ``.json`` that is its label, in tars made by others;
                without it a ``.cls`` is the label.
            max_damaged: Share of samples in tars made by others that may be unusable: they are left
                out with a warning.
            patience: Time-outs of remote storage, :class:`pipelines.remote.Patience`.

        Raises:
            ShardError: If there is no shard set, or anything contradicts its manifest.
            StorageError: If a remote manifest cannot be fetched, an OSError.
            ConfigError: If a URL is refused, or the cache folder cannot be used.
        """
        text = str(path)
        if text.startswith("pipe:"):
            raise ConfigError(f"{text} is a command: fastclr runs none. Give a folder or a URL.")
        cache = Path(cache_dir) if cache_dir else user_cache()
        if "://" in text:
            from pipelines import (
                remote,
                remote_foreign,
                remote_shards,
            )  # not needed for what is here

            patience = patience or remote.Patience()
            if remote_foreign.is_remote_foreign(text):
                return cls(
                    remote_foreign.RemoteForeignShards(
                        text, cache, cache_bytes, label_field, max_damaged, patience
                    )
                )
            return cls(remote_shards.RemoteShards(text, cache, cache_bytes, patience))
        from pipelines import foreign  # not needed for our own

        if foreign.is_foreign(text):
            return cls(foreign.ForeignShards(text, cache, label_field, max_damaged))
        return cls(LocalShards(Path(path)))

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self._counts)

    @cached_property
    def label_N(self) -> Int64:  # noqa: N802
        """int64 labels of all samples, -1 where there is none; reads every index."""
        return np.concatenate([index.label_N for index in self._all_indexes()])

    @cached_property
    def size_N2(self) -> npt.NDArray[np.int32]:  # noqa: N802
        """int32 heights and widths of all samples in pixels; reads every index."""
        return np.concatenate([index.size_N2 for index in self._all_indexes()])

    def sizes(self, sample_ids: Int64) -> npt.NDArray[np.int32]:
        """Return heights and widths in pixels, int32 (n, 2)."""
        out = np.empty((len(sample_ids), 2), np.int32)
        for _, index, at, rows in self._by_shard(sample_ids):
            out[at] = index.size_N2[rows]
        return out

    def labels(self, sample_ids: Int64) -> Int64:
        """Return labels, int64 (n,); -1 where there is none.

        Raises:
            ShardError: If a tar was found to differ from its manifest, see :meth:`compare`.
        """
        self._storage.check()
        out = np.empty(len(sample_ids), np.int64)
        for _, index, at, rows in self._by_shard(sample_ids):
            out[at] = index.label_N[rows]
        return out

    def order(self, seed: int) -> BlockOrder:
        """Return which sample stands where in each epoch."""
        return BlockOrder(self._counts, seed=seed)

    def prefetch(self, shards: Sequence[int], tolerant: bool = False) -> None:
        """Begin to fetch shards that will be needed, or to compare them where they are local."""
        self._storage.prefetch(shards)
        self._storage.compare(shards, tolerant)

    def compare(self, shards: Sequence[int], tolerant: bool = False) -> None:
        """Begin to compare local tars with the manifest, in a thread; each once.

        The ranks of a machine share them out. A difference is raised by what reads.

        Args:
            shards: Their numbers.
            tolerant: Warn of a difference instead: what then decodes is read as it is.
        """
        self._storage.compare(shards, tolerant)

    def read(self, sample_id: int) -> bytes:
        """Return the encoded image.

        It is read together with the tar header before it, which has to name it.

        Raises:
            ShardError: If the shard ends before it, or holds something else there.
            StorageError: If a remote shard cannot be fetched in time, an OSError.
        """
        self._storage.check()
        number, row = self._find(sample_id)
        return self._read(sample_id, number, self._indexes[number], row)

    def _read(self, sample_id: int, number: int, index: Index, row: int) -> bytes:
        """Do :meth:`read`, once the sample is found."""
        offset, num_bytes = int(index.offset_N[row]), int(index.num_bytes_N[row])
        try:
            data = self._files[number].read(offset - BLOCK, BLOCK + num_bytes)
        except StorageError:
            raise  # it says all there is: the data may well be whole
        except OSError as error:
            raise ShardError(f"{self.place(sample_id)} cannot be read: {error}.") from error
        if len(data) != BLOCK + num_bytes:
            raise ShardError(
                f"{self.place(sample_id)}: {max(0, len(data) - BLOCK)} of {num_bytes} bytes are "
                "there. The shard was cut after it was opened; restore it or pack again."
            )
        if problem := header_problem(data[:BLOCK], index.name(row), num_bytes):
            raise ShardError(
                f"{self.place(sample_id)}: {problem}. The tar is not as it was packed: restore it "
                "or pack again."
            )
        return data[BLOCK:]

    def __getitem__(self, sample_id: int) -> Pixels:
        """Return the decoded image, uint8 (H, W, 3) RGB.

        Raises:
            DamagedSample: If it does not decode, or has another size than the index says.
            ShardError: If it cannot be read.
        """
        number, row = self._find(sample_id)
        index = self._indexes[number]
        try:
            pixels = decode(self._read(sample_id, number, index, row))
        except DamagedImage as error:
            raise DamagedSample(self.place(sample_id), error) from error
        expected = tuple(index.size_N2[row].tolist())
        if pixels.shape[:2] != expected:
            raise DamagedSample(
                self.place(sample_id), f"is {pixels.shape[:2]} pixels, its index says {expected}"
            )
        return pixels

    def images(self, sample_ids: Int64) -> list[Pixels | None]:
        """Decode the small PNGs among some images at once, without the GIL.

        Returns:
            uint8 (H, W, 3) RGB, what `shard_set[i]` returns; None for each image that is no small
            PNG, or one with anything odd about it: `shard_set[i]` judges it.

        Raises:
            ShardError: If a shard's index is wrong.
            StorageError: If a remote shard cannot be fetched in time, an OSError.
        """
        out: list[Pixels | None] = [None] * len(sample_ids)
        files: list[_Descriptor] = []  # one a sample; held until all are read
        places: list[int] = []
        names: list[str] = []
        columns: list[tuple[Int64, Int64, npt.NDArray[np.int32]]] = []
        for number, index, at, rows in islice(self._by_shard(sample_ids), MOST_FILES):
            keep = _may_be_small_pngs(index, rows)
            at, rows = at[keep], rows[keep]
            if not len(rows):
                continue
            try:
                file = self._files[number]
            except StorageError:
                raise
            except OSError:
                continue  # said of the one image that is asked for
            files += [file] * len(rows)
            places += at.tolist()
            names += [index.name(row) for row in rows.tolist()]
            columns.append((index.offset_N[rows], index.num_bytes_N[rows], index.size_N2[rows]))
        if places:
            from pipelines.png_numba import read_small_pngs  # not needed for other images

            numbers = [file.fileno() for file in files]
            offset_N, num_bytes_N, size_N2 = map(np.concatenate, zip(*columns, strict=True))
            images = read_small_pngs(numbers, offset_N, num_bytes_N, names, size_N2)
            for place, image in zip(places, images, strict=True):
                out[place] = image
        return out

    def verify(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Read every tar and compare its sha256 with the manifest.

        Args:
            progress: Called with the bytes of each shard when it is done.

        Raises:
            ShardError: At the first shard that differs.
        """
        for number in range(self.num_shards):
            progress(self._storage.verify(number))

    def source_of(self, sample_id: int) -> str:
        """Return where a sample came from, relative to the packed source."""
        number, row = self._find(sample_id)
        return self._indexes[number].sources[row]

    def _find(self, sample_id: int) -> tuple[int, int]:
        """Return a sample's shard and its row there."""
        i = operator.index(sample_id)
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        number = bisect_right(self._bounds, i)
        return number, i - (self._bounds[number - 1] if number else 0)

    def _by_shard(self, sample_ids: Int64) -> Iterator[tuple[int, Index, Int64, Int64]]:
        """Yield, for each shard of some samples: it, its index, their places here, their rows."""
        ids = np.asarray(sample_ids, np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self):
            raise IndexError(f"samples {ids.min()} to {ids.max()} of {len(self)}")
        number_n = np.searchsorted(self._ends, ids, "right")
        for number in np.unique(number_n).tolist():
            at = np.flatnonzero(number_n == number)
            yield number, self._indexes[number], at, ids[at] - self._firsts[number]

    def _all_indexes(self) -> Iterator[Index]:
        return (self._indexes[number] for number in range(self.num_shards))

    def place(self, sample_id: int) -> str:
        """Name shard, key and source of a sample for an error."""
        number, row = self._find(sample_id)
        index = self._indexes[number]
        return f"{self._storage.file(number)}, key {index.keys[row]} (from {index.sources[row]})"


def _may_be_small_pngs(index: Index, rows: Int64) -> npt.NDArray[np.bool_]:
    """Tell which rows are PNGs, by their names, of few pixels and bytes."""
    are_pngs = [index.extensions[row].endswith("png") for row in rows.tolist()]
    few_pixels = index.size_N2[rows].astype(np.int64).prod(1) <= SMALL
    return few_pixels & (index.num_bytes_N[rows] <= SMALL_BYTES) & np.array(are_pngs)


class _Descriptor:
    """An open file, closed when the last thread that uses it lets go."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        """Return the descriptor's number, valid as long as this object."""
        return self._descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Return bytes from a place on, fewer only at the file's end."""
        data = os.pread(self._descriptor, num_bytes, offset)
        while len(data) < num_bytes:
            more = os.pread(self._descriptor, num_bytes - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data


def user_cache() -> Path:
    """Return the folder for what can be made again."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastclr"
