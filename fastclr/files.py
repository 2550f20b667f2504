"""Files that are whole or not there, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any


def sha256_of(file: Path) -> str:
    """Return a file's sha256 in hexadecimal; other threads run meanwhile."""
    with file.open("rb", buffering=0) as stream:
        return sha256_of_rest(stream)


def sha256_of_rest(stream: FileIO) -> str:
    """Return the sha256 of what is left to read of an unbuffered file, as :func:`sha256_of`."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 18))  # stays in a core's cache
    while count := stream.readinto(buffer):
        digest.update(buffer[:count])
    return digest.hexdigest()


def write_durably(file: Path, text: str) -> None:
    """Write a text file so that it is whole, or unchanged, whenever the process or power stops."""
    temporary = file.with_name(f".{file.name}.partial")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def write_shared(file: Path, data: bytes) -> None:
    """Write a file whole, also when several processes write it at the same time: the last wins."""
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name[:100]}.", dir=file.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(file: Path, value: Any) -> None:
    """Write JSON with :func:`write_durably`."""
    write_durably(file, json.dumps(value, indent=1))


def plain_files(folder: Path) -> list[Path]:
    """Return all files below a folder, in order.

    Raises:
        ValueError: At a link, a pipe or anything else that is no plain file or folder.
        OSError: If it cannot be read.
    """
    found: list[Path] = []
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            found.append(path)
        elif not stat.S_ISDIR(mode):
            raise ValueError(f"{path} is a link or a special file")
    return found


def keep_from_others(path: Path) -> None:
    """Take the right to write a file or folder from all but its owner, where storage has modes."""
    with suppress(PermissionError):
        path.chmod(path.stat().st_mode & ~0o022)


def written_by_others(path: Path, ours: set[int]) -> str:
    """Say who else may have put something into a file or folder; "" if nobody.

    Args:
        path: File or folder.
        ours: User ids that are ours on its storage, besides root and the one of this process.
    """
    found = path.stat()
    if found.st_uid not in {os.geteuid(), 0} | ours:
        return f"{path} belongs to user {found.st_uid}"
    if found.st_mode & 0o022:
        return f"{path} may be written by others (mode {found.st_mode & 0o777:o})"
    return ""
