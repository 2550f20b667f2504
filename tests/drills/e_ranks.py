"""E: ranks, signals, hosts. Dead, frozen, stalled, told to stop, orphaned, cut off."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import two_hosts
from drill import ROOT, Cells, Drill
from forks import Ranks, outcome, train

from fastclr import checkpointing
from fastclr.config import EvaluationConfig, FaultsConfig
from fastclr.evaluation import online
from pipelines.loader import Loader

EVER = 10**6
NOTICED_SECONDS = 15.0  # from a death, or from what a watchdog allows
LEFT_SECONDS = 15.0  # from a signal


def told_to_stop(cells: Cells) -> None:
    """E1: SIGTERM to one rank or all, at instants drawn from a whole run, until it is done."""
    count = 25 if cells.is_long else 6
    for ranks, stage in (1, 0), (2, 1):
        with cells.cell(f"{ranks} ranks"):
            cells.notes.append(_random_instants(cells.folder, ranks, stage, count, cells.generator))
        cells.num_cells += count - 1
    with cells.cell("before the first step"):
        run = Ranks(cells.folder, 1, partial(train, cells.folder, cells.folder / "start"))
        _wait_for_handlers(run)
        run.signal(signal.SIGTERM)
        _ended(run)
        assert run.codes == [75] and _last_step(cells.folder / "start") == 0, run.said()
    with cells.cell("while it waits for data that does not come"):
        _in_a_wait(cells.folder)


def _random_instants(
    folder: Path, ranks: int, stage: int, count: int, generator: random.Random
) -> str:
    """Send SIGTERM until so many starts were stopped; return what was seen."""
    started = time.monotonic()
    whole = Ranks(folder, ranks, partial(train, folder, folder / f"whole{ranks}", stage))
    assert whole.wait() and not any(whole.codes), whole.said()
    duration = time.monotonic() - started
    expected = outcome(folder / f"whole{ranks}")
    saved, slowest, run_dir = 0, 0.0, folder / f"stopped{ranks}"
    while saved < count:
        run = Ranks(folder, ranks, partial(train, folder, run_dir, stage))
        if not run.wait(generator.uniform(0, duration)):
            _wait_for_handlers(run)
            run.signal(signal.SIGTERM, *generator.choice([(), (0,), (ranks - 1,)]))
            slowest = max(slowest, _ended(run))
        if any(run.codes):
            assert set(run.codes) == {75}, (run.codes, [run.said(r) for r in range(ranks)])
            step = _last_step(run_dir)
            assert f"after step {step}, which is saved" in run.said(), run.said()
            saved += 1
            continue
        assert outcome(run_dir) == expected, "the end is another"
        shutil.rmtree(run_dir)
    return f"{ranks} ranks: {saved} times 75, in {slowest:.1f} s at most"


def _in_a_wait(folder: Path) -> None:
    make = Loader.make_views

    def stalls(self: Loader, epoch: int, positions: Any, sample_ids: Any) -> Any:
        if positions.min() >= 48:
            time.sleep(EVER)
        return make(self, epoch, positions, sample_ids)

    run_dir = folder / "wait"
    with mock.patch.object(Loader, "make_views", stalls):
        run = Ranks(folder, 2, partial(train, folder, run_dir, epochs=EVER))
    run.wait_for(run_dir / "checkpoints/step-0000002")
    time.sleep(1)
    run.signal(signal.SIGTERM)
    _ended(run)
    assert run.codes == [75, 75] and _last_step(run_dir) == 3, (run.codes, run.said())


def more_than_once(cells: Cells) -> None:
    """E3: a second signal ends it at once, an echo does not; a save is finished; Ctrl-C."""
    with cells.cell("while it saves"):
        _in_a_save(cells.folder)
    with cells.cell("twice, and an echo"):
        _twice(cells.folder)
    for number, code in ((signal.SIGUSR1, 75), (signal.SIGINT, 130)):
        with cells.cell(number.name):
            run_dir = cells.folder / number.name
            run = Ranks(cells.folder, 1, partial(train, cells.folder, run_dir, epochs=EVER))
            run.wait_for(run_dir / "checkpoints/latest")
            run.signal(number)
            _ended(run)
            assert run.codes == [code] and number.name in run.said(), (run.codes, run.said())
            assert f"after step {_last_step(run_dir)}" in run.said()


def _in_a_save(folder: Path) -> None:
    run_dir = folder / "save"
    with mock.patch.object(checkpointing, "sync", lambda _: time.sleep(0.3)):
        run = Ranks(folder, 1, partial(train, folder, run_dir, epochs=EVER))
    run.wait_for(run_dir / "checkpoints/.step-0000002.1.partial/model.safetensors")
    run.signal(signal.SIGTERM)
    _ended(run)
    assert run.codes == [75] and _last_step(run_dir) == 2, (run.codes, run.said())


def _twice(folder: Path) -> None:
    run_dir, scored = folder / "twice", EvaluationConfig(test=str(folder / "train"))
    evaluation = mock.Mock()
    evaluation.check.return_value = None
    evaluation.side_effect = lambda _: time.sleep(EVER)
    with mock.patch.object(online, "OnlineEvaluation", return_value=evaluation):
        work = partial(train, folder, run_dir, checkpoint_every=2, evaluation=scored)
        run = Ranks(folder, 1, work)
    run.wait_for(run_dir / "checkpoints/step-0000004")
    time.sleep(1)
    run.signal(signal.SIGTERM)
    time.sleep(0.2)
    run.signal(signal.SIGTERM)  # as a launcher passes it on
    assert not run.wait(2.5), "an echo was taken for a second wish"
    run.signal(signal.SIGTERM)
    assert run.wait(5) and run.codes == [143], run.codes
    assert _last_step(run_dir) == 4


def a_killed_rank(cells: Cells) -> None:
    """E4: the others notice, name what they know, and leave with 76; started again, it goes on."""
    folder = cells.folder
    whole = Ranks(folder, 2, partial(train, folder, folder / "whole2"))
    assert whole.wait() and not any(whole.codes), whole.said()
    moments = ("step-0000002", "step-0000006")
    for victim in (0, 1):  # in the short tier each dies once
        for moment in moments if cells.is_long else moments[victim:][:1]:
            with cells.cell(f"rank {victim}, {moment}"):
                run_dir = folder / f"killed{victim}{moment}"
                slow = mock.patch.object(checkpointing, "sync", lambda _: time.sleep(0.1))
                with slow:
                    run = Ranks(folder, 2, partial(train, folder, run_dir))
                run.wait_for(run_dir / "checkpoints" / moment)
                run.signal(signal.SIGKILL, victim)
                started = time.monotonic()
                assert run.wait(NOTICED_SECONDS), run.said(1 - victim)
                cells.notes[:] = [
                    f"noticed in {max(time.monotonic() - started, _worst(cells)):.1f} s"
                ]
                other = run.said(1 - victim)
                assert run.codes[1 - victim] == 76, (run.codes, other)
                assert "another rank is gone" in other, other
                again = Ranks(folder, 2, partial(train, folder, run_dir))
                assert again.wait() and again.codes == [0, 0], again.said()
                assert outcome(run_dir) == outcome(folder / "whole2")


def _worst(cells: Cells) -> float:
    return float(cells.notes[0].split()[-2]) if cells.notes else 0.0


def a_frozen_rank(cells: Cells) -> None:
    """E5: the watchdog names where everybody was, though the rank that is frozen cannot."""
    for victim in (0, 1):
        with cells.cell(f"rank {victim}"):
            run_dir = cells.folder / f"frozen{victim}"
            faults = FaultsConfig(watchdog_seconds=4)
            work = partial(train, cells.folder, run_dir, epochs=EVER, faults=faults)
            run = Ranks(cells.folder, 2, work)
            run.wait_for(run_dir / "checkpoints/latest")
            run.signal(signal.SIGSTOP, victim)
            started = time.monotonic()
            while run.codes[1 - victim] is None:
                assert time.monotonic() - started < 4 + NOTICED_SECONDS, run.said(1 - victim)
                run.wait(0.1)
            cells.notes.append(f"named in {time.monotonic() - started:.1f} s with 4 allowed")
            other = run.said(1 - victim)
            named = f"rank {victim}" in other and ("s ago" in other or "does not answer" in other)
            assert run.codes[1 - victim] == 76 and named, (run.codes, other)
            run.kill()
    with cells.cell("data that does not come"):
        _a_stalled_loader(cells.folder)


def _a_stalled_loader(folder: Path) -> None:
    make = Loader.make_views

    def stalls(self: Loader, epoch: int, positions: Any, sample_ids: Any) -> Any:
        if positions.min() >= 40 and self.world.rank == 1:
            time.sleep(EVER)
        return make(self, epoch, positions, sample_ids)

    faults, run_dir = FaultsConfig(watchdog_seconds=3), folder / "stalled"
    with mock.patch.object(Loader, "make_views", stalls):
        run = Ranks(folder, 2, partial(train, folder, run_dir, epochs=EVER, faults=faults))
    assert run.wait(30 + NOTICED_SECONDS), run.said(1)
    assert set(run.codes) == {76}, (run.codes, run.said(0), run.said(1))
    text = run.said(0) + run.said(1)
    assert "rank 1 on" in text and "in phase 'data' after step 2" in text, text
    assert "stalls" in (run_dir / "stacks-rank1.txt").read_text()


def a_broken_loader(cells: Cells) -> None:
    """E7: what ends a loader's thread or its process is told by all ranks."""
    make, go_through = Loader.make_views, Loader.__iter__

    def memory() -> None:
        raise MemoryError("no room for the views")

    ends = {
        "no memory": (memory, 1, "no room for the views"),
        "exit 0": (lambda: os._exit(0), 76, "another rank is gone"),
        "a segmentation fault": (lambda: os.kill(os.getpid(), signal.SIGSEGV), 76, "is gone"),
        "a kill": (lambda: os.kill(os.getpid(), signal.SIGKILL), 76, "is gone"),
        "an early end": ("end", 1, "the loader ended"),
    }
    for name, (end, code, said) in ends.items():
        with cells.cell(name):

            def breaks(self: Loader, epoch: int, positions: Any, ids: Any, end: Any = end) -> Any:
                if positions.min() >= 40 and self.world.rank == 1 and callable(end):
                    end()
                return make(self, epoch, positions, ids)

            def ends_early(self: Loader, end: Any = end) -> Any:
                for number, batch in enumerate(go_through(self)):
                    if number == 3 and end == "end" and self.world.rank == 1:
                        return
                    yield batch

            with (
                mock.patch.object(Loader, "make_views", breaks),
                mock.patch.object(Loader, "__iter__", ends_early),
            ):
                run = Ranks(cells.folder, 2, partial(train, cells.folder, cells.folder / name))
            started = time.monotonic()
            assert run.wait(30), run.said()
            assert time.monotonic() - started < 30
            assert run.codes[0] == code, (run.codes, run.said())
            assert said in run.said(), run.said()


def no_orphans(cells: Cells) -> None:
    """E8: kill -9 to each launcher; soon no process of its job lives, and no file changes."""
    flags = (
        "--recipe demo --global-batch-size 16 --epochs 1000 --checkpoint-every 5 --views.size 16 "
        "--encoder.width 0.125 --encoder.stem small_stride2 --head.output-dim 16"
    ).split()
    script = ["fastclr/train.py", "--ds-config", "fastclr/recipes/fp32.json", *flags]
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    launchers = {
        "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", "29713"],
        "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", "29714"],
    }
    for name, command in list(launchers.items())[: 2 if cells.is_long else 1]:
        with cells.cell(name):
            run_dir = cells.folder / name
            data = ["--data.train", str(cells.folder / "train"), "--run-dir", str(run_dir)]
            log = (cells.folder / f"{name}.txt").open("w")
            launcher = subprocess.Popen([*command, *script, *data], cwd=ROOT, env=environ,
                                        stdout=log, stderr=log)  # fmt: skip
            try:
                deadline = time.monotonic() + 90
                while not (run_dir / "checkpoints/latest").exists():
                    text = (cells.folder / f"{name}.txt").read_text()
                    assert launcher.poll() is None and time.monotonic() < deadline, text[-2000:]
                    time.sleep(0.02)
                family = psutil.Process(launcher.pid).children(recursive=True)
                assert len(family) >= 2
            finally:
                launcher.kill()
                launcher.wait()
            started = time.monotonic()
            while living := [p for p in family if _lives(p)]:
                assert time.monotonic() - started < 10, living
                time.sleep(0.05)
            cells.notes.append(f"{name}: {len(family)} ended in {time.monotonic() - started:.1f} s")
            before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
            time.sleep(2)
            assert before == {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
            assert checkpointing.latest(run_dir / "checkpoints") is not None


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def a_pulled_cable(cells: Cells) -> None:
    """E9: two hosts; the cable is pulled and plugged in again."""
    two_hosts.try_all(cells, two_hosts.phases(cells.folder, cells.is_long))


def a_watched_run(cells: Cells) -> None:
    """E11: online evaluation changes no bit, and the best checkpoint is kept; killed, gone on."""
    folder, run_dir = cells.folder, cells.folder / "watched"
    watched = EvaluationConfig(test=str(folder / "train"))
    work = partial(train, folder, run_dir, stage=3, evaluation=watched, keep_checkpoints=1)
    run = Ranks(folder, 2, work)
    run.wait_for(run_dir / "checkpoints/step-0000008")
    run.kill()
    run = Ranks(folder, 2, work)
    assert run.wait() and not any(run.codes), run.said()
    plain = Ranks(folder, 2, partial(train, folder, folder / "plain", stage=3))
    assert plain.wait(), plain.said()
    cells.check("the same end", outcome(run_dir) == outcome(folder / "plain"))
    with cells.cell("best and last"):
        rows = [json.loads(line) for line in (run_dir / "evaluations.jsonl").open()]
        assert [row["step"] for row in rows] == [5, 10, 15]
        best = max(rows, key=lambda row: row["knn_top1"])
        names = sorted({f"step-{step:07d}" for step in (best["step"], 15)})
        found = checkpointing.list_checkpoints(run_dir / "checkpoints")
        assert [p.name for p in found] == names
        assert json.loads((run_dir / "checkpoints/best").read_text()) == f"step-{best['step']:07d}"
        summary = json.loads((run_dir / "summary.json").read_text())
        assert summary["evaluation_seconds"] > 0 and summary["checkpoint_seconds"] > 0


def _last_step(run_dir: Path) -> int:
    checkpoint = checkpointing.latest(run_dir / "checkpoints")
    assert checkpoint is not None, "nothing was saved"
    return checkpointing.read_facts(checkpoint)["step"]


def _ended(run: Ranks) -> float:
    """Wait for the end after a signal; return how long it took."""
    started = time.monotonic()
    assert run.wait(LEFT_SECONDS), f"{run.codes}: {[run.said(r) for r in range(len(run.ids))]}"
    return time.monotonic() - started


def _wait_for_handlers(run: Ranks) -> None:
    """Wait until every rank catches SIGTERM: a process that has just begun cannot."""
    bit = 1 << (signal.SIGTERM - 1)
    for rank, child in enumerate(run.ids):
        while run.codes[rank] is None:
            status = Path(f"/proc/{child}/status").read_text()
            caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
            if int(caught.split()[1], 16) & bit or "State:\tZ" in status:
                break
            time.sleep(0.001)


DRILLS = {
    "E1": Drill(
        "SIGTERM at random instants: saved on all ranks, 75 in 15 s, gone on exactly",
        told_to_stop,
        240,
        600,
    ),
    "E3": Drill(
        "signals twice, in a save, Ctrl-C: a whole checkpoint, the second ends it in 5 s",
        more_than_once,
        90,
    ),
    "E4": Drill(
        "kill -9 to a rank: the others 76 in 15 s, named; started again it goes on",
        a_killed_rank,
        150,
    ),
    "E5": Drill(
        "a frozen rank, data that does not come: 76, rank and phase named, stacks written",
        a_frozen_rank,
        120,
    ),
    "E7": Drill("a loader out of memory, ended, crashed: told by all ranks", a_broken_loader, 120),
    "E8": Drill(
        "kill -9 to the launcher: in 10 s nothing of its job lives or writes", no_orphans, 240
    ),
    "E9": Drill(
        "two hosts, the cable pulled: both 76; plugged in, gone on exactly", a_pulled_cable, 300
    ),
    "E11": Drill(
        "evaluated while it trains, killed, gone on: no bit changed, best and last kept",
        a_watched_run,
        90,
        is_long_only=True,  # the suite has each part of it
    ),
}
