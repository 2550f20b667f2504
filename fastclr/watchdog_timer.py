"""A watchdog for each rank: where nothing happens any more it names rank and phase, and leaves.

A rank that waits for ever blocks all others, and the machines under them.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fastclr.interruption import EXIT_PEER_LOST, PeerLost

# What gloo and NCCL say, in errors of no class of their own, when a rank is gone.
_LOST = ("gloo/", "Connection closed by peer", "Connection reset by peer", "NCCL", "Timed out")
_ASKING_SECONDS = 5.0
_STOPPED_SECONDS = 2.0  # a thread that was not woken for so long was stopped, and all others too


class Watchdog:
    """Ends this process with 76 when one phase lasts too long; use as a context.

    Every rank's phase is kept in the process group's store, so that the message can say where the
    others were. Stacks of all threads go to ``stacks-rank<r>.txt``.

    Args:
        seconds: How long a phase may last.
        rank: Of this process.
        num_ranks: Processes.
        folder: Where stacks are written.
    """

    def __init__(self, seconds: float, rank: int, num_ranks: int, folder: Path) -> None:
        self._seconds, self._rank, self._num_ranks = seconds, rank, num_ranks
        self._folder = folder
        self._mark: tuple[str, int, float] = (
            "start-up",
            0,
            time.monotonic(),
        )  # replaced whole: no lock needed
        self._closed = threading.Event()

    def __enter__(self) -> Watchdog:
        self._closed.clear()
        self._mark = ("start-up", 0, time.monotonic())
        works = (self._guard, self._publish)
        self._threads = [threading.Thread(target=work, daemon=True) for work in works]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join(1.0)  # one that lives on at exit would abort the process

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Say what is being done in here; what follows is a step."""
        self._mark = (name, step, time.monotonic())
        yield
        self._mark = ("step", step, time.monotonic())

    @contextmanager
    def names_lost_peers(self) -> Iterator[None]:
        """Turn what collectives raise when a rank is gone into :class:`PeerLost`.

        Raises:
            PeerLost: Says what every rank did last.
        """
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not any(w in str(error) for w in _LOST):
                raise
            first_line = str(error).partition("\n")[0]
            raise PeerLost(
                f"{self._here()}: another rank is gone or does not answer ({first_line}).\n"
                f"{self.others()}\nStart the same command again to go on from the last checkpoint."
            ) from error

    def others(self) -> str:
        """Say what every other rank did last, one line each; waits 5 seconds at most."""
        answer: list[str] = []
        asking = threading.Thread(target=lambda: answer.extend(self._ask()), daemon=True)
        asking.start()
        asking.join(_ASKING_SECONDS)
        if asking.is_alive():
            return "rank 0, which knows what the others do, does not answer."
        return "\n".join(answer)

    def _here(self) -> str:
        """Name this rank and what it does."""
        name, step, since = self._mark
        return (
            f"rank {self._rank} on {socket.gethostname()}, {time.monotonic() - since:.0f} s in "
            f"phase '{name}' after step {step}"
        )

    def _ask(self) -> Iterator[str]:
        """Read the other ranks' marks."""
        try:
            store = _store()
            for rank in (r for r in range(self._num_ranks) if r != self._rank):
                key = f"fastclr/watchdog/{rank}"
                if not store.check([key]):
                    yield f"rank {rank}: nothing known."
                    continue
                seen, text = store.get(key).decode().split(" ", 1)
                yield f"rank {rank}, {max(0.0, time.time() - float(seen)):.0f} s ago: {text}"
        except (RuntimeError, ValueError, OSError) as error:
            yield f"what the others do cannot be asked: {error}"

    def _publish(self) -> None:
        """Tell the others, again and again; may block, and is not needed to leave."""
        store = None
        while not self._closed.wait(min(2.0, self._seconds / 4)):
            try:
                store = store or _store()
                store.set(f"fastclr/watchdog/{self._rank}", f"{time.time()} {self._here()}")
            except (RuntimeError, ValueError, OSError):
                store = None  # no process group yet, or no rank 0 any more

    def _guard(self) -> None:
        """Leave when a phase lasts too long; time in which this process was stopped is none."""
        pause = min(1.0, self._seconds / 4)
        looked = awake = time.monotonic()
        while not self._closed.wait(pause):
            now = time.monotonic()
            if now - looked > pause + _STOPPED_SECONDS:
                awake = now
            looked = now
            if now - max(self._mark[2], awake) > self._seconds:
                break
        if self._closed.is_set():
            return
        stacks = self._folder / f"stacks-rank{self._rank}.txt"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with stacks.open("w") as file:
                faulthandler.dump_traceback(file)
        except OSError as error:
            stacks = f"none ({error})"
        print(
            f"error: {self._here()}: the watchdog allows {self._seconds:.0f} s.\n{self.others()}\n"
            f"Stacks: {stacks}. Start the same command again to go on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_PEER_LOST)


def _store() -> Any:
    """Return a connection of this thread's own to the process group's store."""
    return dist.distributed_c10d._get_default_store().clone()
