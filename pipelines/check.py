"""Re-reading a whole packed set: everything that can be wrong with it, and mending its indexes."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastclr.config import ConfigError
from fastclr.files import sha256_of, write_json, write_shared
from pipelines.decode import DamagedImage, check_image
from pipelines.errors import ShardError
from pipelines.index import BLOCK, Index, Sample, dali_index, packed_members
from pipelines.mixture import Mixture, open_sets
from pipelines.order import Int64, uniforms
from pipelines.packed import (
    MANIFEST,
    Manifest,
    ShardEntry,
    check_index,
    presence_problem,
    read_manifest,
    sha256_problem,
)
from pipelines.shards import ShardSet
from pipelines.tar_scan import IMAGES, Member, members

_NAMED = 5  # problems of one kind that a shard names
REJECTED = "rejected.jsonl"

Progress = Callable[[int], None]


@dataclass
class CheckReport:
    """What a check found.

    Attributes:
        problems: What is wrong, a line each; empty if the set is as it was packed.
        num_samples: Samples whose place and header were compared.
        num_decoded: Samples that were decoded too.
    """

    problems: list[str] = field(default_factory=list)
    num_samples: int = 0
    num_decoded: int = 0


def check_shards(
    folder: str | Path,
    *,
    share: float = 0.01,
    num_threads: int = 0,
    on_start: Progress = lambda _: None,
    on_bytes: Progress = lambda _: None,
) -> CheckReport:
    """Compare every file of a packed set with its manifest, every index with its tar's headers.

    Args:
        folder: A packed set.
        share: Share of the samples that are decoded, at least one a shard; 1 for all.
        num_threads: Shards checked at the same time; 0 for one a core.
        on_start: Called with the bytes of all tars.
        on_bytes: Called with the bytes of each tar when it is done.

    Returns:
        All that is wrong.

    Raises:
        ShardError: If there is no manifest that says what should be there.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share is {share}: give the part to decode, from 0 to 1.")
    folder = Path(folder)
    manifest = read_manifest(folder)
    on_start(sum(shard.num_bytes for shard in manifest.shards))

    def check(number: int) -> _Shard:
        shard = _Shard(folder, manifest, number)
        shard.check(share)
        on_bytes(shard.entry.num_bytes)
        shard.index = None  # the next ones need the room
        return shard

    report = CheckReport(_folder_problems(folder, manifest))
    last_key = -1
    with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
        for shard in pool.map(check, range(len(manifest.shards))):
            report.problems += shard.problems
            report.num_samples += shard.num_samples
            report.num_decoded += shard.num_decoded
            first, last = shard.keys
            if first <= last_key:
                report.problems.append(
                    f"{shard.tar}: key {first:09d} comes after {last_key:09d} of the shard before: "
                    "keys count up through the set, so one is there twice or shards changed places"
                )
            last_key = max(last, last_key)
    return report


def check_set(
    text: str,
    *,
    share: float = 0.01,
    on_start: Progress = lambda _: None,
    on_bytes: Progress = lambda _: None,
) -> CheckReport:
    """Check what ``--data.train`` may name: see :func:`check_shards` for packed folders.

    Of a set behind a URL every tar is fetched and compared with its sha256, every index read; of
    tars made by others, which state no sha256, every header was read when they were opened.

    Args:
        text: Folder, URL, pattern, or a mixture of these.
        share: Share of the samples that are decoded; 1 for all.
        on_start: Called with the bytes of a packed folder's tars.
        on_bytes: Called with the bytes of each tar when it is done.

    Raises:
        ShardError: If a set cannot be opened.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share is {share}: give the part to decode, from 0 to 1.")
    whole = open_sets(text)
    report = CheckReport()
    for part in whole.sets if isinstance(whole, Mixture) else [whole]:
        if part.has_hashes and isinstance(part.path, Path):
            one = check_shards(part.path, share=share, on_start=on_start, on_bytes=on_bytes)
        else:
            one = _check_part(part, share, on_bytes)
        report.problems += one.problems
        report.num_samples += one.num_samples
        report.num_decoded += one.num_decoded
    return report


def _check_part(part: ShardSet, share: float, on_bytes: Progress) -> CheckReport:
    """Check a set that is no packed folder here."""
    report = CheckReport()
    try:
        if part.has_hashes:
            part.verify(on_bytes)
        report.num_samples = len(part.label_N)
    except ShardError as error:
        report.problems.append(str(error))
        return report
    for sample_id in _chosen(0, len(part), share).tolist():
        report.num_decoded += 1
        try:
            found = check_image(part.read(sample_id))[1:]
            if found != tuple(part.size_N2[sample_id].tolist()):
                place = part.place(sample_id)
                report.problems.append(f"{place} is {found} pixels, its index says otherwise")
        except DamagedImage as error:
            report.problems.append(f"{part.place(sample_id)} {error}")
        except ShardError as error:
            report.problems.append(str(error))
    return report


def _folder_problems(folder: Path, manifest: Manifest) -> list[str]:
    """Say what else lies in the folder that should not, and what of the rejected ones is gone."""
    problems = []
    known = {shard.file for shard in manifest.shards}
    if strangers := sorted(p.name for p in folder.glob("*.tar") if p.name not in known):
        problems.append(
            f"{folder} has tars that its manifest does not name: {', '.join(strangers[:_NAMED])}; "
            "others' readers would read them too: remove them"
        )
    num_rejected = manifest.fields.get("num_rejected", 0)
    try:
        lines = (folder / REJECTED).read_bytes().count(b"\n")
    except FileNotFoundError:
        lines = 0
    if lines != num_rejected:
        problems.append(
            f"{folder / REJECTED} has {lines} lines, the manifest says {num_rejected} were rejected"
        )
    return problems


class _Shard:
    """The check of one shard."""

    def __init__(self, folder: Path, manifest: Manifest, number: int) -> None:
        self.folder, self.number, self.manifest = folder, number, manifest
        self.entry = manifest.shards[number]
        self.tar = folder / self.entry.file
        self.problems: list[str] = []
        self.index: Index | None = None
        self.num_samples = self.num_decoded = 0
        self.keys = (2**62, -1)

    def check(self, share: float) -> None:
        """Find all that is wrong."""
        if problem := presence_problem(self.folder, self.entry):
            self.problems.append(problem)
        try:
            whole = self.tar.is_file() and self.tar.stat().st_size == self.entry.num_bytes
            if whole and (found := sha256_of(self.tar)) != self.entry.sha256:
                self.problems.append(sha256_problem(self.tar, found, self.entry))
            self.check_indexes()
            if self.index is not None and self.tar.is_file():
                self._decode(self.index, share)
        except (OSError, tarfile.TarError) as error:
            self.problems.append(f"{self.tar} cannot be read: {error}")

    def check_indexes(self) -> None:
        """Compare both indexes with the manifest and with the tar's headers."""
        file = self.folder / self.entry.index
        try:
            raw = file.read_bytes()
            self.index = check_index(raw, self.entry, self.manifest.num_classes, str(file))
        except FileNotFoundError:
            if not self.problems:
                self.problems.append(f"{file} is missing")
        except ShardError as error:
            self.problems.append(str(error))
        dali = self.folder / self.entry.dali_index
        if not dali.is_file():
            self.problems.append(f"{dali} is missing: mend it with --repair-index")
        elif sha256_of(dali) != self.entry.dali_index_sha256:
            self.problems.append(f"{dali} does not have the sha256 of its manifest")
        if self.index is not None and self.tar.is_file():
            self._compare(self.index, dali)

    def _compare(self, index: Index, dali: Path) -> None:
        """Compare an index with what the tar holds."""
        samples = [index.sample(row) for row in range(len(index))]
        expected = [packed_members(sample) for sample in samples]
        if dali.is_file() and dali.read_bytes() != dali_index(expected).encode():
            self.problems.append(f"{dali} does not fit {self.entry.index}")
        wrong: list[str] = []
        with self.tar.open("rb") as stream:
            found = list(members(stream, wrong))
            wrong += [f"{m.name} {m.problem}" for m in found if m.problem]
            wrong += _differences([m for sample in expected for m in sample], found)
            for sample, parts in zip(samples, expected, strict=True):
                if sample.label is not None:
                    stream.seek(parts[1][1])
                    if (text := stream.read(parts[1][2])) != str(sample.label).encode():
                        wrong.append(f"{parts[1][3]} holds {text!r}, the index says {sample.label}")
        self.num_samples = len(samples)
        self._check_keys(index)
        self._add(f"{self.tar} does not fit {self.entry.index}", wrong)

    def _check_keys(self, index: Index) -> None:
        """Check that keys are numbers that count up."""
        if not all(key.isascii() and key.isdigit() and len(key) < 19 for key in index.keys):
            self._add(str(self.folder / self.entry.index), ["keys are no numbers"])
        elif index.keys:
            numbers = np.array(index.keys, np.int64)
            if (np.diff(numbers) <= 0).any():
                self._add(str(self.folder / self.entry.index), ["keys do not count up"])
            self.keys = int(numbers.min()), int(numbers.max())

    def _add(self, what: str, wrong: list[str]) -> None:
        """Add problems of one kind as one line."""
        if wrong:
            more = f"; and {len(wrong) - _NAMED} more" * (len(wrong) > _NAMED)
            self.problems.append(f"{what}: {'; '.join(wrong[:_NAMED])}{more}")

    def _decode(self, index: Index, share: float) -> None:
        """Decode some samples strictly."""
        wrong = []
        rows = _chosen(self.number, len(index), share)
        with self.tar.open("rb") as stream:
            for row in rows.tolist():
                sample = index.sample(row)
                stream.seek(sample.offset)
                try:
                    found = check_image(stream.read(sample.num_bytes))
                except DamagedImage as error:
                    wrong.append(f"key {sample.key} (from {sample.source}) {error}")
                    continue
                if found != (sample.extension, sample.height, sample.width):
                    wrong.append(
                        f"key {sample.key} (from {sample.source}) is {found}, the index says "
                        f"{(sample.extension, sample.height, sample.width)}"
                    )
        self.num_decoded = len(rows)
        self._add(f"{self.tar} has images that are damaged", wrong)


def _chosen(number: int, num_samples: int, share: float) -> Int64:
    """Return the rows of a shard to decode: the same at every call."""
    if share == 0 or num_samples == 0:
        return np.empty(0, np.int64)
    u = uniforms(7, number, np.arange(num_samples))
    return np.flatnonzero((u < share) | (np.arange(num_samples) == np.argmin(u)))


def _differences(expected: list[tuple[str, int, int, str]], found: list[Member]) -> Iterator[str]:
    """Yield where a tar's members are not the expected ones; nothing else may lie between them."""
    at = 0
    for number in range(max(len(expected), len(found))):
        want = expected[number][1:] if number < len(expected) else None
        have = found[number] if number < len(found) else None
        if want is None and have is not None:
            yield f"it has {have.name} that the index does not list"
        elif want is not None and have is None:
            yield f"it has no {want[2]}"
        elif want and have and want != (have.offset, have.num_bytes, have.name):
            place = f"{have.name} of {have.num_bytes} bytes at {have.offset}"
            yield f"it has {place}, the index says {want[2]} of {want[1]} at {want[0]}"
        if have is not None:
            if have.offset != at + BLOCK:
                yield f"something else stands before {have.name}"
            at = have.offset + -(-have.num_bytes // BLOCK) * BLOCK


@dataclass
class RepairReport:
    """What a repair did.

    Attributes:
        files: Indexes that were written again.
        num_lost: Samples whose source nobody knows any more.
        digest_changed: Whether the set has another digest now: runs cannot go on with it.
    """

    files: list[str] = field(default_factory=list)
    num_lost: int = 0
    digest_changed: bool = False


def repair_indexes(
    folder: str | Path,
    *,
    on_start: Progress = lambda _: None,
    on_bytes: Progress = lambda _: None,
) -> RepairReport:
    """Write missing or damaged indexes again, from tars that still have their sha256.

    The manifest is written last. Where the source of a sample can be read from the old index it is
    kept, elsewhere it is "".

    Args:
        folder: A packed set.
        on_start: Called with the bytes of all tars.
        on_bytes: Called with the bytes of each tar when it is done.

    Raises:
        ShardError: If a tar that needs an index is not as it was packed; the others are mended.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    on_start(sum(shard.num_bytes for shard in manifest.shards))
    report, entries, refused = RepairReport(), list(manifest.shards), []
    for number, entry in enumerate(manifest.shards):
        try:
            entries[number] = _repair(folder, manifest, number, report)
        except ShardError as error:
            refused.append(str(error))
        on_bytes(entry.num_bytes)
    if entries != manifest.shards:
        report.digest_changed = True
        shards = [
            {**old, **asdict(new)}
            for old, new in zip(manifest.fields["shards"], entries, strict=True)
        ]
        write_json(folder / MANIFEST, {**manifest.fields, "shards": shards})
    if refused:
        raise ShardError("an index can only be made again from a whole tar:\n" + "\n".join(refused))
    return report


def _repair(folder: Path, manifest: Manifest, number: int, report: RepairReport) -> ShardEntry:
    """Mend one shard's indexes if they need it; return its entry for the manifest."""
    shard = _Shard(folder, manifest, number)
    entry, tar = shard.entry, shard.tar
    try:
        shard.check_indexes()
        if not shard.problems:
            return entry
        if (found := sha256_of(tar)) != entry.sha256:
            raise ShardError(sha256_problem(tar, found, entry))
        known = _known_sources(folder / entry.index)
        with tar.open("rb") as stream:
            problems: list[str] = []
            grouped = groupby(list(members(stream, problems)), key=lambda member: member.key)
            samples = [_sample(stream, list(group), known.get(key, "")) for key, group in grouped]
    except OSError as error:
        raise ShardError(f"{tar} cannot be read: {error}.") from error
    except (ValueError, tarfile.TarError) as error:
        raise ShardError(f"{tar} holds something else than samples: {error}.") from error
    most = max((-1 if sample.label is None else sample.label for sample in samples), default=-1)
    if problems or len(samples) != entry.num_samples or most >= manifest.num_classes:
        raise ShardError(
            f"{tar} holds {len(samples)} samples with labels up to {most}; the manifest "
            f"says {entry.num_samples} and {manifest.num_classes} classes. {'; '.join(problems)}"
        )
    index = "".join(sample.line() for sample in samples).encode()
    dali = dali_index(map(packed_members, samples)).encode()
    write_shared(folder / entry.index, index)
    write_shared(folder / entry.dali_index, dali)
    report.files += [entry.index, entry.dali_index]
    report.num_lost += sum(not sample.source for sample in samples)
    return replace(
        entry,
        index_sha256=hashlib.sha256(index).hexdigest(),
        dali_index_sha256=hashlib.sha256(dali).hexdigest(),
    )


def _sample(stream: BinaryIO, group: list[Member], source: str) -> Sample:
    """Describe a sample by what the tar holds of it; raise ValueError if that is no sample."""
    image, *others = group
    if image.extension not in IMAGES or [m.extension for m in others] not in ([], ["cls"]):
        raise ValueError(f"{image.key} has {', '.join(m.extension for m in group)}")
    stream.seek(image.offset)
    extension, height, width = check_image(stream.read(image.num_bytes))
    label = None
    if others:
        stream.seek(others[0].offset)
        label = int(stream.read(others[0].num_bytes))
    place = (image.offset, image.num_bytes)
    return Sample(image.key, extension, *place, height, width, label, source)


def _known_sources(file: Path) -> dict[str, str]:
    """Return what can still be read of an index: the sources of keys."""
    known: dict[str, str] = {}
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        return known
    for line in lines:
        try:
            fields = json.loads(line)
            key, source = fields["key"], fields["source"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(key, str) and isinstance(source, str):
            known[key] = source
    return known
