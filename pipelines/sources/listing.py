"""What a source is, by its name and what lies there, and who lists it."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from fastclr.config import ConfigError
from pipelines.shards import FORMAT, MANIFEST
from pipelines.sources.folders import list_folder, list_remote_folder
from pipelines.sources.images import Listing, SourceOptions, is_hidden
from pipelines.sources.opening import check_url, list_url, matches_url, read_start, scheme_of, shown
from pipelines.sources.records import find_records
from pipelines.sources.samples import holds_samples, list_samples
from pipelines.sources.spool import localised
from pipelines.sources.tables import list_table
from pipelines.sources.tars import COMPRESSIONS, decompressed, list_tar
from pipelines.sources.zips import list_zip

_MAX_FILES = 1_000_000  # that a brace pattern may name
_MAX_MANIFEST = 1 << 30
# What lies beside shards and Parquet files without being data.
_NOTES = (".json", ".jsonl", ".idx", ".index", ".md", ".txt", ".yaml", ".csv")
_UNREADABLE = {
    ".pkl": "is pickled: reading it would run code from the file",
    ".pickle": "is pickled: reading it would run code from the file",
    ".pt": "is pickled: reading it would run code from the file",
    ".pth": "is pickled: reading it would run code from the file",
    ".npy": "holds arrays, not images",
    ".npz": "holds arrays, not images",
    ".mat": "is a MATLAB file",
    ".h5": "is an HDF5 file",
    ".hdf5": "is an HDF5 file",
    ".lmdb": "is an LMDB",
    ".tfrecord": "is a TFRecord file",
    ".arrow": "is an Arrow file; write it with to_parquet, or",
    ".7z": "is an archive of a kind that is not read",
    ".rar": "is an archive of a kind that is not read",
}

Files = list[tuple[str, Path]]


def list_source(source: str, options: SourceOptions, spool: Path) -> Listing:
    """List the images of a source, without reading them.

    A source is a folder of class folders or of images; a tar, also ``.tar.gz``, ``.bz2``, ``.xz``
    and ``.zst``, or zip of one; a ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` table; WebDataset
    shards or Parquet files, as a folder or a pattern like ``set-{0000..0099}.tar`` or
    ``train-*.parquet``; a set packed by fastclr; or a data set of torchvision on disk, as far as it
    needs no unpickling. All of them on local disk, http(s), S3 and whatever else fsspec reads,
    except torchvision's. http cannot list folders.

    Files whose name begins with a dot are left out; every other file of a folder or archive has to
    be an image. The order is that of the names, or of the rows.

    Args:
        source: Path, URL or pattern.
        options: How it is understood.
        spool: Folder for copies of what has no random access: remote archives and tables,
            decompressed tars, deflated members of zips, images out of Parquet and raw pixels. They
            are taken again if the source has not changed, and needed until everything is packed.

    Returns:
        The images, to be gone through once, in memory that does not grow with their number.

    Raises:
        ConfigError: Here or while listing: if the source is missing, damaged, ambiguous, empty,
            would give labels nobody meant, or names what it may not.
        OSError: If listing or copying fails.
    """
    scheme = scheme_of(source)
    if scheme == "file" and source.startswith("file:///"):
        source, scheme = unquote(urlsplit(source).path), ""
    spool = spool.absolute()
    if scheme:
        check_url(source)
    elif not source or "\0" in source:
        raise _missing(source)
    if not os.path.lexists(source) and re.search(r"[*{\[]", _path_of(source)):
        return _list_pattern(source, options, spool)
    suffix = _suffix(source)
    if suffix in _UNREADABLE and not os.path.isdir(source):  # noqa: PTH112
        raise ConfigError(
            f"source {shown(source)} {_UNREADABLE[suffix]}. Write its images into class folders, a "
            "tar, or a Parquet file with a column of encoded images."
        )
    if scheme:
        return _list_remote(source, suffix, options, spool)
    if os.path.isdir(source):  # noqa: PTH112 - False for a name that is too long
        return _list_local_folder(Path(source), source, options, spool)
    if not os.path.isfile(source):  # noqa: PTH113
        raise _missing(source)
    return _FILES.get(suffix, _list_tar)(source, Path(source), suffix, options, spool)


def _missing(source: str) -> ConfigError:
    return ConfigError(
        f"source {source} does not exist: give a folder of class folders, a folder of images, a "
        "tar or zip of one of these, a CSV, JSONL or Parquet table, or WebDataset shards."
    )


def _path_of(source: str) -> str:
    """Return what names a file: of a URL, neither host nor query."""
    return urlsplit(source).path if scheme_of(source) in ("http", "https") else source


def _suffix(source: str) -> str:
    """Return the known end of a name in lower case, else its last suffix."""
    name = _path_of(source).rstrip("/").rpartition("/")[2].lower()
    known = [end for end in (*COMPRESSIONS, *_FILES) if name.endswith(end)]
    return max(known, key=len, default=Path(name).suffix)


def _list_tar(given: str, file: Path, suffix: str, options: SourceOptions, spool: Path) -> Listing:
    if holds_samples(file, shown(given)):
        return list_samples([(given, file)], shown(given), options)
    return list_tar(file, shown(given), options, spool)


def _list_compressed(
    given: str, file: Path, suffix: str, options: SourceOptions, spool: Path
) -> Listing:
    plain = decompressed(file, shown(given), spool, suffix)
    return _list_tar(given, plain, suffix, options, spool)


def _list_zip(given: str, file: Path, suffix: str, options: SourceOptions, spool: Path) -> Listing:
    return list_zip(file, shown(given), options, spool)


def _list_rows(given: str, file: Path, suffix: str, options: SourceOptions, spool: Path) -> Listing:
    return list_table(file, given, ".jsonl" if suffix == ".ndjson" else suffix, options)


def _list_parquet(
    given: str, file: Path, suffix: str, options: SourceOptions, spool: Path
) -> Listing:
    return _list_parquets([(given, file)], options, spool)


_FILES: dict[str, Callable[[str, Path, str, SourceOptions, Path], Listing]] = {
    ".tar": _list_tar,
    ".zip": _list_zip,
    ".csv": _list_rows,
    ".tsv": _list_rows,
    ".jsonl": _list_rows,
    ".ndjson": _list_rows,
    ".parquet": _list_parquet,
    **dict.fromkeys(COMPRESSIONS, _list_compressed),
}


def _list_parquets(files: Files, options: SourceOptions, spool: Path) -> Listing:
    try:
        from pipelines.sources.parquet import list_parquet
    except ImportError as error:
        raise ConfigError(
            f"source {shown(files[0][0])} is Parquet and needs pyarrow: "
            "`pip install 'fastclr[parquet]'`."
        ) from error
    return list_parquet(files, options, spool)


def _list_remote(source: str, suffix: str, options: SourceOptions, spool: Path) -> Listing:
    """List a remote archive or table through a copy, or a remote folder in place."""
    if suffix in _FILES:
        file = localised(source, spool, suffix)
        return _FILES[suffix](source, file, suffix, options, spool)
    folder = source.rstrip("/")
    if packed := _packed_set(f"{folder}/{MANIFEST}"):
        class_names, names = packed
        tars = ((url, localised(url, spool, ".tar")) for url in (f"{folder}/{n}" for n in names))
        return list_samples(tars, shown(source), options, class_names or None)
    for end in (".tar", ".parquet"):
        if urls := _only_urls(source, end):
            return _list_several(urls, source, options, spool)
    return list_remote_folder(source, options)


def _only_urls(folder: str, end: str) -> list[str]:
    """Return a remote folder's files of one kind, if it holds none but these and notes."""
    urls = []
    for name, url, _ in list_url(folder):
        if name.endswith(end):
            urls.append(url)
        elif not is_hidden(name) and not name.endswith((*_NOTES, "/")):
            return []
    return urls


def _list_local_folder(folder: Path, source: str, options: SourceOptions, spool: Path) -> Listing:
    """Tell what a folder is by the files in it."""
    if (folder / MANIFEST).is_file() and (packed := _packed_set(str(folder / MANIFEST))):
        class_names, names = packed
        tars = [(str(folder / name), folder / name) for name in names]
        return list_samples(tars, source, options, class_names or None)
    if records := find_records(folder):
        return records[1](records[0], options, spool)
    for end in (".tar", ".parquet"):
        # Hugging Face keeps its files in a folder named data.
        for here in (folder, folder / "data"):
            names = sorted(p.name for p in _some(here, end))
            if names:
                return _list_several([str(here / n) for n in names], source, options, spool)
    return list_folder(folder, source, options)


def _some(folder: Path, end: str) -> Iterator[Path]:
    """Yield a folder's files of one kind, if its visible files are of that kind and its notes."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                hidden = entry.name.startswith(".")
                if not hidden and not entry.name.endswith((end, *_NOTES)):
                    return
    except (FileNotFoundError, NotADirectoryError):
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(end) and not entry.name.startswith("."):
                yield Path(entry.path)


def _packed_set(manifest: str) -> tuple[list[str], list[str]] | None:
    """Return class names and tars of a set packed by fastclr; None without its manifest."""
    try:
        raw = read_start(manifest, _MAX_MANIFEST)
    except FileNotFoundError:
        return None
    try:
        parsed = json.loads(raw)
        if not isinstance(parsed, dict) or parsed.get("format") != FORMAT:
            return None
        names = [shard["file"] for shard in parsed["shards"]]
        class_names = parsed["class_names"]
        plain = all(isinstance(n, str) and Path(n).name == n != ".." for n in names)
        if not plain or not all(isinstance(name, str) for name in class_names):
            raise TypeError("a file or class is named by something else")
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{shown(manifest)} is damaged ({error!r:.200}): pack again.") from error
    except (ValueError, RecursionError):
        return None  # JSON of somebody else, or none at all
    return class_names, names


def _list_pattern(source: str, options: SourceOptions, spool: Path) -> Listing:
    """List the shards or Parquet files that a pattern with braces or stars names."""
    found: list[str] = []
    for pattern in expand_braces(source):
        if scheme_of(source):
            found += matches_url(pattern)
        elif re.search(r"[*\[]", pattern):
            found += sorted(glob.glob(pattern))  # noqa: PTH207 - absolute patterns
        else:
            found.append(pattern)
        if len(found) > _MAX_FILES:
            raise ConfigError(f"source {shown(source)} names more than {_MAX_FILES} files.")
    missing = [f for f in found if not scheme_of(f) and not Path(f).is_file()]
    if not found or missing:
        what = f"{shown(missing[0])} is not there" if missing else "nothing fits it"
        raise ConfigError(f"source {shown(source)} is a pattern, and {what}: check its numbers.")
    return _list_several(found, source, options, spool)


def _list_several(files: list[str], source: str, options: SourceOptions, spool: Path) -> Listing:
    """List several shards or Parquet files."""
    ends = {_suffix(file) for file in files}
    if ends == {".tar"}:
        tars = ((file, localised(file, spool, ".tar")) for file in files)
        return list_samples(tars, shown(source), options)
    if ends == {".parquet"}:
        files = _of_split(files, source, options)
        local = [(file, localised(file, spool, ".parquet")) for file in files]
        return _list_parquets(local, options, spool)
    raise ConfigError(
        f"source {shown(source)} names files of {', '.join(sorted(ends))}: several files have to "
        "be all .tar (WebDataset shards) or all .parquet."
    )


def _of_split(files: list[str], source: str, options: SourceOptions) -> list[str]:
    """Keep the files of the split asked for, where their names say several."""
    splits: dict[str, list[str]] = {}
    for file in files:
        name = _path_of(file).rpartition("/")[2]
        match = re.match(r"(.+?)-\d+-of-\d+(-[0-9a-f]+)?\.parquet$", name)
        splits.setdefault(match[1] if match else "", []).append(file)
    if len(splits) == 1:
        return files
    if options.split not in splits:
        raise ConfigError(
            f"source {shown(source)} has files of the splits {', '.join(sorted(splits))}: choose "
            f"one with --split; it is {options.split!r}."
        )
    return splits[options.split]


def expand_braces(pattern: str) -> Iterator[str]:
    """Yield what ``{a,b}`` and ``{000..099}`` in a pattern stand for, in order, as a shell does."""
    match = re.search(r"\{([^{}]*,[^{}]*|\d{1,18}\.\.\d{1,18})\}", pattern)
    if match is None:
        yield pattern
        return
    first, dots, last = match[1].partition("..")
    if dots and first.isdigit() and last.isdigit():
        padded = any(re.match("0[0-9]", number) for number in (first, last))
        width = max(len(first), len(last)) if padded else 0
        start, stop = int(first), int(last)
        step = 1 if stop >= start else -1
        choices: Any = (f"{number:0{width}d}" for number in range(start, stop + step, step))
    else:
        choices = match[1].split(",")
    for choice in choices:
        for rest in expand_braces(pattern[match.end() :]):
            yield pattern[: match.start()] + choice + rest
