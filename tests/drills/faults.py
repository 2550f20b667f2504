"""Break a run in every way a rank, a loader or a number can break it; it must say what and leave.

python tests/drills/faults.py

One line a drill; exit 1 at the first that fails.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from forks import Ranks, losses, outcome, small_data, train

from fastclr import checkpointing
from fastclr.checkpointing import list_checkpoints, read_facts
from fastclr.config import EvaluationConfig, FaultsConfig
from fastclr.losses import NTXent
from fastclr.world import World
from pipelines.loader import Loader

EVER = 10**6
NOTICED_SECONDS = 15.0


def a_killed_rank(folder: Path) -> str:
    """The others notice, name what they know, and leave with 76."""
    slowest = 0.0
    for victim in (0, 1):
        run_dir = folder / f"killed{victim}"
        run = Ranks(folder, 2, partial(train, folder, run_dir, epochs=EVER))
        run.wait_for(run_dir / "checkpoints/latest")
        run.signal(signal.SIGKILL, victim)
        started = time.monotonic()
        assert run.wait(NOTICED_SECONDS), run.said(1 - victim)
        slowest = max(slowest, time.monotonic() - started)
        other = run.said(1 - victim)
        assert run.codes[1 - victim] == 76 and "another rank is gone" in other, (run.codes, other)
        assert checkpointing.latest(run_dir / "checkpoints") is not None
    return f"noticed in {slowest:.1f} s at most, exit 76"


def a_frozen_rank(folder: Path) -> str:
    """The watchdog names where everybody was, though the rank that is frozen cannot."""
    slowest = 0.0
    for victim in (0, 1):
        run_dir = folder / f"frozen{victim}"
        faults = FaultsConfig(watchdog_seconds=4)
        run = Ranks(folder, 2, partial(train, folder, run_dir, epochs=EVER, faults=faults))
        run.wait_for(run_dir / "checkpoints/latest")
        run.signal(signal.SIGSTOP, victim)
        started = time.monotonic()
        while run.codes[1 - victim] is None:
            assert time.monotonic() - started < 4 + NOTICED_SECONDS, run.said(1 - victim)
            run.wait(0.1)
        slowest = max(slowest, time.monotonic() - started)
        other = run.said(1 - victim)
        named = f"rank {victim}" in other and ("s ago" in other or "does not answer" in other)
        assert run.codes[1 - victim] == 76 and named, (run.codes, other)
        run.kill()
    return f"noticed in {slowest:.1f} s at most with 4 allowed, exit 76, the frozen rank named"


def a_stalled_loader(folder: Path) -> str:
    """The watchdog says that it is the data, on which rank, and where the threads were."""
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
    return "exit 76, rank, phase and stacks named"


@contextmanager
def spoiled(*steps: int, rank: int = 1) -> Iterator[None]:
    """Make the loss NaN at these calls, on one rank."""
    forward, calls = NTXent.forward, 0

    def spoils(self: NTXent, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = forward(self, *args, **kwargs)
        is_bad = calls in steps and World.detect().rank == rank
        return loss * float("nan") if is_bad else loss

    with mock.patch.object(NTXent, "forward", spoils):
        yield


def a_loss_that_is_nan(folder: Path) -> str:
    """All ranks stop before the update; the images are named; nothing of it is saved."""
    run_dir = folder / "nan"
    with spoiled(7):
        run = Ranks(folder, 2, partial(train, folder, run_dir, checkpoint_every=1))
    assert run.wait() and run.codes == [70, 70], (run.codes, run.said())
    assert "the loss of rank 1 is not finite at step 7" in run.said(0), run.said(0)
    assert [row[0] for row in losses(run_dir)] == list(range(1, 7))
    for rank in (0, 1):
        noted = json.loads((run_dir / f"non_finite/step-0000007-rank{rank}.json").read_text())
        assert len(set(noted["sample_ids"])) == 8
    # What was saved at step 6 goes on as if nothing had been.
    run = Ranks(folder, 2, partial(train, folder, run_dir, checkpoint_every=1))
    assert run.wait() and not any(run.codes), run.said()
    whole = Ranks(folder, 2, partial(train, folder, folder / "healthy", checkpoint_every=1))
    assert whole.wait() and outcome(run_dir) == outcome(folder / "healthy")
    return "both ranks 70, stopped before the update, 16 images named, gone on exactly"


def skipped_batches(folder: Path) -> str:
    """Where skipping is allowed, the step changes nothing; beyond the cap the run stops."""
    faults = FaultsConfig(non_finite="skip", most_skipped=2)
    run_dir = folder / "skipped"
    with spoiled(3, 8):
        run = Ranks(folder, 2, partial(train, folder, run_dir, stage=1, faults=faults))
    assert run.wait() and not any(run.codes), run.said()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["skipped_steps"], summary["steps"]) == (2, 15)
    assert [row[0] for row in losses(run_dir)] == [s for s in range(1, 16) if s not in (3, 8)]
    with spoiled(3, 8, 9):
        run = Ranks(folder, 2, partial(train, folder, folder / "over", stage=1, faults=faults))
    assert run.wait() and run.codes == [70, 70], (run.codes, run.said())
    return "2 skipped and counted, the third stops the run with 70"


def weights_that_are_nan(folder: Path) -> str:
    """No checkpoint ever holds them."""
    run_dir = folder / "weights"
    save = checkpointing.save

    def spoils(engine: Any, *args: Any, **kwargs: Any) -> Path:
        if args[1]["step"] == 4:
            weight = next(iter(engine.module.parameters())).data
            weight[(0,) * weight.ndim] = float("inf")
        return save(engine, *args, **kwargs)

    with mock.patch.object(checkpointing, "save", spoils):
        run = Ranks(folder, 2, partial(train, folder, run_dir))
    assert run.wait() and run.codes == [70, 70], (run.codes, run.said())
    assert "encoder.network.conv1.weight is not finite after step 4" in run.said(), run.said()
    assert [p.name for p in list_checkpoints(run_dir / "checkpoints")] == ["step-0000002"]
    return "70, the tensor named, the last checkpoint stands"


def damaged_checkpoints(folder: Path) -> str:
    """The newest whole one is gone on from, whatever the pointer says; a damaged one is named."""
    good = folder / "good"
    run = Ranks(folder, 1, partial(train, folder, good, epochs=2))
    assert run.wait() and not any(run.codes), run.said()
    expected = outcome(good)
    newest, before = list_checkpoints(good / "checkpoints")[::-1][:2]
    cells: dict[str, Callable[[Path], object]] = {
        "latest is empty": lambda c: (c / "latest").write_bytes(b""),
        "latest is NUL": lambda c: (c / "latest").write_bytes(bytes(20)),
        "latest is missing": lambda c: (c / "latest").unlink(),
        "latest names a missing one": lambda c: (c / "latest").write_text('"step-0000099"'),
        "latest names an older one": lambda c: (c / "latest").write_text(f'"{before.name}"'),
        "latest has CRLF": lambda c: (c / "latest").write_bytes(f'"{newest.name}"\r\n'.encode()),
        "latest is 1 MB": lambda c: (c / "latest").write_bytes(b"x" * 10**6),
        "a bit is flipped": lambda c: _flip(c / newest.name / "model.safetensors"),
        "a file is gone": lambda c: (c / newest.name / "lars.safetensors").unlink(),
        "fastclr.json is cut": lambda c: _cut(c / newest.name / "fastclr.json"),
    }
    for name, damage in cells.items():
        run_dir = folder / "damaged"
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(good, run_dir)
        damage(run_dir / "checkpoints")
        run = Ranks(folder, 1, partial(train, folder, run_dir, epochs=2))
        assert run.wait() and not any(run.codes), (name, run.said())
        from_before = not name.startswith("latest")
        wanted = before if from_before else newest
        assert f"checkpoints/{wanted.name}, step" in run.said(), (name, run.said())
        assert not from_before or f"{newest.name}" in run.said(), (name, run.said())
        assert outcome(run_dir) == expected, name
    return f"{len(cells)} of {len(cells)} go on from the newest whole one to the same end"


def kept_checkpoints(folder: Path) -> str:
    """The last k, each multiple, and nothing else."""
    run_dir = folder / "kept"
    work = partial(train, folder, run_dir, checkpoint_every=1, keep_checkpoints=2, keep_every=4)
    run = Ranks(folder, 1, work)
    assert run.wait() and not any(run.codes), run.said()
    steps = [int(p.name.split("-")[1]) for p in list_checkpoints(run_dir / "checkpoints")]
    assert steps == [4, 8, 12, 14, 15], steps
    begun = folder / "begun"
    start = run_dir / "checkpoints/step-0000008"
    run = Ranks(folder, 1, partial(train, folder, begun, start_from=str(start)))
    assert run.wait() and not any(run.codes), run.said()
    ends = [read_facts(p / "checkpoints/step-0000015")["sha256"] for p in (run_dir, begun)]
    assert ends[0]["model.safetensors"] == ends[1]["model.safetensors"]
    return "steps 4, 8, 12, 14, 15 of 15; another run begun from step 8 ends equal"


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def a_watched_run(folder: Path) -> str:
    """Online evaluation changes no bit, and the best checkpoint is kept; killed and gone on."""
    watched, run_dir = EvaluationConfig(test=str(folder / "train")), folder / "watched"
    work = partial(train, folder, run_dir, stage=3, evaluation=watched, keep_checkpoints=1)
    run = Ranks(folder, 2, work)
    run.wait_for(run_dir / "checkpoints/step-0000008")
    run.kill()
    run = Ranks(folder, 2, work)
    assert run.wait() and not any(run.codes), run.said()
    plain = Ranks(folder, 2, partial(train, folder, folder / "plain", stage=3))
    assert plain.wait() and outcome(run_dir) == outcome(folder / "plain"), plain.said()
    rows = [json.loads(line) for line in (run_dir / "evaluations.jsonl").open()]
    assert [row["step"] for row in rows] == [5, 10, 15]
    best = max(rows, key=lambda row: row["knn_top1"])
    names = sorted({f"step-{step:07d}" for step in (best["step"], 15)})
    assert [p.name for p in list_checkpoints(run_dir / "checkpoints")] == names
    assert json.loads((run_dir / "checkpoints/best").read_text()) == f"step-{best['step']:07d}"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["evaluation_seconds"] > 0 and summary["checkpoint_seconds"] > 0
    return "3 evaluations, no bit changed, best and last kept"


DRILLS: tuple[Callable[[Path], str], ...] = (
    a_killed_rank,
    a_frozen_rank,
    a_stalled_loader,
    a_loss_that_is_nan,
    skipped_batches,
    weights_that_are_nan,
    damaged_checkpoints,
    kept_checkpoints,
    a_watched_run,
)


def main() -> int:
    """Run every drill."""
    with small_data() as folder:
        for drill in DRILLS:
            if not sys.argv[1:] or drill.__name__ in sys.argv[1:]:
                print(f"fault, {drill.__name__.replace('_', ' ')}: {drill(folder)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
