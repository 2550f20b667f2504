"""Prove from a run's ledger what it learned from, and take one of its steps again, to the bit."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from fastclr import checkpointing, data_sets, ledger, runs
from fastclr.batch import Batch
from fastclr.config import Config, ConfigError, EvaluationConfig
from fastclr.data_sets import DataSet
from fastclr.engine import MONITORS, device_of
from fastclr.ledger import Entry, Start
from fastclr.verify.rows import Row, compared
from fastclr.world import World
from pipelines import ShardSet
from pipelines.loader import STATE_VERSION, Loader
from pipelines.order import hash64

Past = list[tuple[Start, list[list[Entry]]]]
Ids = npt.NDArray[np.int64]


def audit(run_dir: Path, train: str = "", num_views: int = 8) -> list[Row]:
    """Compare a run's ledger with its data, over all interruptions and changes of ranks.

    Args:
        run_dir: Folder of a training run.
        train: Its training data, where that lies elsewhere now.
        num_views: Steps whose views are made again.

    Returns:
        A row for each comparison; deviations are counts.

    Raises:
        ConfigError: If the run has no ledger, or one that cannot be read.
    """
    config, past = runs.load_run(run_dir), list(ledger.history(run_dir))
    data_set = data_sets.open_data(train or config.data.train, config.data)
    others = sum(start.data != data_set.digest for start, _ in past)
    rows = [compared("ledger", f"starts on other data, of {len(past)}", others, 0)]
    if not others:
        ids, last, wrong = _steps(past, _last_saved(run_dir))
        what = f"ranks that lack one of the steps to {last}, or have it twice"
        rows.append(compared("ledger", what, len(wrong), 0, "; ".join(wrong[:3])))
        rows.extend(_images(past, ids, data_set))
        rows.append(_views(past, set(ids), config, data_set, num_views))
    return rows


def _last_saved(run_dir: Path) -> int:
    """Return the step of the newest checkpoint; 0 if there is none."""
    found = checkpointing.list_checkpoints(run_dir / "checkpoints")
    return int(checkpointing.read_facts(found[-1])["step"]) if found else 0


def _steps(past: Past, saved: int) -> tuple[dict[int, Ids], int, list[str]]:
    """Return the ids of each whole step over all ranks, the last step, and where one is missing."""
    ids: dict[int, Ids] = {}
    wrong: list[str] = []
    stop = 0
    for number, (start, ranks) in enumerate(past):
        is_last = number == len(past) - 1
        written = [[entry.step for entry in own] for own in ranks]
        stop = saved if is_last else min(later.step for later, _ in past[number + 1 :])
        if is_last:  # a rank may be killed between log rows, when others have written more
            stop = max(stop, min((own[-1] for own in written if own), default=0))
        for rank, own in enumerate(written):
            expected = list(range(start.step + 1, stop + 1))
            kept = [step for step in own if step <= stop]
            lacking = sorted(set(expected) ^ set(kept)) or (kept != expected and kept[:1])
            if lacking:
                wrong.append(f"start {number}, rank {rank}, step {lacking[0]}")
        by_step = [{entry.step: entry.id_B for entry in own} for own in ranks]
        for step in by_step[0]:
            if step <= stop and all(step in own for own in by_step):
                ids[step] = np.concatenate([own[step] for own in by_step])
    return ids, stop, wrong


def _images(past: Past, ids: dict[int, Ids], data_set: DataSet) -> Iterator[Row]:
    """Compare with the order, and count what came twice or never."""
    replaced = sum(own[-1].damaged for _, ranks in past for own in ranks if own)
    note = f"{replaced} damaged images were replaced by others" if replaced else ""
    start = past[0][0]
    size, length = start.micro_batch_size * start.num_ranks, start.batches_per_epoch
    order, others = data_set.order(start.seed), 0
    epochs: dict[int, list[Ids]] = {}
    for step, id_G in ids.items():
        epoch, place = divmod(step - 1, length)
        expected = order.ids(epoch, place * size, (place + 1) * size)
        others += size if len(id_G) != size else int((id_G != expected).sum())
        epochs.setdefault(epoch, []).append(id_G)
    yield compared("ledger", f"images of {len(ids)} steps, other than the order has there", others,
                   replaced, note)  # fmt: skip
    if not isinstance(data_set, ShardSet):
        why = "a mixture shows an image as often as its set's weight says"
        yield Row("ledger", "each image once in an epoch", "not applicable", note=why)
        return
    twice = never = 0
    whole = [parts for parts in epochs.values() if len(parts) == length]
    for parts in epochs.values():
        seen = np.unique(np.concatenate(parts))
        twice += sum(map(len, parts)) - len(seen)
        never += len(data_set) - len(seen) if len(parts) == length else 0
    yield compared("ledger", f"images twice in one of {len(epochs)} epochs", twice, replaced, note)
    left = (len(data_set) - size * length) * len(whole)
    what = f"images never in one of {len(whole)} whole epochs, beyond {left} left over"
    yield compared("ledger", what, max(0, never - left), replaced, note)


def _views(past: Past, steps: set[int], config: Config, data_set: DataSet, most: int) -> Row:
    """Make the views of some steps again, as the same rank of as many."""
    all_of = [
        (start, rank, entry)
        for start, ranks in past
        for rank, own in enumerate(ranks)
        for entry in own
        if entry.step in steps
    ]
    chosen = np.argsort(hash64(config.seed, len(all_of), np.arange(len(all_of))))[:most].tolist()
    wrong = []
    for start, rank, entry in (all_of[i] for i in chosen):
        world = World(rank, start.num_ranks, 0, 1)
        loader = _loader_at(config, data_set, start, world, entry.step - 1)
        batch = next(iter(loader))
        if ledger.unsigned(ledger.digest_of(batch.views_VBCHW)) != entry.views:
            wrong.append(f"step {entry.step}, rank {rank}")
    what = f"batches of {len(chosen)}, whose views are others when made again"
    return compared("ledger", what, len(wrong), 0, "; ".join(wrong[:3]))


def _loader_at(config: Config, data_set: DataSet, start: Start, world: World, step: int) -> Loader:
    """Return a run's loader as it stood after a step."""
    device = device_of(World())
    config = replace(config, data=replace(config.data, in_memory=False))
    loader = data_sets.training_loader(config, data_set, start.micro_batch_size, world, device)
    epoch, place = divmod(step, start.batches_per_epoch)
    position = place * start.micro_batch_size * start.num_ranks
    loader.load_state_dict(
        {"version": STATE_VERSION, "epoch": epoch, "position": position, "seed": start.seed,
         "digest": start.data}
    )  # fmt: skip
    return loader


class _Reached(Exception):
    """The step that is taken again is done."""


class _Until:
    """A loader that ends training after some batches."""

    def __init__(self, loader: Loader, num_batches: int) -> None:
        self._loader, self._num_batches = loader, num_batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Batch]:
        yield from islice(self._loader, self._num_batches)
        raise _Reached


def replay(run_dir: Path, step: int, train: str = "") -> list[Row]:
    """Take steps again from the checkpoint before one, up to it; every rank calls this.

    Args:
        run_dir: Folder of a training run. Nothing of it changes.
        step: Last step taken again, from 1.
        train: Its training data, where that lies elsewhere now.

    Returns:
        Rows for ids, views and losses of these steps on all ranks, which have to be equal bit for
        bit on the machine and the number of ranks they were taken on; on rank 0, others get none.

    Raises:
        ConfigError: If the run cannot be taken up there.
    """
    world, config = World.detect(), runs.load_run(run_dir)
    start, before = _taken_by(run_dir, step), _checkpoint_before(run_dir, step)
    _check_replay(config, start, world)
    scratch = run_dir / f".replay-{step:07d}"
    config = replace(
        config, run_dir=str(scratch), start_from=str(before or ""), checkpoint_every=10**9,
        evaluation=EvaluationConfig(), data=replace(config.data, train=train or config.data.train),
    )  # fmt: skip
    ds = runs.read_json(run_dir / "config.json")["ds_config"]
    run = runs.prepare(config, {k: v for k, v in ds.items() if k not in MONITORS})
    if world.is_main:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
    first = 1 + (int(checkpointing.read_facts(before)["step"]) if before else 0)
    with suppress(_Reached):
        until: Any = _Until(run.loader, step + 1 - first)  # is all that its loader is
        run.trainer.fit(until, epochs=run.config.epochs)
    dist.barrier()
    rows = list(_compare_steps(run_dir, scratch, first, step)) if world.is_main else []
    dist.barrier()
    if world.is_main:
        shutil.rmtree(scratch)
    return rows


def _taken_by(run_dir: Path, step: int) -> Start:
    """Return the start that took a step which counts."""
    for start, ranks in ledger.history(run_dir):
        if any(entry.step == step for entry in ranks[0]):
            return start
    raise ConfigError(f"{run_dir} has no step {step} in its ledger: name one it has taken.")


def _checkpoint_before(run_dir: Path, step: int) -> Path | None:
    """Return the newest checkpoint before a step; None for the beginning of the run."""
    found = checkpointing.list_checkpoints(run_dir / "checkpoints")
    earlier = [c for c in found if checkpointing.read_facts(c)["step"] < step]
    return earlier[-1] if earlier else None


def _check_replay(config: Config, start: Start, world: World) -> None:
    """Refuse what could not be equal."""
    if config.minutes is not None:
        raise ConfigError(
            "the run was given minutes, so its rates followed the clock: only runs of a number of "
            "epochs can be taken again."
        )
    if world.num_ranks != start.num_ranks:
        raise ConfigError(
            f"the step was taken by {start.num_ranks} ranks, this is {world.num_ranks}: start as "
            f"many: deepspeed --num_accelerators {start.num_ranks} --module fastclr replay ..."
        )


def _compare_steps(run_dir: Path, scratch: Path, first: int, last: int) -> Iterator[Row]:
    """Compare what was written then and now."""
    steps = range(first, last + 1)
    then, now = ({} for _ in range(2))
    for folder, found in ((run_dir, then), (scratch, now)):
        for _, ranks in ledger.history(folder):
            for rank, own in enumerate(ranks):
                found.update({(entry.step, rank): entry for entry in own if entry.step in steps})
    pairs = [(then.get(key), now.get(key)) for key in sorted(then.keys() | now.keys())]
    whole = [(a, b) for a, b in pairs if a and b]
    what = f"steps {first} to {last}"
    yield compared("replay", f"{what}, taken by a rank then and now", len(pairs) - len(whole), 0)
    ids = sum(int(not np.array_equal(a.id_B, b.id_B)) for a, b in whole)
    yield compared("replay", f"{what}, other images", ids, 0)
    yield compared("replay", f"{what}, other views", sum(a.views != b.views for a, b in whole), 0)
    losses = [(a.loss, b.loss) for a, b in whole]
    others = sum(a != b and not (math.isnan(a) and math.isnan(b)) for a, b in losses)
    yield compared("replay", f"{what}, losses that are others in a bit", others, 0)
