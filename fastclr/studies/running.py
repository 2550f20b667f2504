"""Runs a study: what is not done yet, one run after the other, a row as soon as one is done."""

from __future__ import annotations

import fcntl
import gc
import json
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastclr.config import ConfigError
from fastclr.engine import device_of, name_of
from fastclr.facts import hardware, now, versions
from fastclr.files import write_json
from fastclr.interruption import Interruption, Preempted
from fastclr.studies.images import StudyImages
from fastclr.studies.scales import Scale
from fastclr.studies.study import Run, Study
from fastclr.studies.work import WORKS, Job
from fastclr.world import World

JSON = dict[str, Any]
Say = Callable[[str], None]

_WAITING_SECONDS = 2.0  # between looks at what other processes do


def find_rows(results: Path) -> dict[str, Path]:
    """Return the files of all finished runs, of every study and scale, by digest.

    A run that two studies share is done once.
    """
    return {file.stem: file for file in sorted(results.glob("*/*/*.json")) if _is_row(file)}


def _is_row(file: Path) -> bool:
    return len(file.stem) == 16 and all(c in "0123456789abcdef" for c in file.stem)


def read_row(file: Path, run: Run, facts: Mapping[str, Any]) -> JSON:
    """Read a finished run's row.

    Raises:
        ConfigError: If it is damaged, or was made of something else than its name says.
    """
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
        key, _ = row["key"], row["scores"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"row {file} cannot be read ({error!r}): delete it, and its run is made anew."
        ) from error
    if key != run.key(facts):
        raise ConfigError(
            f"row {file} is of other settings than its name says: it was changed by hand. Delete "
            "it, and its run is made anew."
        )
    return row


def run_study(
    name: str,
    study: Study,
    scale_name: str,
    scale: Scale,
    images: StudyImages,
    *,
    num_seeds: int,
    results: Path,
    work_dir: Path,
    command: list[str],
    say: Say = print,
) -> list[JSON]:
    """Do the runs of a study that are not done yet; return the rows of all.

    Several processes may run studies side by side into the same folders, the same study too: a run
    is done by one of them. At SIGINT or SIGTERM the step, or the scoring, in progress is finished;
    a training that was begun is gone on with at the next start.

    Args:
        name: The study's name; its rows lie in ``results/NAME/SCALE``.
        study: The study.
        scale_name: Name of the scale.
        scale: The scale.
        images: Its images.
        num_seeds: Seeds, from 0.
        results: Folder of all rows.
        work_dir: Folder for checkpoints and logs of runs in progress.
        command: How the user started this.
        say: Told the progress.

    Raises:
        ConfigError: If a run cannot work, or more than one rank was started.
        Preempted: After SIGTERM or SIGUSR1.
        KeyboardInterrupt: After SIGINT.
    """
    if World.detect().num_ranks > 1:
        raise ConfigError(
            "a study's runs are of one rank each: start it without a launcher, several times side "
            "by side if there is room."
        )
    runs = study.runs(scale, num_seeds)
    folder = results / name / scale_name
    folder.mkdir(parents=True, exist_ok=True)
    work_dir.mkdir(parents=True, exist_ok=True)
    digests = {run: run.digest(images.facts) for run in runs}
    pending = [run for run in runs if digests[run] not in find_rows(results)]
    say(f"{name}: {len(runs)} runs, {len(runs) - len(pending)} of them done before")
    seconds: list[float] = []
    with Interruption() as interruption:
        while pending:
            before = len(pending)
            for run in list(pending):
                _leave(interruption)
                job = Job(run, images, scale, work_dir / digests[run], interruption)
                row = _do_once(job, folder / f"{digests[run]}.json", results, name, command)
                if row is None and digests[run] not in find_rows(results):
                    continue  # another process is doing it
                pending.remove(run)
                if row is not None:
                    seconds.append(row["seconds"])
                    left = len(pending) * sum(seconds) / len(seconds) / 60
                    say(
                        f"{name}, {len(pending)} to do: {run.arm}, seed {run.config.seed}, "
                        f"{_in_short(row)}, {row['seconds']:.0f} s; about {left:.0f} minutes left"
                    )
            if len(pending) == before:
                time.sleep(_WAITING_SECONDS)
    return rows_of(study, scale, images.facts, results, num_seeds)


@contextmanager
def _claim(file: Path) -> Iterator[bool]:
    """Lock a run against other processes, as long as this one lives; yield whether that worked."""
    with file.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except BlockingIOError:
            yield False


def _do_once(job: Job, file: Path, results: Path, name: str, command: list[str]) -> JSON | None:
    """Do a run and write its row, unless another process has done it or is doing it."""
    with _claim(job.run_dir.with_suffix(".lock")) as is_ours:
        if not is_ours or file.stem in find_rows(results):
            return None
        row = _do(job, name, command)
        write_json(file, row)
    shutil.rmtree(job.run_dir, ignore_errors=True)
    return row


def _do(job: Job, name: str, command: list[str]) -> JSON:
    """Do a run and return its row."""
    started = time.perf_counter()
    device = device_of(World())
    scores = WORKS[job.run.work](job)
    gc.collect()  # engines hold themselves
    return {
        "study": name,
        "arm": job.run.arm,
        "seed": job.run.config.seed,
        "scores": scores,
        "key": job.run.key(job.images.facts),
        "seconds": time.perf_counter() - started,
        "measured": now(),
        "hardware": hardware(name_of(device)),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "command": shlex.join(command),
    }


def _in_short(row: JSON) -> str:
    """Say the first score of a row."""
    scores = row["scores"]
    if "h" in scores:
        return f"h {scores['h']['linear']:.1%}, z {scores['z']['linear']:.1%}"
    layer, found = next(iter(scores.items()))
    return f"{layer} {next(iter(found.values())):.1%}"


def _leave(interruption: Interruption) -> None:
    """Stop between two runs, if a signal has come."""
    number = interruption.requested
    if number is None:
        return
    message = f"stopped by {number.name}; finished runs are kept: start the same command again"
    raise KeyboardInterrupt(message) if number == signal.SIGINT else Preempted(message)


def rows_of(
    study: Study, scale: Scale, facts: Mapping[str, Any], results: Path, num_seeds: int
) -> list[JSON]:
    """Return the rows that are there of a study's runs, without doing any."""
    known = find_rows(results)
    runs = [(run, known.get(run.digest(facts))) for run in study.runs(scale, num_seeds)]
    return [{**read_row(file, run, facts), "arm": run.arm} for run, file in runs if file]
