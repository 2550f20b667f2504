"""Folders of images, local and remote, walked in the order of names."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from fastclr.config import ConfigError
from pipelines.sources.images import (
    Listing,
    SourceImage,
    SourceOptions,
    check_classes,
    class_of,
    is_hidden,
)
from pipelines.sources.opening import list_url, shown

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "unlabeled"}


def list_folder(folder: Path, source: str, options: SourceOptions) -> Listing:
    """List the files of a folder of class folders, or of a flat one, in the order of names.

    Raises:
        ConfigError: If it is a folder of splits, or has links that lead out of it or something
            that is neither file nor folder.
    """
    root = os.fsencode(folder.absolute())
    if options.labels:
        _refuse_splits(source, _class_folders(root))
    images = (
        SourceImage(os.fsdecode(name), class_of(os.fsdecode(name), options), os.fsdecode(path))
        for name, path in _walk(root, source, options)
    )
    return Listing(check_classes(source, images, lambda: _class_folders(root), options))


def _class_folders(root: bytes) -> set[str]:
    with os.scandir(root) as entries:
        return {os.fsdecode(e.name) for e in entries if e.name[:1] != b"." and _is_folder(e)}


def _refuse_splits(source: str, folders: set[str]) -> None:
    """Refuse to take splits for classes."""
    if len(folders) > 1 and {name.lower() for name in folders} <= _SPLITS:
        raise ConfigError(
            f"source {source} has the folders {', '.join(sorted(folders))}: these are splits, and "
            f"would become classes. Give one of them, e.g. {source.rstrip('/')}/"
            f"{min(folders)}, or switch labels off."
        )


def _walk(root: bytes, source: str, options: SourceOptions) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and path of each file, depth first; one folder's names in memory a level."""
    real_root = os.path.realpath(root)
    stack = [(b"", real_root, iter(_sorted_names(root)))]
    while stack:
        prefix, _, names = stack[-1]
        for name in names:
            path = os.path.join(root, prefix, name.rstrip(b"/"))  # noqa: PTH118
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                mode = _check_link(path, real_root, source, options)
            if name.endswith(b"/"):
                real = os.path.realpath(path) if options.allow_outside else b""
                _refuse_circle(path, real, [above for _, above, _ in stack], source)
                stack.append((prefix + name, real, iter(_sorted_names(path))))
                break
            if not stat.S_ISREG(mode):
                raise ConfigError(
                    f"source {source} has {os.fsdecode(prefix + name)!r}, which is neither a file "
                    "nor a folder: every file has to be an image. Remove it."
                )
            yield prefix + name, path
        else:
            stack.pop()


def _sorted_names(folder: bytes) -> list[bytes]:
    """List a folder, folders with a slash: so their files come in the order of whole paths."""
    with os.scandir(folder) as entries:
        return sorted(e.name + b"/" * _is_folder(e) for e in entries if e.name[:1] != b".")


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    """Whether it is a folder, or a link to one; not so a link to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _check_link(path: bytes, root: bytes, source: str, options: SourceOptions) -> int:
    """Refuse a link out of the folder, or to one of its folders; return what it leads to."""
    real = os.path.realpath(path)
    inside = real.startswith(os.path.join(root, b""))  # noqa: PTH118
    is_folder = os.path.isdir(real)  # noqa: PTH112
    if not options.allow_outside and (is_folder or not inside):
        where = "to a folder" if is_folder else "out of the folder"
        raise ConfigError(
            f"source {source} has a link {os.fsdecode(path)!r} that leads {where}: what it would "
            "pack is not in the source. Replace it by the file, or allow links and paths that "
            "lead outside (--options.allow-outside)."
        )
    try:
        return os.stat(real).st_mode  # noqa: PTH116
    except OSError:
        return stat.S_IFREG  # it leads nowhere: reading it says so, and it is counted as rejected


def _refuse_circle(path: bytes, real: bytes, above: list[bytes], source: str) -> None:
    """Refuse a link to a folder above itself."""
    if real and real in above:
        raise ConfigError(
            f"source {source} has a link {os.fsdecode(path)!r} to a folder above it: it has no "
            "end. Remove it."
        )


def list_remote_folder(url: str, options: SourceOptions) -> Listing:
    """List the files of a folder of an object store or another file system that can list."""
    folders: set[str] = set()

    def images() -> Iterator[SourceImage]:
        for name, file, num_bytes in list_url(url):
            if is_hidden(name):
                continue
            if name.endswith("/"):  # an empty object that stands for a folder
                folders.add(name.partition("/")[0])
                continue
            yield SourceImage(name, class_of(name, options), file, 0, num_bytes)

    return Listing(check_classes(shown(url), images(), lambda: folders, options))
