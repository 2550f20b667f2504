"""Files behind URLs, through fsspec: read, copied from, listed; the only place that knows it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, BinaryIO
from urllib.parse import quote

import fsspec

from fastclr.config import ConfigError

_CREDENTIALS = re.compile(r"(?<=://)[^/@?#]*@|[?#].*", re.DOTALL)
_QUERY = re.compile(r"[?#].*", re.DOTALL)
_EXTRAS = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3"}


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
    """Refuse a source that is no plain URL of a known file system.

    Raises:
        ConfigError: For ``pipe:``, chains (``zip::s3://``) and unknown schemes.
    """
    scheme = scheme_of(url)
    plain = re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) and "://" in url
    if not plain or "::" in url.partition("?")[0]:
        raise ConfigError(f"source {shown(url)} is no plain URL: give SCHEME://PATH, not a chain.")
    if scheme not in fsspec.available_protocols():
        raise ConfigError(
            f"source {shown(url)} has the scheme {scheme!r}, which no installed file system reads "
            "(a pipe: runs commands and is never followed): give a local path, http(s) or s3."
        )


def _file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it."""
    scheme = scheme_of(url)
    try:
        # Listings are not kept: a bucket of 10^7 names would stay in memory.
        options: dict[str, Any] = {"use_listings_cache": False}
        if scheme in ("http", "https"):
            import aiohttp

            # By default a download ends after 5 minutes, whole or not.
            wait = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
            options["client_kwargs"] = {"timeout": wait}
        file_system = fsspec.filesystem(scheme, **options)
    except (ImportError, ValueError) as error:
        extra = _EXTRAS.get(scheme)
        what = f"`pip install 'fastclr[{extra}]'`" if extra else "the package of that file system"
        raise ConfigError(f"{shown(url)} needs {what} ({error}).") from error
    return file_system, file_system._strip_protocol(url)


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


@contextmanager
def open_url(url: str) -> Iterator[BinaryIO]:
    """Open a local path or URL for one reading from the beginning.

    Raises:
        OSError: If it cannot be opened; also where reading in the block fails.
    """
    if "://" not in url:
        with open(url, "rb") as stream:  # noqa: PTH123 - names that are no UTF-8
            yield stream
        return
    with _as_os_error(url):
        file_system, path = _file_system(url)
        # Over http a block size of 0 streams: no server has to know ranges.
        options = {"block_size": 0} if scheme_of(url) in ("http", "https") else {}
        with file_system.open(path, "rb", **options) as stream:
            yield stream


def read_url(url: str, offset: int, num_bytes: int, most: int) -> bytes:
    """Read a range of a URL, all of it or an error.

    Args:
        url: URL.
        offset: First byte.
        num_bytes: Length; -1 for all that follows.
        most: Bytes beyond which it is refused.

    Raises:
        OSError: If it cannot be read, ends too early or is too long.
    """
    with open_url(url) as stream:
        if offset:
            stream.seek(offset)
        pieces, found = [], 0
        wanted = num_bytes if num_bytes >= 0 else most + 1
        while found < wanted and (piece := stream.read(min(wanted - found, 1 << 22))):
            pieces.append(piece)
            found += len(piece)
        size = getattr(stream, "size", None)
    if found > most:
        raise OSError(f"{shown(url)} has more than {most} bytes, too many for an image")
    if num_bytes < 0:
        wanted = found if size is None else size - offset
    if found != wanted:
        raise OSError(f"{shown(url)}: {found} of {wanted} bytes came: it was cut or has changed")
    return b"".join(pieces)


def identity_of(url: str) -> str | None:
    """Return what changes when a remote file does, or None where its server does not say.

    Raises:
        OSError: If it is not there.
    """
    with _as_os_error(url):
        file_system, path = _file_system(url)
        about = file_system.info(path)
    etag = about.get("ETag") or about.get("etag")
    changed = about.get("LastModified") or about.get("mtime") or about.get("created")
    if not etag and not changed and (text := about.get("Last-Modified")):
        changed = _settled(text)
    if about.get("size") is None or not (etag or changed):
        return None
    return f"{url} {about['size']} {etag or changed}"


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
        file_system, root = _file_system(url)
        root = root.rstrip("/")
        if not file_system.isdir(root):
            raise ConfigError(
                f"source {shown(url)} is no folder that can be listed, and its name is that of no "
                "archive or table: check the URL and the credentials in the environment."
            )
    stack = [_entries(url, file_system, root)]
    while stack:
        for entry in stack[-1]:
            if entry["type"] == "directory":
                stack.append(_entries(url, file_system, entry["name"]))
                break
            path = entry["name"]
            yield path[len(root) :].lstrip("/"), file_system.unstrip_protocol(path), entry["size"]
        else:
            stack.pop()


def _entries(url: str, file_system: Any, folder: str) -> Iterator[dict[str, Any]]:
    """Yield what is in a folder, folders sorted as if their names ended in a slash."""
    with _as_os_error(url):
        found = file_system.ls(folder, detail=True)

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
        file_system, path = _file_system(pattern)
        return [file_system.unstrip_protocol(found) for found in sorted(file_system.glob(path))]


def beside(url: str, name: str) -> str:
    """Return the URL of a file given relative to the folder of another."""
    if scheme_of(url) not in ("http", "https"):
        return f"{url.rpartition('/')[0]}/{name}"
    return f"{_QUERY.sub('', url).rpartition('/')[0]}/{quote(name)}"
