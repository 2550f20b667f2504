"""Which rank sees which image when, and the same views whatever rank asks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from fastclr.config import ConfigError
from fastclr.verify.case import Case
from fastclr.verify.data import SEED, Images
from fastclr.verify.rows import Row, compared
from fastclr.world import World
from pipelines import Loader, SimCLRPolicy, make_loader
from pipelines.augment_reference import augment as oracle
from pipelines.backends import BACKENDS, TOLERANCE
from pipelines.order import Int64

BATCH, EPOCHS = 3, 2
VIEWS = 16


def loader_of(world: World, batch: int, num_ranks: int, device: torch.device, side: int) -> Loader:
    """Return a run's loader over 7 global batches and a rest."""
    images = Images(7 * BATCH * num_ranks + BATCH * num_ranks // 2 + 1)
    policy = SimCLRPolicy(size=side)
    return make_loader(
        images, policy, micro_batch_size=batch, seed=SEED, world=world, device=device
    )


def measure_order(case: Case) -> dict[str, Any]:
    """Return the ids that this rank's loader hands out over two epochs, and after a resume."""

    def loader() -> Loader:
        return loader_of(case.world, BATCH, case.world.num_ranks, case.device, 8)

    first = loader()
    num_batches = first.batches_per_epoch
    batches, position = [], {}
    for batch in islice(first, EPOCHS * num_batches):
        batches.append(batch.sample_id_B.tolist())
        if len(batches) == num_batches + 2:
            position = first.state_dict()
    second = loader()
    second.load_state_dict(position)
    resumed = [b.sample_id_B.tolist() for b in islice(second, num_batches - 2)]
    return {
        "batches": batches,
        "resumed": resumed,
        "num_batches": num_batches,
        "dropped": first.dropped_per_epoch,
        "num_images": len(first.shard_set),
    }


def judge_order(case: Case, found: list[dict[str, Any]]) -> Iterator[Row]:
    """Count what is not as it should be."""
    num_ranks, num_images = len(found), found[0]["num_images"]
    expected = num_images // (BATCH * num_ranks)
    counts = [rank["num_batches"] for rank in found]
    yield compared(
        "order",
        f"batches in an epoch, {expected} on each rank",
        max(abs(count - expected) for count in counts),
        0,
        f"found {counts}" if set(counts) != {expected} else "",
    )
    left = num_images - expected * BATCH * num_ranks
    dropped = [rank["dropped"] for rank in found]
    what = f"images left over in an epoch, {left} of {num_images}"
    yield compared("order", what, max(abs(d - left) for d in dropped), 0)
    ids = [np.array(rank["batches"]).reshape(EPOCHS, -1, BATCH) for rank in found]
    wrong, note = 0, ""
    for epoch in range(EPOCHS):
        seen = np.concatenate([rank[epoch].ravel() for rank in ids])
        times = np.bincount(seen, minlength=num_images)
        repeated, never = int((times - 1).clip(0).sum()), int((times == 0).sum()) - left
        if repeated or never:
            wrong += repeated + abs(never)
            note = f"epoch {epoch}: {repeated} ids too often, {never} too many never"
    yield compared("order", "each image once over all ranks in an epoch", wrong, 0, note)
    for what, count in _places(found, ids, expected).items():
        if len(set(counts)) > 1:
            yield Row("order", what, "not run", note="the ranks have unequally many batches")
        else:
            yield compared("order", what, count(), 0)


def _places(
    found: list[dict[str, Any]], ids: list[Int64], expected: int
) -> dict[str, Callable[[], int]]:
    """Return what else to count, which has a meaning where ranks have equally many batches."""
    num_ranks = len(found)

    def other_than_alone() -> int:
        one = loader_of(World(), BATCH * num_ranks, num_ranks, torch.device("cpu"), 8)
        alone = [b.sample_id_B.numpy() for b in islice(one, EPOCHS * expected)]
        return int((np.stack(ids, 2).reshape(EPOCHS * expected, -1) != np.stack(alone)).sum())

    def other_after_resume() -> int:
        pairs = [(rank["resumed"], rank["batches"][expected + 2 :]) for rank in found]
        return sum(int((np.array(a) != np.array(b)).sum()) for a, b in pairs)

    return {
        "global batches, ids that one rank alone would not have there": other_than_alone,
        "resumed within an epoch, ids that are others": other_after_resume,
    }


def measure_views(case: Case) -> dict[str, Any]:
    """Return what the views of fixed (epoch, position) are on this rank."""
    world, found = case.world, {}
    policy, images = SimCLRPolicy(size=32), Images(VIEWS)
    params = [
        policy.draw(
            seed=SEED, epoch=1, positions=np.arange(VIEWS), view=view, sizes_N2=images.size_N2
        )
        for view in (0, 1)
    ]
    numbers = b"".join(array.tobytes() for p in params for array in vars(p).values())
    found["numbers"] = hashlib.sha256(numbers).hexdigest()
    loader = loader_of(world, BATCH, world.num_ranks, case.device, 20)
    found["views"] = [b.views_VBCHW.tolist() for b in islice(loader, 2)]
    pixels = [images[i] for i in range(VIEWS)]
    expected = torch.stack([oracle(pixels, p, policy) for p in params])
    for name in BACKENDS.keys() - {"reference"}:
        try:
            backend = BACKENDS[name]([policy] * 2, case.device, 1)
        except (ImportError, ConfigError) as error:
            found[f"absent {name}"] = str(error)
            continue
        source = [images.read(i) for i in range(VIEWS)] if backend.takes_bytes else pixels
        made = backend(source, params)
        found[f"levels {name}"] = _levels(made.cpu(), expected)
    return found


def judge_views(case: Case, found: list[dict[str, Any]]) -> Iterator[Row]:
    """Compare ranks with each other, with one process, and back-ends with the oracle."""
    first = found[0]["numbers"]
    others = [rank for rank, f in enumerate(found) if f["numbers"] != first]
    note = f"ranks {others} differ from rank 0" if others else ""
    yield compared(
        "views", "numbers drawn for the same positions, ranks with others", len(others), 0, note
    )
    num_ranks = len(found)
    one = loader_of(World(), BATCH * num_ranks, num_ranks, case.device, 20)
    alone = torch.stack([b.views_VBCHW.cpu() for b in islice(one, 2)])
    together = torch.cat([torch.tensor(f["views"], dtype=torch.uint8) for f in found], 2)
    yield _pixels(
        "pixels of all ranks' batches, against one rank alone",
        [_levels(together, alone)],
        min(TOLERANCE.values()),
    )
    for name in sorted(BACKENDS.keys() - {"reference"}):
        what = f"pixels of {name} on {case.device.type}, against the reference back-end"
        absent = [f.get(f"absent {name}") for f in found]
        if all(absent):
            yield Row("views", what, "not applicable", note=f"not installed: {absent[0]}")
        elif any(absent):
            lacking = [rank for rank, reason in enumerate(absent) if reason]
            yield Row("views", what, "FAIL", note=f"not installed on ranks {lacking} alone")
        else:
            yield _pixels(what, [f[f"levels {name}"] for f in found], TOLERANCE[name])


def _levels(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Return mean and largest of the absolute difference in levels."""
    difference = (found.int() - expected.int()).abs().double()
    return difference.mean().item(), difference.max().item()


def _pixels(what: str, levels: list[tuple[float, float]], limits: tuple[float, float]) -> Row:
    """Return the row of the worst rank; its mean is the deviation that is shown."""
    mean, largest = (max(of_all) for of_all in zip(*levels, strict=True))
    note = f"all within {largest:g} (limit {limits[1]:g})"
    row = compared("views", f"{what}: mean difference in levels", mean, limits[0], note)
    return replace(row, status="FAIL") if largest > limits[1] else row
