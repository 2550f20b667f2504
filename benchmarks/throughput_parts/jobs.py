"""What is measured, each in processes of its own: one that dies or hangs ends nothing else."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from fastclr.config import Config
from fastclr.ds_config import JSON
from throughput_parts.search import OUT_OF_MEMORY

# Imported once, by the process that all others are forks of.
PRELOAD = ["torch", "deepspeed", "fastclr.runs", "pipelines.augment_threads"]
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "Cannot allocate memory")


@dataclass(frozen=True)
class Job:
    """One thing to be run.

    Attributes:
        kind: Key of :data:`throughput_parts.measuring.KINDS`.
        config: Recipe, complete but for ``run_dir``.
        ds: DeepSpeed JSON.
        torch_threads: Threads of a rank's operations on the CPU.
        seconds: How long is measured, without the start.
        out: File to be written, where the kind writes one.
    """

    kind: str
    config: Config
    ds: JSON
    torch_threads: int
    seconds: float
    out: str = ""


class Processes:
    """Runs jobs in processes: forks of one that has everything loaded, or on CUDA new ones.

    Args:
        ranks: Processes of a job.
        on_cuda: Whether they use CUDA, which does not survive a fork.
    """

    def __init__(self, ranks: int, on_cuda: bool) -> None:
        self._ranks, self._on_cuda = ranks, on_cuda
        # What a killed job leaves behind is tidied up in the end, which need not be told of.
        os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
        self._context: Any = multiprocessing.get_context("spawn" if on_cuda else "forkserver")
        if not on_cuda:
            self._context.set_forkserver_preload(PRELOAD)

    def run(self, job: Job, limit: float) -> dict[str, Any]:
        """Run a job; return what rank 0 found, or ``{"problem": ...}``.

        Args:
            job: What to run.
            limit: Seconds after which it is killed.
        """
        with tempfile.TemporaryDirectory(prefix="fastclr-throughput-") as folder:
            return self._run(job, limit, Path(folder))

    def _run(self, job: Job, limit: float, folder: Path) -> dict[str, Any]:
        deadline = time.monotonic() + limit
        job = replace(job, config=replace(job.config, run_dir=str(folder / "run")))
        port, receivers, processes = _free_port(), [], []
        try:
            for rank in range(self._ranks):
                receiver, sender = self._context.Pipe(duplex=False)
                log = str(folder / f"rank{rank}.txt")
                arguments = (job, rank, self._ranks, port, sender, log, self._on_cuda)
                processes.append(self._context.Process(target=be, args=arguments))
                processes[-1].start()
                sender.close()
                receivers.append(receiver)
            return _first_word(receivers, deadline, limit, folder)
        finally:
            for process in (p for p in processes if p.pid):
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # also what a compiler started
                process.kill()
                process.join()


def _first_word(
    receivers: Sequence[Connection], deadline: float, limit: float, folder: Path
) -> dict[str, Any]:
    """Wait for rank 0's result or anybody's problem."""
    silent = dict(enumerate(receivers))
    while True:
        ready = wait([*silent.values()], max(0.0, deadline - time.monotonic()))
        if not ready:
            return {"problem": f"not done within {limit:.0f} s"}
        for rank, receiver in [*silent.items()]:
            if receiver not in ready:
                continue
            try:
                said = receiver.recv()
            except EOFError:
                return {"problem": f"rank {rank} died: {_last_line(folder / f'rank{rank}.txt')}"}
            if rank == 0 or "problem" in said:
                return said
            del silent[rank]


def _last_line(log: Path) -> str:
    """Return the last line that a process left."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line[:300] for line in reversed(lines) if line.strip()), "without a word")


def be(
    job: Job, rank: int, ranks: int, port: int, sender: Connection, log: str, on_cuda: bool
) -> None:
    """Be one rank of a job: tell what was found, and end at once."""
    os.setsid()  # it is killed with all that it started, and by nobody's Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(log, "wb", buffering=0) as stream:  # noqa: PTH123
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    if ranks > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    else:
        os.environ["LOCAL_RANK"] = "0"
    os.environ["OMP_NUM_THREADS"] = str(job.torch_threads)
    try:
        if not on_cuda:
            _bound_memory(ranks)
        found = _work(job)
    except BaseException as error:
        traceback.print_exc()
        found = {"problem": problem_of(error)}
    sender.send(found)
    sys.stdout.flush()
    sys.stderr.flush()
    if rank == 0 or "problem" in found:
        sender.close()
        os._exit(0)
    time.sleep(3600)  # rank 0 still measures; the parent ends this one


def _end_with_parent() -> None:
    """End this process, and all that it started, when nobody is left who waits for it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _work(job: Job) -> dict[str, Any]:
    import torch

    from throughput_parts.measuring import KINDS

    torch.set_num_threads(job.torch_threads)
    return KINDS[job.kind](job)


def problem_of(error: BaseException) -> str:
    """Say in one line why a job failed."""
    from fastclr.config import ConfigError

    text = str(error)
    if isinstance(error, MemoryError) or any(word in text for word in _MEMORY_WORDS):
        return OUT_OF_MEMORY
    first = text.split("\n")[0][:300]
    is_refusal = isinstance(error, ConfigError)
    return f"refused: {first}" if is_refusal else f"failed: {type(error).__name__}: {first}"


def _bound_memory(ranks: int) -> None:
    """Let an allocation fail that the machine cannot serve, before the kernel kills somebody."""
    from fastclr.facts import free_memory

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[5])
    bound = pages * resource.getpagesize() + free_memory() // ranks
    resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
