"""What the processes of a job do: a short trial, the whole account, a trace."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastclr import checkpointing, collectives, runs, sealing
from fastclr.ds_config import JSON
from fastclr.ledger import Ledger
from fastclr.runs import Prepared
from fastclr.throughput import data_work, limits, observing
from fastclr.throughput.jobs import Job
from fastclr.throughput.marks import Marks

WARM_UPS = 3  # steps: the first compiles and chooses algorithms
LEAST = 2  # steps of a trial, however long one takes
FOR_EVER = 10**9
BLOCK, ROUNDS = 10, 2  # steps of a block of the account, of each kind, and how often
MARKED, PLAIN, RESIDENT = "marked", "plain", "resident"


def trial(job: Job) -> dict[str, Any]:
    """Measure some steps of the trainer, without its stages."""
    run = _prepared(job)
    marks = Marks(run.trainer.device)

    def plan() -> observing.Plan:
        enough = time.perf_counter() + 2 * job.seconds
        for k in range(WARM_UPS):
            if k and collectives.any_rank(time.perf_counter() >= enough):
                break  # steps are long: little of one is a start's
            yield "warm-up", False
        _synchronize(run)
        end, count = time.perf_counter() + job.seconds, 0
        while count < LEAST or not collectives.any_rank(time.perf_counter() >= end):
            yield PLAIN, False
            count += 1
        _synchronize(run)

    _fit(run, marks, plan())
    return {
        "seconds": marks.wall(PLAIN),
        "images": run.config.global_batch_size,
        "peak_bytes": peak_bytes(run.trainer.device),
    }


def account(job: Job) -> dict[str, Any]:
    """Measure every stage inside a run and alone, and the limits of the machine.

    The run takes blocks of steps in turn: with its stages marked, and without (what marking costs);
    then with a batch that is there already: the stages of the step without a loader beside them.
    """
    run = _prepared(job)
    marks, work = Marks(run.trainer.device), data_work.Work()
    source = observing.Source(run.loader, marks)
    waits: list[float] = []  # of the host in the loader, in marked steps
    save: dict[str, float] = {}
    with ExitStack() as stack:
        stack.enter_context(data_work.watched(run.loader, work))
        if run.loader.world.num_ranks > 1:
            stack.enter_context(observing.collectives_marked(marks))
        plan = _blocks(run, source, work, waits, 0.6 * job.seconds)
        _fit(run, marks, plan, source, partial(_timed_save, save))
    found = {
        "images": run.config.global_batch_size,
        "images_per_rank": run.loader.micro_batch_size,
        "batches_per_epoch": run.loader.batches_per_epoch,
        "marked": marks.seconds(MARKED),
        "wall": marks.wall(MARKED),
        "plain": marks.wall(PLAIN),
        "resident": marks.seconds(RESIDENT),
        "resident_wall": marks.wall(RESIDENT),
        "waits": waits,
        "loader_work": dict(work.seconds),
        "save": save,
        "peak_bytes": peak_bytes(run.trainer.device),
        "backend": run.loader.backend,
        "chunks": run.ds["gradient_accumulation_steps"],
        "compiled": run.config.compile,
        "device": run.trainer.device.type,
        "ranks": run.loader.world.num_ranks,
    }
    found["alone"] = data_work.alone(run.loader, 0.05 * job.seconds)
    if run.loader.world.num_ranks > 1:
        found["link"] = _link(run, found)
    return {**found, **_limits(run)}


def _blocks(
    run: Prepared,
    source: observing.Source,
    work: data_work.Work,
    waits: list[float],
    seconds: float,
) -> observing.Plan:
    """Yield blocks of marked and plain steps in turn, then of steps on a resident batch."""
    before = 0.0
    for _ in range(WARM_UPS):
        before = time.perf_counter()
        yield "warm-up", False
        _synchronize(run)
    step = time.perf_counter() - before
    fitting = int(seconds / max(step, 1e-9) / (2 * ROUNDS + 1))
    block = _of_rank_0(max(2, min(BLOCK, fitting)), run)
    rounds = ROUNDS if fitting >= 2 else 1
    for _ in range(rounds):
        work.is_on = True
        for _ in range(block):
            waited = run.loader.wait_seconds
            yield MARKED, True
            waits.append(run.loader.wait_seconds - waited)
        work.is_on = False
        for _ in range(block):
            yield PLAIN, False
    source.is_resident = True
    for _ in range(2):  # the loader's threads finish what they have begun
        yield "settling", False
    for _ in range(block):
        yield RESIDENT, True
    source.is_resident = False


def _of_rank_0(number: int, run: Prepared) -> int:
    """Return rank 0's number on every rank."""
    if run.loader.world.num_ranks > 1:
        told = torch.tensor([number], device=run.trainer.device)
        torch.distributed.broadcast(told, src=0)
        return int(told.item())
    return number


# What makes a save whole and provable, and the part of the account each belongs to.
_PROVING: dict[tuple[Any, str], str] = {
    (Ledger, "commit"): "ledger",
    (sealing, "sha256_of"): "hashes",
    (sealing, "sync"): "fsync",
    (checkpointing, "_write_list"): "list of files",
    (checkpointing, "sync"): "fsync of the name",
}
SAVES = 3  # of each kind


def _timed_save(found: dict[str, float], save: Callable[..., None], *args: Any) -> None:
    """Save several times, by turns as it is and without what makes it whole and provable.

    Hashes and fsyncs go on in threads beside the writing: what they cost is the difference, not
    their sum.
    """
    folder = save.__self__.run_dir / "checkpoints"  # pyright: ignore[reportFunctionMemberAccess]
    times: dict[str, list[float]] = {"bare": [], "all": []}
    laps: dict[str, list[float]] = {part: [] for part in _PROVING.values()}
    for turn in range(2 * SAVES):
        if collectives.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)  # replacing one takes time of its own
            os.sync()
        kind = ("bare", "all")[turn % 2]  # a whole one is left
        with collectives.together(), ExitStack() as stack:
            for place, part in _PROVING.items():
                stack.enter_context(_replaced(place, laps[part], kind == "bare"))
            before = time.perf_counter()
            save(*args)
            times[kind].append(time.perf_counter() - before)
    found |= {kind: median(seconds) for kind, seconds in times.items()}
    found |= {part: sum(seconds) / SAVES for part, seconds in laps.items()}


@contextmanager
def _replaced(place: tuple[Any, str], laps: list[float], is_left_out: bool) -> Iterator[None]:
    """Let a function note its time, or do nothing, for a while."""
    plain = getattr(*place)

    def timed(*args: Any) -> Any:
        before = time.perf_counter()
        try:
            return plain(*args)
        finally:
            laps.append(time.perf_counter() - before)

    setattr(*place, (lambda *_: "") if is_left_out else timed)
    try:
        yield
    finally:
        setattr(*place, plain)


def _link(run: Prepared, found: dict[str, Any]) -> dict[str, float]:
    """Time an all-reduce of as many bytes as all gradients, with nothing beside it."""
    num_bytes = 4 * sum(p.numel() for p in run.trainer.model.parameters())
    buffer = torch.zeros(num_bytes // 4, device=run.trainer.device)
    seconds = []
    for _ in range(4):
        _synchronize(run)
        before = time.perf_counter()
        torch.distributed.all_reduce(buffer)
        _synchronize(run)
        seconds.append(time.perf_counter() - before)
    return {"bytes": num_bytes, "seconds": min(seconds[1:])}


def _limits(run: Prepared) -> dict[str, Any]:
    """Measure the machine, and count what the model asks of it."""
    device, dtype = run.trainer.device, computing_dtype(run.ds)
    wanted = limits.demand(run.config, torch.empty(0, dtype=dtype).element_size())
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "flops_per_image": wanted.flops,
        "bytes_per_image": wanted.num_bytes,
        "triad_bytes_per_second": limits.triad_bytes_per_second(device),
        "matmul_flops_per_second": limits.matmul_flops_per_second(device, dtype),
    }


def computing_dtype(ds: JSON) -> torch.dtype:
    """Return what products and convolutions are computed in."""
    if ds.get("fp16", {}).get("enabled"):
        return torch.float16
    autocast = ds.get("torch_autocast", {})
    if autocast.get("enabled"):
        return getattr(torch, str(autocast.get("dtype", "bfloat16")).removeprefix("torch."))
    is_bf16 = any(ds.get(key, {}).get("enabled") for key in ("bf16", "bfloat16"))
    return torch.bfloat16 if is_bf16 else torch.float32


def profile(job: Job) -> dict[str, Any]:
    """Leave a trace of some steps for Chrome or Perfetto, and NVTX ranges on CUDA."""
    run = _prepared(job)
    marks, is_main = Marks(run.trainer.device, traced=True), run.loader.world.is_main

    def plan() -> observing.Plan:
        for _ in range(WARM_UPS):
            yield "warm-up", False
        with torch.profiler.profile() as profiler:
            for _ in range(LEAST):
                yield MARKED, True
            _synchronize(run)
        if is_main:
            profiler.export_chrome_trace(job.out)

    _fit(run, marks, plan(), observing.Source(run.loader, marks))
    return {"bytes": Path(job.out).stat().st_size if is_main else 0}


KINDS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "trial": trial,
    "account": account,
    "profile": profile,
}


def _prepared(job: Job) -> Prepared:
    return runs.prepare(job.config, job.ds)


def _fit(
    run: Prepared,
    marks: Marks,
    plan: Iterator[tuple[str, bool]],
    source: observing.Source | None = None,
    save: Callable[..., None] = lambda *_: None,
) -> None:
    """Train along a plan."""
    observing.observe(run.trainer, marks, plan, save)
    loader: Any = source or run.loader  # a source passes on what it does not have
    run.trainer.fit(loader, epochs=FOR_EVER)


def _synchronize(run: Prepared) -> None:
    """Wait for the GPU, where there is one."""
    if run.trainer.device.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(device: torch.device) -> int:
    """Return the most device memory on CUDA, the most resident memory of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
