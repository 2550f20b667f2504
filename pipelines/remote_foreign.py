"""Tars made by others behind URLs: each is read once, to index it, and then known by its sha256.

The index of a tar is in the cache folder, named by a hash of its whole URL: the query may be a
signature, but it may also say which tar. Copies made later are compared with the sha256 that the
indexed one had, so a tar that was changed is noticed, as if a manifest told its hash.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from fastclr.config import ConfigError
from fastclr.files import sha256_of_rest, write_shared
from pipelines.errors import ShardError
from pipelines.foreign import RANGE, expand, names_of_classes, report
from pipelines.foreign_index import (
    DAMAGED,
    FORMAT,
    LONGEST_HEAD,
    Indexed,
    index_tar,
    parse_lines,
)
from pipelines.index import Index
from pipelines.remote import Patience, ShardCache, redacted

log = logging.getLogger(__name__)

_AT_ONCE = 4  # downloads while a set is indexed


def is_remote_foreign(url: str) -> bool:
    """Whether a URL means tars without a manifest: it has a range of numbers, or is a tar."""
    return bool(RANGE.search(url)) or urlsplit(url).path.endswith(".tar")


class RemoteForeignShards:
    """Tars without a manifest behind URLs; see :class:`~pipelines.shards.Storage`.

    Args:
        url: Of a tar, or of several with ``{000000..000099}``; storage is not listed.
        folder: Of the copies and the indexes; any number of processes share it.
        cache_bytes: Bound of the copies.
        label_field: See :func:`~pipelines.tar_scan.scan`.
        max_damaged: Share of samples that may be left out.
        patience: Time-outs of the storage.

    Raises:
        ShardError: If a tar is none or has changed, more is damaged than allowed, or nothing is
            left.
        StorageError: If a tar that was not indexed yet cannot be fetched in time.
        ConfigError: If the URL has wildcards.
    """

    has_hashes = True

    def __init__(
        self,
        url: str,
        folder: Path,
        cache_bytes: int,
        label_field: str | None,
        max_damaged: float,
        patience: Patience,
    ) -> None:
        self.path: Path | str = redacted(url)
        if "*" in urlsplit(url).path:
            raise ConfigError(f"{self.path}: storage is not listed. Give a range: {{000..099}}.")
        self._label_field, self._indexes = label_field, folder / "foreign"
        self._indexes.mkdir(parents=True, exist_ok=True)
        self._cache = ShardCache(folder / "shards", cache_bytes, patience=patience)
        weakref.finalize(self, self._cache.close)  # its threads would read ahead for nobody
        urls = expand(url)
        found = self._describe_all(urls)
        report(str(self.path), found, max_damaged)
        used = [(tar, one) for tar, one in zip(urls, found, strict=True) if one.num_samples]
        self._tars = [(tar, one.num_bytes, one.known_by) for tar, one in used]
        self._indexed = [one for _, one in used]
        self.samples_of_shards = np.array([one.num_samples for one in self._indexed], np.int64)
        self.class_names = names_of_classes(found)
        facts = [(redacted(tar), one.known_by, one.sha256) for tar, one in used]
        self.digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _describe_all(self, urls: Sequence[str]) -> list[Indexed]:
        """Say what is in the tars; fetch and index those that were not yet."""
        known = [self._known(url) for url in urls]
        new = [url for url, one in zip(urls, known, strict=True) if one is None]
        if new:
            log.warning(
                "%d tars are fetched and indexed, once: the first is %s", len(new), redacted(new[0])
            )
        pool = ThreadPoolExecutor(_AT_ONCE)
        try:
            made = dict(zip(new, pool.map(self._make, new), strict=True))
        finally:
            pool.shutdown(cancel_futures=True)
        return [one or made[url] for url, one in zip(urls, known, strict=True)]

    def _place(self, url: str) -> Path:
        name = hashlib.sha256(f"{url}\n{self._label_field}".encode()).hexdigest()
        return self._indexes / f"{name}.fastclr-index"

    def _known(self, url: str) -> Indexed | None:
        """Say what is in a tar; None if it was not indexed yet. The lines stay unread."""
        try:
            with self._place(url).open("rb") as stream:
                indexed = Indexed.parse(stream.readline(LONGEST_HEAD))
        except DAMAGED:
            return None  # made again
        is_it = (indexed.format, indexed.label_field) == (FORMAT, self._label_field)
        return indexed if is_it else None

    def _make(self, url: str) -> Indexed:
        """Fetch a tar, index it, and keep the index; one process does, the others wait for it."""
        place = self._place(url)
        with place.with_suffix(".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if known := self._known(url):
                return known
            with os.fdopen(self._cache.open(url), "rb", buffering=0) as raw:
                sha256, num_bytes = sha256_of_rest(raw), os.fstat(raw.fileno()).st_size
                known_as = (num_bytes, 0, sha256)
                stream = io.BufferedReader(raw)
                indexed, lines = index_tar(stream, redacted(url), known_as, self._label_field)
            write_shared(place, indexed.line() + lines)
            self._cache.rename((url, None, None), (url, num_bytes, sha256))
        return indexed

    def file(self, number: int) -> str:
        """Name a tar for an error."""
        return redacted(self._tars[number][0])

    def open(self, number: int) -> int:
        """Open the local copy of a tar; return its file descriptor, which the caller closes.

        Raises:
            ShardError: If the tar has changed since it was indexed.
        """
        try:
            return self._cache.open(*self._tars[number])
        except ShardError as error:
            place = self._place(self._tars[number][0])
            raise ShardError(
                f"{error} It was indexed as {place}: remove that file if the new tar is meant."
            ) from error

    def index(self, number: int) -> Index:
        """Read a shard's index, or make it again where it has gone.

        Raises:
            ShardError: If the tar has changed since the set was opened.
        """
        (url, _, _), indexed = self._tars[number], self._indexed[number]
        for _ in range(2):
            try:
                _, _, lines = self._place(url).read_bytes().partition(b"\n")
                return parse_lines(indexed, lines)
            except DAMAGED:
                self._place(url).unlink(missing_ok=True)
                self._make(url)
        raise ShardError(f"{self.file(number)} changed while it was in use: start again.")

    def compare(self, numbers: Sequence[int], tolerant: bool) -> None:
        """Do nothing: a copy is compared before it is there."""

    def check(self) -> None:
        """Return: what is read was compared before."""

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Begin to fetch tars."""
        self._cache.prefetch([self._tars[number] for number in numbers])

    def verify(self, number: int) -> int:
        """Fetch a tar, which compares its sha256 with the indexed one; return its length."""
        os.close(self.open(number))
        return self._tars[number][1]
