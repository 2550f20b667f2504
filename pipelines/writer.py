"""Pack images into a shard set that is either whole or not there.

A packing has three steps: the plan (:mod:`pipelines.plan`), the shards, each for itself
(:mod:`pipelines.packing`), and the manifest. All happen in a work folder beside the target.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastclr.config import ConfigError
from fastclr.files import sync, write_json
from pipelines.executors import EXECUTORS
from pipelines.packing import FACTS, SET, ShardFacts, facts_file, pack_shard, read_facts
from pipelines.plan import PLAN, Job, Listed, Plan, Settings, make_plan
from pipelines.shards import FORMAT, MANIFEST, VERSION, ShardError, ShardSet

_MAX_NAMED = 10  # damaged files named in an error
_ALONE = 1000  # images worth starting a process for
REJECTED = "rejected.jsonl"


def write_shards(
    source: str | Path,
    out: Path,
    *,
    samples_per_shard: int = 4096,
    seed: int = 0,
    num_workers: int = 0,
    on_start: Callable[[int], None] = lambda _: None,
    on_images: Callable[[int], None] = lambda _: None,
) -> ShardSet:
    """Pack a source as it is into a shard set, in an order shuffled by ``seed``.

    Every image is decoded once as a check; the bytes are packed as they are. The same source and
    seed give the same bytes. Nothing appears under ``out`` before everything is written.

    Args:
        source: See :func:`pipelines.sources.list_source`.
        out: Folder to make, e.g. ``data/train``; its name becomes the shards' prefix.
        samples_per_shard: Images in one tar.
        seed: Seed of the order.
        num_workers: Processes that read and check; 0 for one a core where it is worth it.
        on_start: Called with the number of images.
        on_images: Called with the number of images after each shard.

    Returns:
        The finished shard set, opened.

    Raises:
        ConfigError: If the source or target is unusable.
        ShardError: If any file is no image; all are counted, the first ones named.
    """
    settings = Settings(str(source), out.name, samples_per_shard=samples_per_shard, seed=seed)
    packing = Packing(settings, out, workers=num_workers, on_start=on_start, on_images=on_images)
    packing.run()
    return ShardSet.open(out)


@dataclass(frozen=True)
class Summary:
    """What was packed: images, classes, and what was left out."""

    num_samples: int
    num_classes: int
    num_rejected: int
    num_duplicates: int
    num_shards: int


@dataclass(frozen=True)
class Packing:
    """A packing that can be interrupted and divided.

    Attributes:
        settings: What decides the bytes.
        out: Folder to make.
        max_rejected: Damaged images that are put up with: a number, or below 1 a part of all.
        executor: Name in ``EXECUTORS``.
        workers: Processes; 0 for one a core where it is worth it.
        on_start: Called with the number of images.
        on_images: Called with the number of images after each shard.
    """

    settings: Settings
    out: Path
    max_rejected: float = 0
    executor: str = "processes"
    workers: int = 0
    on_start: Callable[[int], None] = lambda _: None
    on_images: Callable[[int], None] = lambda _: None

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise ConfigError(f"executor is {self.executor!r}: choose from {', '.join(EXECUTORS)}.")
        if not self.max_rejected >= 0 or (self.max_rejected > 1 and self.max_rejected % 1):
            raise ConfigError(
                f"max_rejected is {self.max_rejected}: give a number of images, or a part of all "
                "of them below 1."
            )

    @property
    def work(self) -> Path:
        """The work folder: beside the target, so that a rename publishes it."""
        out = self.out.absolute()
        return out.with_name(f".{out.name}.partial")

    def run(self, *, resume: bool = False) -> Summary:
        """Plan, pack and publish.

        Whatever ends it before the first shard leaves nothing. Later the work folder stays, and
        ``resume`` goes on from there.

        Raises:
            ConfigError: If the target or the source is unusable, or a work folder is left and
                ``resume`` is not set.
            ShardError: If more images are damaged than ``max_rejected``; nothing is left.
            OSError: If storage or a worker fails.
        """
        if resume and (finished := self._published()):
            return finished
        refuse_taken(self.out)
        left = self.work.exists()
        if left and not resume:
            raise ConfigError(
                f"{self.work} is left from a packing that was interrupted: go on with --resume, "
                f"or start anew after `rm -r {self.work}`."
            )
        self._make_folders()
        with _lock(self.work, wait=False):
            try:
                plan = self._plan(check_source=True)
                self._pack(plan, range(len(plan.shards)))
                return self._merge(plan)
            except ShardError:
                shutil.rmtree(self.work)
                raise
            except BaseException as error:
                if not left and not any(self.work.glob(f"{FACTS}/*.json")):
                    shutil.rmtree(self.work, ignore_errors=True)
                    raise
                if (told := self._told(error)) is error:
                    raise
                raise told from error

    def run_task(self, task: int, num_tasks: int) -> int:
        """Pack the shards k with k mod ``num_tasks`` = ``task`` that are not there yet.

        Tasks share the work folder; the first one makes the plan. :meth:`merge` ends it.

        Returns:
            Images packed.
        """
        if not 0 <= task < num_tasks:
            raise ConfigError(f"task is {task}/{num_tasks}: tasks count from 0, as in 0/4 to 3/4.")
        refuse_taken(self.out)
        self._make_folders()
        with _lock(self.work, wait=True):  # others wait for the plan
            plan = self._plan(check_source=False)
        return self._pack(plan, range(task, len(plan.shards), num_tasks))

    def merge(self) -> Summary:
        """Publish what the tasks have packed.

        Raises:
            ConfigError: If shards are missing.
            ShardError: If more images are damaged than ``max_rejected``; the work folder stays.
        """
        if finished := self._published():
            return finished
        refuse_taken(self.out)
        if not (self.work / PLAN).exists():
            raise ConfigError(f"{self.work} has no plan: run the tasks first, as in --task 0/4.")
        plan = self._plan(check_source=False)
        if missing := self._missing(plan, range(len(plan.shards))):
            named = ", ".join(map(str, missing[:_MAX_NAMED])) + ", ..." * (
                len(missing) > _MAX_NAMED
            )
            raise ConfigError(
                f"{len(missing)} of {len(plan.shards)} shards are not packed ({named}): run their "
                "tasks again (task k of n packs the shards k, k + n, ...), then merge."
            )
        return self._merge(plan)

    def _make_folders(self) -> None:
        for folder in (self.work / SET, self.work / FACTS):
            folder.mkdir(parents=True, exist_ok=True)

    def _plan(self, *, check_source: bool) -> Plan:
        """Make the plan, or take the one that is there if it is of the same settings."""
        if not (self.work / PLAN).exists():
            return make_plan(self.settings, self.work, lambda job, n: self._run(job, range(n)))
        plan = Plan.load(self.work)
        wanted = json.loads(json.dumps(asdict(self.settings)))
        if different := [k for k in wanted if plan.settings.get(k) != wanted[k]]:
            raise ConfigError(
                f"{self.work} was begun with other settings ("
                + ", ".join(f"{k}: {plan.settings.get(k)!r}, now {wanted[k]!r}" for k in different)
                + f"): repeat them, or start anew after `rm -r {self.work}`."
            )
        if check_source and plan.listing and self._listing() != plan.listing:
            raise ConfigError(
                f"source {self.settings.source_name()} lists other images than when {self.work} "
                f"was begun: bring it back, or start anew after `rm -r {self.work}`."
            )
        return plan

    def _listing(self) -> str | None:
        """Return the hash of the source as it is now."""
        with tempfile.TemporaryDirectory(dir=self.work, prefix="spool.") as spool:
            listing = Listed(Path(spool))
            for _ in listing.rows(self.settings):
                pass
            return listing.digest()

    def _missing(self, plan: Plan, numbers: Sequence[int]) -> list[int]:
        return [k for k in numbers if not facts_file(self.work, k).exists()]

    def _pack(self, plan: Plan, numbers: Sequence[int]) -> int:
        """Pack those of the shards that are not there yet."""
        missing = self._missing(plan, numbers)
        there = sum(plan.shards[k][0] for k in set(numbers) - set(missing))
        to_do = sum(plan.shards[k][0] for k in missing)
        self.on_start(there + to_do)
        self.on_images(there)
        self._run(pack_shard, missing, to_do)
        return there + to_do

    def _run(self, job: Job, numbers: Sequence[int], images: int | None = None) -> None:
        workers = self.workers or len(os.sched_getaffinity(0))
        if self.workers == 0 and images is not None:
            workers = min(workers, 1 + images // _ALONE)
        for count in EXECUTORS[self.executor](job, str(self.work), numbers, workers):
            if images is not None:
                self.on_images(count)

    def _facts(self, plan: Plan) -> Iterator[ShardFacts]:
        return (read_facts(self.work, k) for k in range(len(plan.shards)))

    def _merge(self, plan: Plan) -> Summary:
        """Write the list of what was rejected and the manifest, and publish."""
        num_rejected = sum(len(facts.rejected) for facts in self._facts(plan))
        self._refuse_rejected(plan, num_rejected)
        folder = self.work / SET
        if num_rejected:
            with (folder / REJECTED).open("w", encoding="ascii") as stream:
                for source, reason in self._rejected(plan):
                    stream.write(json.dumps({"source": source, "reason": reason}) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        manifest = _manifest(self.settings, plan, self._facts(plan), num_rejected)
        write_json(folder / MANIFEST, manifest)
        sync(folder)
        folder.replace(self.out)
        sync(self.out.absolute().parent)
        shutil.rmtree(self.work, ignore_errors=True)
        return _summary(manifest)

    def _rejected(self, plan: Plan) -> Iterator[tuple[str, str]]:
        return itertools.chain.from_iterable(facts.rejected for facts in self._facts(plan))

    def _refuse_rejected(self, plan: Plan, num_rejected: int) -> None:
        """Raise if more images are damaged than allowed, or all."""
        limit = self.max_rejected
        allowed = limit if limit >= 1 else limit * plan.num_images
        if num_rejected <= allowed and num_rejected < plan.num_images:
            return
        named = list(itertools.islice(self._rejected(plan), _MAX_NAMED))
        more = f"\n  ... and {num_rejected - len(named)} more" * (num_rejected > len(named))
        raise ShardError(
            f"{num_rejected} of {plan.num_images} files cannot be used, so nothing was written:\n"
            + "\n".join(f"  {source} {reason}" for source, reason in named)
            + more
            + "\nRemove or repair them and run again, or leave them out: fastclr shards "
            "--max-rejected."
        )

    def _published(self) -> Summary | None:
        """Return the summary if this very packing is finished; clear what a kill left behind."""
        try:
            manifest = json.loads((self.out / MANIFEST).read_bytes())
            if manifest["command"] != self.settings.command():
                return None
            summary = _summary(manifest)
        except (OSError, ValueError, TypeError, KeyError):
            return None
        shutil.rmtree(self.work, ignore_errors=True)
        return summary

    def _told(self, error: BaseException) -> BaseException:
        """Add to an error what can be done about it."""
        hint = (
            f"what is finished is kept in {self.work}: the same command with --resume goes on, "
            f"`rm -r {self.work}` gives it up"
        )
        if isinstance(error, KeyboardInterrupt):
            return KeyboardInterrupt(f"interrupted; {hint}")
        if isinstance(error, OSError) and error.errno is not None:
            return OSError(error.errno, f"{error.strerror} ({hint})", error.filename)
        return OSError(f"{error}; {hint}") if isinstance(error, OSError) else error


def _manifest(
    settings: Settings, plan: Plan, all_facts: Iterator[ShardFacts], num_rejected: int
) -> dict[str, Any]:
    """Put the facts of all shards together."""
    shards, num_pixels = [], 0
    sums = [[0] * 3, [0] * 3]
    for facts in all_facts:
        if facts.entry:
            shards.append(facts.entry)
        num_pixels += facts.num_pixels
        for total, part in zip(sums, (facts.pixel_sum, facts.pixel_square_sum), strict=True):
            total[:] = [a + b for a, b in zip(total, part, strict=True)]
    mean = [x / num_pixels for x in sums[0]]
    # In integers up to the last step: no cancellation, the same on every machine.
    spread = [num_pixels * q - x * x for x, q in zip(*sums, strict=True)]
    return {
        "format": FORMAT,
        "version": VERSION,
        "num_samples": plan.num_images - num_rejected,
        "class_names": plan.class_names,
        "seed": settings.seed,
        "source": settings.source_name(),
        "command": settings.command(),
        "transform": plan.settings["transform"],
        "channel_mean": [m / 255 for m in mean],
        "channel_std": [math.sqrt(s) / num_pixels / 255 for s in spread],
        "num_rejected": num_rejected,
        "num_duplicates": plan.num_duplicates,
        "shards": shards,
    }


def _summary(manifest: dict[str, Any]) -> Summary:
    return Summary(
        manifest["num_samples"],
        len(manifest["class_names"]),
        manifest["num_rejected"],
        manifest["num_duplicates"],
        len(manifest["shards"]),
    )


@contextmanager
def _lock(work: Path, *, wait: bool) -> Iterator[None]:
    """Hold a work folder alone; a process that ends in any way lets it go.

    Raises:
        ConfigError: If another process holds it and ``wait`` is not set.
    """
    with (work / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ConfigError(
                f"another packing is at work in {work}: wait for it, or stop it first."
            ) from None
        yield


def refuse_taken(out: Path) -> None:
    """Refuse a target that is there.

    Raises:
        ConfigError: If ``out`` exists and is not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"target {out} exists and is not empty: nothing is ever overwritten. Remove it or "
            "choose another --out."
        )


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes ``out`` if the block ends well, and vanishes if not.

    Raises:
        ConfigError: See :func:`refuse_taken`.
    """
    refuse_taken(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)
        folder.replace(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
