"""F: numbers. A loss or weight that is not finite, a step taken again, a bit turned on one rank."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from drill import Cells, Drill
from forks import Ranks, losses, outcome, train

from fastclr import audit, checkpointing
from fastclr.checkpointing import list_checkpoints, read_facts
from fastclr.config import FaultsConfig
from fastclr.losses import NTXent
from fastclr.trainer import Trainer
from fastclr.world import World


def not_finite(cells: Cells) -> None:
    """F1: all ranks stop before the update, or skip it alike; no checkpoint holds such a number."""
    for name, drill in {
        "the loss of one rank": _a_loss_that_is_nan,
        "batches that may be skipped": _skipped_batches,
        "a weight": _weights_that_are_nan,
    }.items():
        with cells.cell(name):
            drill(cells.folder)


@contextmanager
def _spoiled(*steps: int, rank: int = 1) -> Iterator[None]:
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


def _a_loss_that_is_nan(folder: Path) -> None:
    """All ranks stop before the update; the images are named; nothing of it is saved."""
    run_dir = folder / "nan"
    with _spoiled(7):
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


def _skipped_batches(folder: Path) -> None:
    """Where skipping is allowed, the step changes nothing; beyond the cap the run stops."""
    faults = FaultsConfig(non_finite="skip", most_skipped=2)
    run_dir = folder / "skipped"
    with _spoiled(3, 8):
        run = Ranks(folder, 2, partial(train, folder, run_dir, stage=1, faults=faults))
    assert run.wait() and not any(run.codes), run.said()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["skipped_steps"], summary["steps"]) == (2, 15)
    assert [row[0] for row in losses(run_dir)] == [s for s in range(1, 16) if s not in (3, 8)]
    with _spoiled(3, 8, 9):
        run = Ranks(folder, 2, partial(train, folder, folder / "over", stage=1, faults=faults))
    assert run.wait() and run.codes == [70, 70], (run.codes, run.said())


def _weights_that_are_nan(folder: Path) -> None:
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


def taken_again(cells: Cells) -> None:
    """F2: steps of a run that was killed and gone on with, taken again: equal bit for bit."""
    folder, run_dir = cells.folder, cells.folder / "replayed"
    work = partial(train, folder, run_dir, keep_checkpoints=9)
    run = Ranks(folder, 2, work)
    run.wait_for(run_dir / "checkpoints/step-0000006")
    run.kill()
    run = Ranks(folder, 2, work)
    assert run.wait() and not any(run.codes), run.said()
    for step in range(1, 16) if cells.is_long else (1, 6, 7, 8, 15):
        with cells.cell(f"step {step}"):
            again = Ranks(folder, 2, partial(_replay, run_dir, step))
            assert again.wait() and again.codes == [0, 0], (again.said(), again.said(1))


def _replay(run_dir: Path, step: int) -> None:
    rows = audit.replay(run_dir, step)
    wrong = [f"{row.what}: {row.status}" for row in rows if row.status != "pass"]
    assert not wrong, wrong
    assert bool(rows) == World.detect().is_main


EVERY = 3


def a_turned_bit(cells: Cells) -> None:
    """F3: one bit of a weight, a momentum or a statistic, on one rank: found, named, not saved."""
    step = Trainer.train_step
    for name, rank, stage in (
        ("weight", 1, 0), ("weight", 0, 0), ("momentum", 1, 0), ("statistic", 1, 0),
    ):  # fmt: skip
        with cells.cell(f"a {name} of rank {rank}, stage {stage}"):
            run_dir = cells.folder / f"{name}{rank}{stage}"
            faults = FaultsConfig(compare_every=EVERY)

            def turns(self: Trainer, *args: Any, name: str = name, rank: int = rank) -> Any:
                loss = step(self, *args)
                if self.step == 7 and self.world.rank == rank:
                    _turn(self, name)
                return loss

            work = partial(train, cells.folder, run_dir, stage, faults=faults, checkpoint_every=6)
            with mock.patch.object(Trainer, "train_step", turns):
                run = Ranks(cells.folder, 2, work)
            assert run.wait() and run.codes == [70, 70], (run.codes, run.said())
            said = run.said()
            assert "different copies of" in said and "after step 9" in said, said
            wanted = {"weight": "conv1.weight", "momentum": "momentum", "statistic": "running_mean"}
            assert wanted[name] in said or name == "momentum", said
            saved = list_checkpoints(run_dir / "checkpoints")
            assert [read_facts(c)["step"] for c in saved] == [6]
    with cells.cell("before a save, whatever the interval"):
        run_dir = cells.folder / "saved"

        def turns(self: Trainer, *args: Any) -> Any:
            loss = step(self, *args)
            if self.step == 4 and self.world.rank == 1:
                _turn(self, "weight")
            return loss

        with mock.patch.object(Trainer, "train_step", turns):
            run = Ranks(cells.folder, 2, partial(train, cells.folder, run_dir))
        assert run.wait() and run.codes == [70, 70], (run.codes, run.said())
        assert [p.name for p in list_checkpoints(run_dir / "checkpoints")] == ["step-0000002"]
    with cells.cell("nothing turned"):
        run_dir, faults = cells.folder / "none", FaultsConfig(compare_every=1)
        for stage in (0, 1, 3):
            work = partial(train, cells.folder, run_dir / str(stage), stage, faults=faults)
            run = Ranks(cells.folder, 2, work)
            assert run.wait() and run.codes == [0, 0], (stage, run.said())


def _turn(trainer: Trainer, name: str) -> None:
    """Turn a bit of a number."""
    module = trainer.engine.module
    first = next(iter(module.named_parameters()))[1]
    if name == "momentum":
        tensor = trainer.engine.optimizer.state[first]["momentum_buffer"]
    elif name == "statistic":
        tensor = next(b for n, b in module.named_buffers() if n.endswith("running_mean"))
    else:
        tensor = first.data
    place = (0,) * tensor.ndim
    bits = tensor[place].clone().view(torch.int32) ^ (1 << 10)
    with torch.no_grad():
        tensor[place] = bits.view(torch.float32)


DRILLS = {
    "F1": Drill(
        "a loss or weight that is not finite: 70 on all ranks before the update, none saved",
        not_finite,
        120,
    ),
    "F2": Drill(
        "steps taken again from ledger and checkpoint: equal bit for bit", taken_again, 90, 180
    ),
    "F3": Drill(
        "a bit turned on one rank: found at the next comparison, named, not saved",
        a_turned_bit,
        120,
    ),
}
