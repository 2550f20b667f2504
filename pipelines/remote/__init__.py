"""Objects from http(s), S3, Google, Azure and other storage: whole, verified, within a deadline.

:func:`fetch` reads small objects into memory, :class:`ShardCache` keeps copies of large ones on the
node's disk. Credentials come from the environment, as the cloud's own library finds them
(for public buckets: ``FSSPEC_S3_ANON=true``); what is printed of a URL is :func:`redacted`.
"""

from __future__ import annotations

from pipelines.errors import ShardError
from pipelines.errors import StorageError as StorageError
from pipelines.remote.cache import ShardCache as ShardCache
from pipelines.remote.download import DEFAULT, download
from pipelines.remote.retries import NoSuchObject as NoSuchObject
from pipelines.remote.retries import Patience as Patience
from pipelines.remote.urls import PROTOCOLS as PROTOCOLS
from pipelines.remote.urls import redacted as redacted
from pipelines.remote.urls import redacted_urls as redacted_urls

__all__ = [
    "PROTOCOLS",
    "NoSuchObject",
    "Patience",
    "ShardCache",
    "StorageError",
    "fetch",
    "redacted",
    "redacted_urls",
]


def fetch(
    url: str,
    max_bytes: int = 64 << 20,
    *,
    num_bytes: int | None = None,
    sha256: str | None = None,
    patience: Patience = DEFAULT,
) -> bytes:
    """Return a small object whole.

    Args:
        url: What to read.
        max_bytes: Most bytes it may have.
        num_bytes: Length it must have, if that is known.
        sha256: Hash it must have, if that is known.
        patience: Time-outs.

    Raises:
        StorageError: If it cannot be read in time.
        NoSuchObject: If the storage says that it does not exist.
        ShardError: If it is larger, or not what length and hash say.
        ConfigError: If the URL is refused.
    """
    memory = _Memory(url, max_bytes)
    download(url, memory, num_bytes=num_bytes, sha256=sha256, patience=patience)
    return bytes(memory.data)


class _Memory:
    """The sink of a small object."""

    def __init__(self, url: str, max_bytes: int) -> None:
        self._url, self._max_bytes, self.data = url, max_bytes, bytearray()

    def begin(self, num_bytes: int | None) -> None:
        self.data.clear()
        self._check(num_bytes or 0)

    def write(self, block: bytes) -> None:
        self._check(len(self.data) + len(block))
        self.data += block

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise ShardError(
                f"{redacted(self._url)} has {num_bytes} bytes or more, at most {self._max_bytes} "
                "are read into memory: it is not what it should be."
            )
