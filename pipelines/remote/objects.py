"""One try to read an object through fsspec: S3, Google, Azure, local files, memory."""

from __future__ import annotations

import asyncio
import functools
import os
from typing import Any

from fastclr.config import ConfigError
from pipelines.errors import ShardError, StorageError
from pipelines.remote.retries import (
    Again,
    Changed,
    Deadline,
    Final,
    Missing,
    Patience,
    refusal,
)
from pipelines.remote.transfer import Transfer
from pipelines.remote.urls import protocol_of, redacted_text

BLOCK = 8 << 20  # bytes a request: few enough to come within read_seconds on a slow line

_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}
_HOPELESS = (PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")


def read(url: str, transfer: Transfer, deadline: Deadline, patience: Patience) -> None:
    """Read what is missing of an object into a transfer, block by block.

    Without a hash the object's version is compared before and after; fsspec has no way to ask for
    a range of one version.

    Raises:
        Again: If this try failed; what came before the failure stays.
        Final: If another try is useless.
        ConfigError: If the package for the protocol is missing.
    """
    protocol = protocol_of(url)

    def call(name: str, **options: Any) -> Any:
        return _call(fs, name, path, deadline.limit(patience.read_seconds), options)

    try:
        fs = _file_system(protocol, patience, os.getpid(), _environment())
        path = fs._strip_protocol(url)
        total, version = _facts(call("info"))
        if transfer.received and version != transfer.version:
            raise Changed(f"it changed while it was read: {transfer.version}, now {version}")
        if not transfer.received:
            transfer.begin(total, version)
        while transfer.received < total:
            end = min(total, transfer.received + BLOCK)
            block = call("cat_file", start=transfer.received, end=end)
            if not block:
                break
            transfer.add(block)
        if transfer.sha256 is None and _facts(call("info")) != (total, version):
            raise Changed(f"it changed while it was read: {version} before")
    except (Again, Final, StorageError, ShardError, ConfigError):
        raise
    except (TimeoutError, asyncio.TimeoutError):  # two classes in Python 3.10
        raise Again(f"no answer within {patience.read_seconds:g} s, or time was up") from None
    except Exception as error:
        raise _meaning(error) from None
    transfer.check_end()


def file_system(url: str, patience: Patience) -> tuple[Any, str]:
    """Return fsspec's file system for listing, which tries again by itself, and a URL's path in it.

    Raises:
        ConfigError: If the URL is refused, or the package for its protocol is missing.
    """
    fs = _file_system(protocol_of(url), patience, os.getpid(), _environment(), True)
    return fs, fs._strip_protocol(url)


@functools.lru_cache(maxsize=8)
def _file_system(
    protocol: str, patience: Patience, pid: int, environment: int, tries_again: bool = False
) -> Any:
    """Return the file system of a protocol, made in this process and for this environment.

    None survives a fork.

    Credentials are found by the cloud's own library: environment, profile, the machine's role.
    """
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol == "s3" and tries_again:
        options["config_kwargs"] = {
            "connect_timeout": patience.connect_seconds,
            "read_timeout": patience.read_seconds,
        }
    elif protocol == "s3":
        # Its own retries are switched off (here and in botocore): they know no deadline.
        options["config_kwargs"] = {
            "connect_timeout": patience.connect_seconds,
            "read_timeout": patience.read_seconds,
            "retries": {"total_max_attempts": 1},
        }
    try:
        import fsspec

        fs: Any = fsspec.filesystem(protocol, **options)
    except ImportError as error:
        package = _PACKAGES.get(protocol, "fsspec")
        raise ConfigError(
            f"{protocol}:// needs the package {package}, which cannot be imported ({error}): "
            f"`pip install {package}`."
        ) from error
    if protocol == "s3" and not tries_again:
        fs.retries = 1
    return fs


def _environment() -> int:
    """Return a number that changes when addresses or credentials in the environment do."""
    prefixes = ("AWS_", "GOOGLE_", "AZURE_", "FSSPEC_", "STORAGE_")
    return hash(frozenset(item for item in os.environ.items() if item[0].startswith(prefixes)))


def _call(fs: Any, name: str, path: str, seconds: float, options: dict[str, Any]) -> Any:
    """Call a method of a file system; where it is asynchronous it is broken off in time."""
    if not fs.async_impl:
        return getattr(fs, name)(path, **options)
    from fsspec.asyn import sync

    return sync(fs.loop, getattr(fs, f"_{name}"), path, timeout=seconds, **options)


def _facts(info: dict[str, Any]) -> tuple[int, str]:
    """Return an object's length and what tells its versions apart."""
    if info.get("type") == "directory" or info.get("size") is None:
        raise Final("it is a folder, or has no length")
    names = ("ETag", "etag", "md5Hash", "generation", "mtime", "ino", "LastModified", "created")
    return info["size"], "/".join(str(info[name]) for name in names if info.get(name))


def _meaning(error: Exception) -> Again | Final:
    """Say what another library's error means, its words redacted."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        about = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        status = about.get("HTTPStatusCode") or getattr(cause, "status", None)
        if isinstance(status, int) and status >= 400:
            return refusal(status, about.get("HTTPHeaders", {}).get("retry-after"))
        cause = cause.__cause__
    what = f"{type(error).__name__}: {redacted_text(str(error))}"
    if isinstance(error, FileNotFoundError):
        return Missing(what)
    if isinstance(error, _HOPELESS) or type(error).__name__ in _NO_CREDENTIALS:
        return Final(what)
    return Again(what)
