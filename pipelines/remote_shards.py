"""A packed shard set behind a URL: whole local copies of what is used, within a bound."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path

from pipelines.index import Index
from pipelines.packed import MANIFEST, check_index, no_shard_set, parse_manifest
from pipelines.remote import NoSuchObject, Patience, ShardCache, fetch, redacted

_MOST_BYTES = 2**30  # of a manifest, some 2.5 million shards


class RemoteShards:
    """A packed set behind a URL; see :class:`~pipelines.shards.Storage`.

    The manifest is fetched at each opening. Tars and indexes are read from copies, by their sha256.

    Args:
        url: Its folder; a query, e.g. a signature, is kept for every file.
        folder: Of the copies; any number of processes share it.
        cache_bytes: Bound of the copies, tars and indexes together.
        patience: Time-outs of the storage.

    Raises:
        ShardError: If the storage says that there is no manifest, or it is damaged.
        StorageError: If the manifest cannot be fetched in time.
    """

    has_hashes = True

    def __init__(self, url: str, folder: Path, cache_bytes: int, patience: Patience) -> None:
        self._url = url
        self.path: Path | str = redacted(url.rstrip("/"))
        place = self._place(MANIFEST)
        try:
            raw = fetch(place, _MOST_BYTES, patience=patience)
        except NoSuchObject as error:
            raise no_shard_set(str(self.path), "the storage has no such object") from error
        self.manifest = parse_manifest(raw, redacted(place))
        self.digest, self.class_names = self.manifest.digest, self.manifest.class_names
        self.samples_of_shards = self.manifest.samples_of_shards
        self._shards = self.manifest.shards
        self._cache = ShardCache(folder / "shards", cache_bytes, patience=patience)
        weakref.finalize(self, self._cache.close)  # its threads would read ahead for nobody

    def _place(self, name: str) -> str:
        base, mark, query = self._url.partition("?")
        return f"{base.rstrip('/')}/{name}{mark}{query}"

    def file(self, number: int) -> str:
        """Name a tar for an error."""
        return redacted(self._place(self._shards[number].file))

    def _tar(self, number: int) -> tuple[str, int, str]:
        shard = self._shards[number]
        return self._place(shard.file), shard.num_bytes, shard.sha256

    def _index(self, number: int) -> tuple[str, None, str]:
        shard = self._shards[number]
        return self._place(shard.index), None, shard.index_sha256

    def open(self, number: int) -> int:
        """Open the local copy of a tar; return its file descriptor, which the caller closes."""
        return self._cache.open(*self._tar(number))

    def index(self, number: int) -> Index:
        """Read a shard's index from its local copy."""
        url, num_bytes, sha256 = self._index(number)
        with os.fdopen(self._cache.open(url, num_bytes, sha256), "rb") as stream:
            raw = stream.read()
        return check_index(raw, self._shards[number], len(self.class_names), redacted(url))

    def compare(self, numbers: Sequence[int], tolerant: bool) -> None:
        """Do nothing: a copy is compared before it is there."""

    def check(self) -> None:
        """Return: what is read was compared before, or cannot be."""

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Begin to fetch shards, each index before its tar."""
        self._cache.prefetch([f(n) for n in numbers for f in (self._index, self._tar)])

    def verify(self, number: int) -> int:
        """Fetch a tar, which compares its sha256 with the manifest; return its length in bytes."""
        os.close(self.open(number))
        return self._shards[number].num_bytes
