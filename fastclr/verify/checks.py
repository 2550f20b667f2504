"""Runs the checks on all ranks, and tells every rank what was found."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist

from fastclr.ds_config import JSON, read
from fastclr.facts import versions
from fastclr.verify import (
    batch_norm_check,
    data_checks,
    engine_check,
    loss_checks,
    resume_check,
)
from fastclr.verify.case import Case, NotApplicable, device_of, prepare
from fastclr.verify.ranks import Talk, join
from fastclr.verify.rows import Row, Status
from fastclr.world import World

Found = dict[str, Any]  # what JSON can hold


@dataclass(frozen=True)
class Check:
    """A part of what a run relies on.

    Attributes:
        measure: Called on every rank; returns what this rank found.
        judge: Called on rank 0 with what all ranks found; yields rows.
        what: In a word or two, for the row of a check that broke.
        in_step: Whether ranks wait for each other in it.
    """

    measure: Callable[[Case], Found]
    judge: Callable[[Case, list[Found]], Iterable[Row]]
    what: str
    in_step: bool = True


CHECKS = {
    "loss": Check(loss_checks.measure, loss_checks.judge, "losses over all ranks"),
    "BatchNorm": Check(batch_norm_check.measure, batch_norm_check.judge, "over all ranks"),
    "engine": Check(engine_check.measure, engine_check.judge, "two steps of the trainer"),
    "order": Check(
        data_checks.measure_order, data_checks.judge_order, "which image when", in_step=False
    ),
    "views": Check(
        data_checks.measure_views, data_checks.judge_views, "numbers and pixels", in_step=False
    ),
    "resume": Check(resume_check.measure, resume_check.judge, "a run that stops and goes on"),
}


def verify(
    ds_config: JSON | str | Path,
    *,
    scratch: str | Path = "runs",
    patience_seconds: float = 120.0,
) -> list[Row]:
    """Compare what this machine computes under a DeepSpeed JSON with one process in float64.

    Every rank calls this, under any launcher or none; it joins the process group if the caller has
    not. Sizes are tiny: batch sizes of the JSON are not used, all else is.

    Args:
        ds_config: DeepSpeed JSON, as a path or loaded.
        scratch: Folder that all ranks see, as a run's; what is written there is removed.
        patience_seconds: How long a rank waits for another.

    Returns:
        All rows, the same on every rank.

    Raises:
        ConfigError: If a run under the JSON would be refused.
    """
    ds = ds_config if isinstance(ds_config, dict) else read(ds_config)
    world = World.detect()
    tiny, config = prepare(ds, world)
    device = device_of(world)
    talk = Talk(world, join(world, device, patience_seconds), patience_seconds)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # all is tiny, and ranks of a node would fight for its cores
    folder = Path(talk.from_main(lambda: _new_folder(Path(scratch))))
    case = Case(tiny, config, world, device, folder)
    try:
        return list(_rows(case, talk))
    finally:
        torch.set_num_threads(threads)
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _rows(case: Case, talk: Talk) -> Iterator[Row]:
    """Run all checks; where ranks have lost each other, only those that do not need the others."""
    broken = ""
    for name, check in CHECKS.items():
        if broken and check.in_step:
            note = f"the ranks lost each other in {broken!r}"
            yield Row(name, check.what, "not run", note=note)
            continue
        talk.answer(name, _outcome(case, check))
        rows, lost = talk.from_main(
            lambda name=name, check=check: _verdict(case, check, name, talk)
        )
        broken = broken or (name if lost else "")
        yield from (Row(**row) for row in rows)


def _outcome(case: Case, check: Check) -> dict[str, Any]:
    """Measure on this rank."""
    started = time.perf_counter()
    outcome: dict[str, Any] = {}
    try:
        # The trainer's progress is not what the user wants to read here.
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
            outcome["found"] = check.measure(case)
    except NotApplicable as reason:
        outcome["not applicable"] = str(reason)
    except Exception as error:
        outcome["problem"] = f"{type(error).__name__}: {error}"
        # At once: a process group may end this process, or that of rank 0, before the table.
        print(f"rank {case.world.rank}: {traceback.format_exc()}", file=sys.stderr, flush=True)
    return {**outcome, "seconds": time.perf_counter() - started}


def _verdict(case: Case, check: Check, name: str, talk: Talk) -> tuple[list[Any], bool]:
    """Judge what all ranks found, on rank 0; return rows, and whether ranks are out of step."""
    outcomes = talk.answers(name)
    ranks_by_problem: dict[str, list[int]] = {}
    for rank, outcome in enumerate(outcomes):
        if "problem" in outcome:
            ranks_by_problem.setdefault(outcome["problem"], []).append(rank)
    rows: list[Row] = []
    if ranks_by_problem:
        for problem, ranks in ranks_by_problem.items():
            who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks}"
            rows.append(Row(name, check.what, "FAIL", note=f"{who}: {problem}"))
    elif "not applicable" in outcomes[0]:
        rows.append(Row(name, check.what, "not applicable", note=outcomes[0]["not applicable"]))
    else:
        try:
            rows.extend(check.judge(case, [outcome["found"] for outcome in outcomes]))
        except Exception as error:  # what was found has not even the right shape
            traceback.print_exc()
            note = f"judging it failed: {type(error).__name__}: {error}"
            rows.append(Row(name, check.what, "FAIL", note=note))
    rows[0] = replace(rows[0], seconds=max(outcome["seconds"] for outcome in outcomes))
    # One error on all ranks left them where they were; any other, at different places.
    alike = list(map(len, ranks_by_problem.values())) == [len(outcomes)]
    return [asdict(row) for row in rows], check.in_step and bool(ranks_by_problem) and not alike


def _new_folder(scratch: Path) -> str:
    scratch.mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix=".verify-", dir=scratch.resolve())


def summary(ds_config: JSON | str | Path, rows: list[Row]) -> dict[str, Any]:
    """Say what was verified and how it went; after :func:`verify`."""
    ds = ds_config if isinstance(ds_config, dict) else read(ds_config)
    world = World.detect()
    tiny, config = prepare(ds, world)
    device = device_of(world)
    case = Case(tiny, config, world, device, Path())
    precision = str(case.autocast_dtype or case.dtype).removeprefix("torch.")
    return {
        "versions": versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "num_ranks": world.num_ranks,
        "backend": dist.get_backend(),
        "zero_stage": tiny.get("zero_optimization", {}).get("stage", 0),
        "precision": f"autocast {precision}" if case.autocast_dtype else precision,
        "accumulation": case.num_chunks,
        "counts": {s: sum(row.status == s for row in rows) for s in get_args(Status)},
    }
