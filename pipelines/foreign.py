"""Tars made by others (img2dataset, WebDataset, torchvision), read like our own."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.errors import ShardError
from pipelines.foreign_index import NAMED, Indexed, Indexer, parse_lines
from pipelines.index import Index
from pipelines.packed import MANIFEST

log = logging.getLogger(__name__)

_MOST_NAMES = 1_000_000  # a pattern makes
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_foreign(text: str) -> bool:
    """Whether a path means tars without a manifest: a pattern, a tar, or a folder of tars."""
    path = Path(text)
    if path.is_dir():
        return bool(_tars(path)) and not (path / MANIFEST).exists() and not _is_unfinished(path)
    if path.exists():
        return path.suffix == ".tar"
    return bool(RANGE.search(text)) or glob.has_magic(text)


def _tars(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.tar") if not p.name.startswith("."))


def _is_unfinished(folder: Path) -> bool:
    """Whether a folder is what a killed packing left: reading that would lose samples silently."""
    ours = any(folder.glob("*.index.jsonl")) or (folder / "rejected.jsonl").exists()
    return ours or ".partial" in folder.name


def list_tars(text: str) -> list[Path]:
    """Return the tars that a folder, a glob pattern or ``{000000..000099}`` means, in order.

    Raises:
        ShardError: If there are none, or one that a range names is missing.
    """
    path = Path(text)
    if path.exists():
        return _tars(path) if path.is_dir() else [path]
    found: list[Path] = []
    for name in expand(text):
        if glob.has_magic(name):
            found += sorted(map(Path, glob.glob(name)))  # noqa: PTH207 - the pattern may be absolute
        elif Path(name).exists():
            found.append(Path(name))
        else:
            raise ShardError(f"{name} of {text} does not exist: correct the range or restore it.")
    if not found:
        raise ShardError(f"{text} matches no file: correct the pattern.")
    return found


def expand(text: str) -> list[str]:
    """Write out every ``{first..last}``, with the zeros that ``first`` begins with."""
    parts = RANGE.split(text)
    choices: list[list[str]] = [[parts[0]]]
    for first, last, tail in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        if not 0 <= int(last) - int(first) < _MOST_NAMES:
            raise ShardError(f"{{{first}..{last}}} of {text} is no range: give {{first..last}}.")
        numbers = range(int(first), int(last) + 1)
        choices += [[f"{n:0{len(first)}d}" for n in numbers], [tail]]
    if np.prod([len(choice) for choice in choices], dtype=float) > _MOST_NAMES:
        raise ShardError(f"{text} means more than {_MOST_NAMES} files: give a smaller range.")
    return ["".join(parts) for parts in itertools.product(*choices)]


def names_of_classes(found: Sequence[Indexed]) -> list[str]:
    """Return names for the labels of some tars, which have none."""
    return [str(k) for k in range(max(one.num_classes for one in found))]


def report(text: str, found: Sequence[Indexed], max_damaged: float) -> None:
    """Warn of what is left out, or refuse it.

    Args:
        text: What was opened.
        found: What is in its tars.
        max_damaged: Share of samples that may be left out.

    Raises:
        ShardError: If more is damaged, or nothing is left.
    """
    kept, left_out = (sum(getattr(f, n) for f in found) for n in ("num_samples", "num_left_out"))
    first = [problem for one in found for problem in one.left_out][:NAMED]
    named = "".join(f"\n  {problem}" for problem in first) + "\n  ..." * (left_out > len(first))
    if kept == 0:
        raise ShardError(f"{text}: {len(found)} tars hold no usable sample.{named}")
    if left_out > max_damaged * (kept + left_out):
        raise ShardError(
            f"{text}: {left_out} of {kept + left_out} samples cannot be used, more than "
            f"max_damaged={max_damaged:g} allows:{named}\nRepair the tars, or allow more."
        )
    if left_out:
        log.warning(
            "%s: %d of %d samples cannot be used and are left out:%s",
            text, left_out, kept + left_out, named,
        )  # fmt: skip
    if pickled := sum(one.num_pickled for one in found):
        log.warning("%s: %d pickled members are ignored, never loaded", text, pickled)


class ForeignShards:
    """Tars without a manifest; see :class:`~pipelines.shards.Storage`.

    Args:
        text: Folder, tar or pattern; see :func:`list_tars`.
        cache: Folder for indexes that cannot lie beside their tar.
        label_field: See :func:`~pipelines.tar_scan.scan`.
        max_damaged: Share of samples that may be left out.

    Raises:
        ShardError: If a tar cannot be read, more is damaged than allowed, or nothing is left.
    """

    has_hashes = False

    def __init__(self, text: str, cache: Path, label_field: str | None, max_damaged: float) -> None:
        self.path: Path | str = text
        self._indexer = Indexer(cache, label_field)
        files = list_tars(text)
        found = self._indexer.describe_all(files)
        report(text, found, max_damaged)
        used = [(file, one) for file, one in zip(files, found, strict=True) if one.num_samples]
        self._files = [file for file, _ in used]
        self._indexed = [one for _, one in used]
        self.samples_of_shards = np.array([one.num_samples for one in self._indexed], np.int64)
        self.class_names = names_of_classes(found)
        facts = [
            (file.name, one.num_bytes, one.known_by, one.num_samples, one.sha256)
            for file, one in used
        ]
        self.digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def file(self, number: int) -> str:
        """Name a tar for an error."""
        return str(self._files[number])

    def open(self, number: int) -> int:
        """Open a tar; return its file descriptor, which the caller closes."""
        return os.open(self._files[number], os.O_RDONLY | os.O_CLOEXEC)

    def index(self, number: int) -> Index:
        """Read a shard's index, or make it again where it has gone.

        Raises:
            ShardError: If the tar has changed since the set was opened.
        """
        file, known = self._files[number], self._indexed[number]
        if found := self._indexer.read(file):
            indexed, index = found
        else:
            indexed, lines = self._indexer.make(file)
            index = parse_lines(indexed, lines)
        if indexed.sha256 != known.sha256 or indexed.known_by != known.known_by:
            raise ShardError(f"{file} changed while it was in use: start again.")
        return index

    def compare(self, numbers: Sequence[int], tolerant: bool) -> None:
        """Do nothing: there is no manifest to compare with."""

    def check(self) -> None:
        """Return: what is read was compared before, or cannot be."""

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Do nothing: the files are here."""

    def verify(self, number: int) -> int:
        """Refuse: nobody wrote down what the bytes should be."""
        raise ShardError(
            f"{self._files[number]} has no manifest that says its sha256: pack it with "
            "`fastclr shards` to have one."
        )
