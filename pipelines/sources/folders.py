"""Folders of images, local and remote, walked in the order of names."""

from __future__ import annotations

import os
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
        ConfigError: If it is a folder of splits, or has links that lead out of it.
    """
    root = os.fsencode(folder.absolute())
    if options.labels:
        _refuse_splits(source, _class_folders(root))
    above = f"{os.fsdecode(root)}/"
    images = (
        SourceImage(name, class_of(name, options), above + name)
        for name in map(os.fsdecode, _walk(root, source, options))
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


def _walk(root: bytes, source: str, options: SourceOptions) -> Iterator[bytes]:
    """Yield the name of each file, depth first; one folder's names in memory a level."""
    real_root = os.path.realpath(root)
    stack = [(b"", real_root, *_sorted_names(root))]
    while stack:
        prefix, _, names, odd = stack[-1]
        for name in names:
            if name in odd and not options.allow_outside:
                _check_link(root + b"/" + prefix + name, real_root, source)
            if name.endswith(b"/"):
                path = root + b"/" + prefix + name
                real = os.path.realpath(path) if options.allow_outside else b""
                _refuse_circle(path, real, [above for _, above, _, _ in stack], source)
                stack.append((prefix + name, real, *_sorted_names(path)))
                break
            yield prefix + name
        else:
            stack.pop()


def _sorted_names(folder: bytes) -> tuple[Iterator[bytes], set[bytes]]:
    """List a folder in order, and which of its names are neither plain files nor folders.

    Folders get a slash: so their files come in the order of whole paths.
    """
    names, odd = [], set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[:1] == b".":
                continue
            name = entry.name
            if not entry.is_file(follow_symlinks=False):
                name += b"/" * _is_folder(entry)
                if not entry.is_dir(follow_symlinks=False):
                    odd.add(name)
            names.append(name)
    return iter(sorted(names)), odd


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    """Whether it is a folder, or a link to one; not so a link to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _check_link(path: bytes, root: bytes, source: str) -> None:
    """Refuse a link out of the folder or to one of its folders.

    What leads nowhere passes, and so do FIFOs and sockets: reading them says what they are, and
    they are counted as rejected.
    """
    path = path.rstrip(b"/")
    real = os.path.realpath(path)
    is_folder = os.path.isdir(real)  # noqa: PTH112
    inside = real.startswith(root.rstrip(b"/") + b"/")
    leads = os.path.islink(path) and os.path.exists(real)  # noqa: PTH110, PTH114
    if leads and (is_folder or not inside):
        where = "to a folder" if is_folder else "out of the folder"
        raise ConfigError(
            f"source {source} has a link {os.fsdecode(path)!r} that leads {where}: what it would "
            "pack is not in the source. Replace it by the file, or allow links and paths that "
            "lead outside (--allow-outside)."
        )


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
