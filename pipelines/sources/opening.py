"""Files behind URLs, for packing: fetched whole by :mod:`pipelines.remote`, listed by fsspec."""

from __future__ import annotations

import http.client
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from fastclr.config import ConfigError
from pipelines.errors import ShardError
from pipelines.remote import Patience, fetch
from pipelines.remote.download import download
from pipelines.remote.objects import file_system
from pipelines.remote.retries import Again, Final
from pipelines.remote.urls import protocol_of
from pipelines.remote.web import head

PATIENCE = Patience()
# Tables of URLs have many dead ones, each of which is waited for.
IMAGE_PATIENCE = Patience(connect_seconds=10, read_seconds=20, deadline_seconds=30)

_CREDENTIALS = re.compile(r"(?<=://)[^/@?#]*@|[?#].*", re.DOTALL)
_QUERY = re.compile(r"[?#].*", re.DOTALL)


def scheme_of(text: str) -> str:
    """Return the scheme of a URL in lower case; empty for a path.

    ``pipe:``, ``file:`` and ``data:`` count without slashes too: they are never names of files
    anybody meant.
    """
    scheme, colon, _ = text.partition("://")
    if not colon:
        scheme, colon, _ = text.partition(":")
        return scheme.lower() if colon and scheme.lower() in ("pipe", "file", "data") else ""
    return scheme.lower()


def shown(url: str) -> str:
    """Return a URL for messages: without user, password, query and fragment."""
    return _CREDENTIALS.sub("", url) if "://" in url else url


def check_url(url: str) -> None:
    """Refuse a source that is no plain URL of :data:`~pipelines.remote.urls.PROTOCOLS`.

    Raises:
        ConfigError: For ``pipe:``, chains (``zip::s3://``) and unknown schemes.
    """
    if "://" not in url or "::" in url.partition("?")[0]:
        raise ConfigError(f"source {shown(url)} is no plain URL: give SCHEME://PATH, not a chain.")
    protocol_of(url)


@contextmanager
def _as_os_error(url: str) -> Iterator[None]:
    """Turn whatever a file system raises into an OSError that shows no credentials."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # aiohttp, botocore, asyncio: each has its own
        status = getattr(error, "status", None) or getattr(error, "errno", None)
        what = type(error).__name__ + (f" {status}" if status else "")
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(f"{shown(url)} cannot be read ({what})") from None


class _Into:
    """The sink of a file."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def begin(self, num_bytes: int | None) -> None:
        self._stream.seek(0)
        self._stream.truncate()

    def write(self, block: bytes) -> None:
        self._stream.write(block)


def fetch_into(url: str, stream: BinaryIO) -> None:
    """Write the whole of a URL that the user gave into a file.

    Raises:
        OSError: If it does not come whole.
    """
    download(url, _Into(stream), patience=PATIENCE)


def read_start(place: str, most: int) -> bytes:
    """Read a small file, local or behind a URL, at most ``most`` bytes of a local one.

    Raises:
        FileNotFoundError: If it does not exist.
        OSError: If it cannot be read.
    """
    if "://" in place:
        return fetch(place, most, patience=PATIENCE)
    with Path(place).open("rb") as stream:
        return stream.read(most)


def read_url(url: str, offset: int, num_bytes: int, most: int) -> bytes:
    """Read a range of a URL that a listing or a table gave, all of it or an error.

    It is fetched whole.

    Args:
        url: URL.
        offset: First byte.
        num_bytes: Length; -1 for all that follows.
        most: Bytes beyond which it is refused.

    Raises:
        OSError: If it cannot be read, has another length or is too long.
    """
    try:
        data = fetch(url, most, patience=IMAGE_PATIENCE)
    except ShardError as error:
        raise OSError(f"{shown(url)} has more than {most} bytes, too many for an image") from error
    there = len(data) if not offset else min(num_bytes, len(data) - offset)
    if 0 <= num_bytes != there:
        raise OSError(f"{shown(url)}: {there} of {num_bytes} bytes came: it has changed")
    return data[offset:] if num_bytes < 0 else data[offset : offset + num_bytes]


def identity_of(url: str) -> str | None:
    """Return what changes when a remote file does, or None where its server does not say.

    Raises:
        OSError: If it is not there.
    """
    if scheme_of(url) in ("http", "https"):
        try:
            about: Any = head(url, PATIENCE.deadline(None), PATIENCE)
        except (OSError, Again, Final, http.client.HTTPException):
            return None  # fetching it will say what is wrong
        size, etag = about.get("content-length"), about.get("etag")
        changed = _settled(about.get("last-modified", ""))
    else:
        with _as_os_error(url):
            fs, path = file_system(url, PATIENCE)
            about = fs.info(path)
        size, etag = about.get("size"), about.get("ETag") or about.get("etag")
        changed = about.get("LastModified") or about.get("mtime") or about.get("created")
    if size is None or not (etag or changed):
        return None
    return f"{url} {size} {etag or changed}"


def _settled(last_modified: str) -> str | None:
    """Return an http date if it is a minute old: within its second a file can change again."""
    try:
        age = time.time() - parsedate_to_datetime(last_modified).timestamp()
    except (ValueError, TypeError):
        return None
    return last_modified if age > 60 else None


def list_url(url: str) -> Iterator[tuple[str, str, int]]:
    """Yield name, URL and size in bytes of the files below a remote folder, in the order of names.

    Raises:
        ConfigError: For http, which has no listings, or if there is no such folder.
        OSError: If listing fails.
    """
    if scheme_of(url) in ("http", "https"):
        raise ConfigError(
            f"source {shown(url)} is no archive, table or tar by its name, and http cannot list a "
            "folder: give the URL of a .tar, .zip, .csv, .jsonl or .parquet, or a pattern of tars "
            "such as https://host/set-{0000..0099}.tar."
        )
    with _as_os_error(url):
        fs, root = file_system(url, PATIENCE)
        root = root.rstrip("/")
        if not fs.isdir(root):
            raise ConfigError(
                f"source {shown(url)} is no folder that can be listed, and its name is that of no "
                "archive or table: check the URL and the credentials in the environment."
            )
    stack = [_entries(url, fs, root)]
    while stack:
        for entry in stack[-1]:
            if entry["type"] == "directory":
                stack.append(_entries(url, fs, entry["name"]))
                break
            path = entry["name"]
            yield path[len(root) :].lstrip("/"), fs.unstrip_protocol(path), entry["size"]
        else:
            stack.pop()


def _entries(url: str, fs: Any, folder: str) -> Iterator[dict[str, Any]]:
    """Yield what is in a folder, folders sorted as if their names ended in a slash."""
    with _as_os_error(url):
        found = fs.ls(folder, detail=True)

    def key(entry: dict[str, Any]) -> str:
        return entry["name"].rstrip("/") + "/" * (entry["type"] == "directory")

    # Some stores show an empty object of the folder's own name.
    return iter(sorted((e for e in found if e["name"].rstrip("/") != folder.rstrip("/")), key=key))


def matches_url(pattern: str) -> list[str]:
    """Return the URLs that a pattern with ``*`` fits, in order; itself if it has none."""
    if not any(mark in pattern for mark in "*["):
        return [pattern]
    if scheme_of(pattern) in ("http", "https"):
        raise ConfigError(f"source {shown(pattern)}: http cannot list; use {{0000..0099}}, no *.")
    with _as_os_error(pattern):
        fs, path = file_system(pattern, PATIENCE)
        return [fs.unstrip_protocol(found) for found in sorted(fs.glob(path))]


def beside(url: str, name: str) -> str:
    """Return the URL of a file given relative to the folder of another."""
    if scheme_of(url) not in ("http", "https"):
        return f"{url.rpartition('/')[0]}/{name}"
    return f"{_QUERY.sub('', url).rpartition('/')[0]}/{quote(name)}"
