"""Alpha and beta of the links between ranks here, from collectives of a few sizes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import multiprocessing

from scaling_parts.model import Kind, Link

SIZES = (64, 4096, 65_536, 1_048_576, 8_388_608)  # bytes, as the model counts them
_WORK = 512  # side of matrices that are multiplied between collectives: milliseconds of a core
KINDS: tuple[Kind, ...] = ("all_reduce", "all_gather")


class Timed(NamedTuple):
    """One collective, timed.

    Attributes:
        kind: As the model calls it.
        num_bytes: As the model counts them.
        ranks: How many took part.
        seconds: Median.
    """

    kind: Kind
    num_bytes: int
    ranks: int
    seconds: float


def measure(
    ranks: int,
    slots: Sequence[set[int]],
    folder: Path,
    sizes: Sequence[int] = SIZES,
    repeats: int = 20,
) -> list[Timed]:
    """Time collectives of ranks on cores of their own; gloo, or NCCL where there are GPUs.

    Each is begun after some milliseconds of arithmetic, as in a step: ranks that did nothing but
    talk would find each other awake, with their buffers in the cache, in half of the time.
    """
    path = folder / f"links-{time.monotonic_ns()}"
    multiprocessing.start_processes(
        _be, (ranks, slots, path, sizes, repeats), ranks, start_method="fork"
    )
    return [Timed(*row) for row in json.loads(path.with_suffix(".json").read_text())]


def fit(found: Sequence[Timed]) -> Link:
    """Return the alpha and beta that come nearest to all times, by relative deviation.

    Each time is (turns) alpha + (bytes per turn)(turns) / beta, as in
    :class:`scaling_parts.model.Cluster`; least squares over both unknowns, none below 0.
    """
    rows = np.array([_equation(one) for one in found], np.float64)
    seconds = np.array([one.seconds for one in found])
    scaled = rows / seconds[:, None]
    (alpha, inverse), *_ = np.linalg.lstsq(scaled, np.ones(len(found)), rcond=None)
    if alpha < 0 or inverse <= 0:
        raise ValueError(
            f"alpha {alpha:.3g} s and 1 / beta {inverse:.3g} s a byte cannot be: the times {found} "
            "are too noisy for the model. Measure on a quiet machine."
        )
    return Link(float(alpha), float(1 / inverse))


def _equation(one: Timed) -> tuple[float, float]:
    """Return the factors of alpha and 1 / beta."""
    turns = one.ranks - 1
    if one.kind == "all_gather":
        return turns, turns * one.num_bytes
    return 2 * turns, 2 * turns * one.num_bytes / one.ranks


def _be(
    rank: int, ranks: int, slots: Sequence[set[int]], path: Path, sizes: Sequence[int], repeats: int
) -> None:
    """Be one rank; never returns."""
    os.sched_setaffinity(0, slots[rank])
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{path}", rank=rank, world_size=ranks
    )
    rows: list[Timed] = []
    work = torch.ones(_WORK, _WORK, device=device)
    for num_bytes in sizes:
        mine = torch.zeros(num_bytes // 4, device=device)
        everyone = list(torch.empty(ranks, len(mine), device=device))
        calls = {
            "all_reduce": lambda mine=mine: dist.all_reduce(mine),
            "all_gather": lambda mine=mine, everyone=everyone: dist.all_gather(everyone, mine),
        }
        for kind in KINDS:
            seconds = [_seconds(calls[kind], work) for _ in range(repeats + 2)][2:]
            rows.append(Timed(kind, num_bytes, ranks, median(seconds)))
    if rank == 0:
        path.with_suffix(".json").write_text(json.dumps(rows))
    dist.barrier()
    os._exit(0)


def _seconds(call: Callable[[], object], work: torch.Tensor) -> float:
    _ = work @ work
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    before = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - before
