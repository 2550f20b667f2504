"""The plan of a packing: which source image lies in which shard, on disk, made once.

Every shard can be packed from the plan alone, at any time, in any process, on any machine that sees
the work folder. That is what resuming and all executors rest on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from fastclr.config import ConfigError
from fastclr.files import sync, write_json
from pipelines.decode import DamagedImage
from pipelines.disk_sort import Row, sort_rows
from pipelines.order import hash64
from pipelines.sources import SourceImage, SourceOptions, list_source, sort_class_names
from pipelines.transform import Transform

Job = Callable[[str, int], int]  # a job of a work folder, by number
RunJobs = Callable[[Job, int], object]

PLAN = "plan.json"
_ENTRIES = "plan.jsonl"  # a line an image, in the order of packing
_BY_NAME = "names.jsonl"  # the same by name, while duplicates are looked for
_CHUNK = 4096  # entries at a time


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a shard set.

    Attributes:
        source: See :func:`pipelines.sources.list_source`.
        name: Prefix of the shards.
        options: How the source is read.
        samples_per_shard: Most images in one tar.
        shard_bytes: Most bytes of source images in one tar (one image may be more); None for any.
        seed: Seed of the order.
        transform: What is done to each image; None packs the bytes as they are.
        drop_duplicates: Whether of images with equal bytes only the first by name is packed.
    """

    source: str
    name: str
    options: SourceOptions = field(default_factory=SourceOptions)
    samples_per_shard: int = 4096
    shard_bytes: int | None = None
    seed: int = 0
    transform: Transform | None = None
    drop_duplicates: bool = False

    def __post_init__(self) -> None:
        for name in ("samples_per_shard", "shard_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: give 1 or more.")

    def source_name(self) -> str:
        """Return the source's last part: what a set may tell of where it came from."""
        return self.source.split("?")[0].rstrip("/").rsplit("/", 1)[-1].rsplit("@", 1)[-1]

    def command(self) -> str:
        """Return the command that packs the same bytes, without paths and machines."""
        name = shlex.quote(self.source_name())
        parts = ["fastclr shards", name, "--out", shlex.quote(self.name)]
        own = [(f.name, getattr(self, f.name), f.default) for f in fields(self)[3:6]]
        how = [(f.name, getattr(self.options, f.name), f.default) for f in fields(self.options)]
        new = [(*item, None) for item in asdict(self.transform).items()] if self.transform else []
        for name, value, default in own + how + new:
            flag = name.replace("_", "-")
            if isinstance(value, bool) and value != default:
                parts.append(f"--{flag}" if value else f"--no-{flag}")
            elif value != default:
                parts += [f"--{flag}", shlex.quote(str(value))]
        return " ".join(parts + ["--drop-duplicates"] * self.drop_duplicates)


@dataclass(frozen=True)
class Plan:
    """The finished plan.

    Attributes:
        settings: JSON of :class:`Settings`.
        num_images: Images to pack.
        num_duplicates: Images left out.
        class_names: In the order of the labels.
        listing: sha256 of the source's listing; None if the images were copied into the spool,
            which then is the source.
        shards: For each shard its number of images, the number of its first, and the place of its
            first line in the entries.
    """

    settings: dict[str, Any]
    num_images: int
    num_duplicates: int
    class_names: list[str]
    listing: str | None
    shards: list[tuple[int, int, int]]

    @classmethod
    def load(cls, work: Path) -> Plan:
        """Read the plan of a work folder."""
        return cls(**json.loads((work / PLAN).read_bytes()))

    def transform(self) -> Transform | None:
        """Return what is done to each image."""
        options = self.settings["transform"]
        return Transform(**options) if options else None

    def entries(self, work: Path, number: int) -> Iterator[tuple[SourceImage, str | None]]:
        """Yield the images of one shard, in order, with the sha256 that duplicates were told by."""
        count, _, at = self.shards[number]
        with (work / _ENTRIES).open("rb") as stream:
            stream.seek(at)
            for _ in range(count):
                *image, sha256 = json.loads(stream.readline())
                yield SourceImage(*image), sha256


def make_plan(settings: Settings, work: Path, run_jobs: RunJobs) -> Plan:
    """List a source and write the plan into the work folder; memory does not grow with the source.

    Args:
        settings: What to pack and how.
        work: Folder for the plan and for copies of what cannot be read in place (``spool``).
        run_jobs: Runs ``job(work, k)`` for k in [0, n), given the job and n.

    Raises:
        ConfigError: If the source is unusable or has no images.
    """
    listing = Listed(work / "spool")
    rows: Iterator[Row] = sort_rows(listing.rows(settings), work)
    num_duplicates = 0
    if settings.drop_duplicates:
        rows, num_duplicates = _without_duplicates(rows, work, run_jobs)
    shards = _write_entries(_shuffled(rows, settings.seed, work), settings, work)
    num_images = sum(count for count, _, _ in shards)
    if num_images == 0:
        raise ConfigError(f"source {settings.source} has no images: there is nothing to pack.")
    plan = Plan(
        asdict(settings),
        num_images,
        num_duplicates,
        listing.class_names(),
        listing.digest(),
        shards,
    )
    write_json(work / PLAN, asdict(plan))
    return Plan.load(work)


class Listed:
    """Lists a source, and knows afterwards its classes and a hash of it.

    Args:
        spool: Folder for copies.
    """

    def __init__(self, spool: Path) -> None:
        self._spool, self._spooled = spool, False
        self._seen: set[str] = set()
        self._stated: list[str] | None = None
        self._hash = hashlib.sha256()

    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield name, place in the listing, and the rest of each image."""
        self._spool.mkdir(exist_ok=True)
        inside = f"{self._spool}/"
        images = list_source(settings.source, settings.options, self._spool)
        for place, image in enumerate(images):
            if image.class_name is not None:
                self._seen.add(image.class_name)
            self._spooled = self._spooled or image.url.startswith(inside)
            rest = [image.class_name, _absolute(image.url), image.offset, image.num_bytes]
            self._hash.update(_line([image.name, *rest]))
            yield [image.name, place, *rest]
        self._stated = images.class_names

    def class_names(self) -> list[str]:
        """Return the classes in the order of their labels.

        Raises:
            ConfigError: If an image has a class that the source does not state.
        """
        if self._stated is None:
            return sort_class_names(self._seen)
        if unknown := sorted(self._seen - set(self._stated)):
            raise ConfigError(
                f"images have the class {unknown[0]!r}, which is none of the {len(self._stated)} "
                "that their source states: correct the one or the other."
            )
        return self._stated

    def digest(self) -> str | None:
        """Return the hash, or None if anything was copied."""
        return None if self._spooled else self._hash.hexdigest()


def _without_duplicates(
    rows: Iterable[Row], work: Path, run_jobs: RunJobs
) -> tuple[Iterator[Row], int]:
    """Hash every image and drop all but the first by name of those with equal bytes."""
    places, total = [0], 0
    with (work / _BY_NAME).open("wb") as stream:
        for total, row in enumerate(rows, 1):
            stream.write(_line(row))
            if total % _CHUNK == 0:
                places.append(stream.tell())
    write_json(work / "chunks.json", places)
    run_jobs(hash_images, len(places))

    def hashed() -> Iterator[Row]:
        """Yield hash, place by name, and the row."""
        place = 0
        for number in range(len(places)):
            digests = json.loads((work / f"hashes-{number}.json").read_bytes())
            for digest, row in zip(digests, _chunk(work, number), strict=True):
                yield [digest, place, row]
                place += 1

    # Written down, because the number of duplicates is needed as well.
    kept, firsts, before = 0, work / "firsts.jsonl", None
    with firsts.open("wb") as stream:
        for digest, place, row in sort_rows(hashed(), work):
            if digest != before:
                stream.write(
                    _line([place, [*row, None if digest.startswith("unread") else digest]])
                )
                kept += 1
            before = digest
    by_name = sort_rows(_rows(firsts), work)
    return (row for _, row in by_name), total - kept


def hash_images(work: str, number: int) -> int:
    """Write the sha256 of each image of a chunk by name; one that cannot be read is like no other.

    Returns:
        Images hashed.
    """
    digests = []
    for name, place, *rest in _chunk(Path(work), number):
        try:
            digest = hashlib.sha256(SourceImage(name, *rest).read()).hexdigest()
        except (OSError, DamagedImage):
            digest = f"unread {place}"
        digests.append(digest)
    write_json(Path(work) / f"hashes-{number}.json", digests)
    return len(digests)


def _rows(file: Path) -> Iterator[Row]:
    with file.open("rb") as stream:
        yield from map(json.loads, stream)


def _chunk(work: Path, number: int) -> Iterator[Row]:
    """Yield the rows of a chunk by name."""
    places = json.loads((work / "chunks.json").read_bytes())
    with (work / _BY_NAME).open("rb") as stream:
        stream.seek(places[number])
        yield from map(json.loads, itertools.islice(stream, _CHUNK))


def _shuffled(rows: Iterator[Row], seed: int, work: Path) -> Iterator[Row]:
    """Yield the rows in the order of ``order.permutation(n, seed, epoch=0)``."""

    def keyed() -> Iterator[Row]:
        place = 0
        while part := list(itertools.islice(rows, _CHUNK)):
            keys = hash64(seed, 0, np.arange(place, place + len(part))).tolist()
            for key, row in zip(keys, part, strict=True):
                yield [key, place, row]
                place += 1

    for _, _, row in sort_rows(keyed(), work):
        yield row


def _write_entries(
    shuffled: Iterator[Row], settings: Settings, work: Path
) -> list[tuple[int, int, int]]:
    """Write the entries, cut into shards."""
    shards: list[tuple[int, int, int]] = []
    count = first = at = filled = 0
    most, most_bytes = settings.samples_per_shard, settings.shard_bytes
    with (work / _ENTRIES).open("wb") as stream:
        for name, _, class_name, url, offset, num_bytes, *digest in shuffled:
            size = 0 if most_bytes is None else _size(url, num_bytes)
            if count and (count == most or (most_bytes is not None and filled + size > most_bytes)):
                shards.append((count, first, at))
                count, first, at, filled = 0, first + count, stream.tell(), 0
            stream.write(_line([name, class_name, url, offset, num_bytes, *(digest or [None])]))
            count, filled = count + 1, filled + size
    if count:
        shards.append((count, first, at))
    sync(work / _ENTRIES)
    return shards


def _size(url: str, num_bytes: int) -> int:
    """Return the bytes of an image; 0 for a local file that is not there, packing will say so."""
    if num_bytes >= 0:
        return num_bytes
    if "://" in url:
        raise ConfigError(
            "shard_bytes needs sizes that this source does not tell: use samples_per_shard."
        )
    try:
        return Path(url).stat().st_size
    except OSError:
        return 0


def _absolute(url: str) -> str:
    """Make a local path hold in any folder."""
    return url if url[:1] == "/" or "://" in url else str(Path(url).absolute())


def _line(row: Row) -> bytes:
    return (json.dumps(row) + "\n").encode("ascii")
