"""Scripts and ranks as forks of one process that has imported what takes seconds.

A start costs a tenth of a second instead of five to ten. ``multiprocessing``'s fork server is that
process: it computes nothing, so that its forks are sound.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_forks = multiprocessing.get_context("forkserver")


def environment() -> dict[str, str]:
    """Return this environment without a launcher's; the interpreter's folder is first on PATH."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environments_of_ranks(num_ranks: int) -> list[dict[str, str]]:
    """Return what a launcher sets for each rank of one machine."""
    world = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_PORT": free_port()}
    return [
        {"MASTER_ADDR": "127.0.0.1"}
        | {name: str(value) for name, value in {**world, "RANK": r, "LOCAL_RANK": r}.items()}
        for r in range(num_ranks)
    ]


def _be(words: list[str], environ: dict[str, str], folder: Path, logs: tuple[str, str]) -> None:
    """Run a script as ``python`` would; call it in a fork."""
    os.setsid()
    for number, log in enumerate(logs, 1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    sys.path[:0] = [str(ROOT)]
    sys.argv = words
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[:0] = [str(Path(words[0]).resolve().parent)]
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


class Started:
    """A script that runs in one process, or in one a rank.

    Args:
        words: Script, or ``-m`` and a module, and what follows it.
        logs: Folder that gets what the processes say.
        environs: What the environment has besides, of each process.
        folder: Working folder.
    """

    def __init__(
        self,
        words: Sequence[str | Path],
        logs: Path,
        environs: Sequence[Mapping[str, str]] = ({},),
        folder: Path = ROOT,
    ) -> None:
        self.words = [str(word) for word in words]
        self._logs = [(str(logs / f"out{r}.txt"), str(logs / f"err{r}.txt"))
                      for r in range(len(environs))]  # fmt: skip
        self._processes = []
        _serve()
        for environ, log in zip(environs, self._logs, strict=True):
            given = (self.words, {**environment(), **environ}, folder, log)
            self._processes.append(_forks.Process(target=_be, args=given))
            self._processes[-1].start()

    @property
    def pids(self) -> list[int]:
        """The process of each rank."""
        return [process.pid or 0 for process in self._processes]

    def poll(self) -> int | None:
        """Return the exit code: of a process that failed if any has, else None till all ended."""
        codes = [process.exitcode for process in self._processes]
        failed = [code for code in codes if code]
        return failed[0] if failed else None if None in codes else 0

    def wait(self, seconds: float) -> int:
        """Return the exit code; processes that wait for one that failed are killed.

        Raises:
            TimeoutError: If it takes longer; all are killed.
        """
        deadline = time.monotonic() + seconds
        try:
            while (code := self.poll()) is None:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self.words} hangs: {self.said('err')}")
                time.sleep(0.01)
            end = time.monotonic() + 2  # for others to say what they have found
            while None in [p.exitcode for p in self._processes] and time.monotonic() < end:
                time.sleep(0.01)
        finally:
            self.kill()
        return code

    def kill(self) -> None:
        """Kill all processes and what they have started."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()  # one that has no group yet
            process.join()

    def said(self, stream: str, rank: int | None = None) -> str:
        """Return what a rank, or all in turn, wrote into ``out`` or ``err``."""
        logs = self._logs if rank is None else [self._logs[rank]]
        files = [Path(log[stream == "err"]) for log in logs]
        return "".join(f.read_text("utf-8", "replace") for f in files if f.exists())

    def ended(self, seconds: float) -> subprocess.CompletedProcess[str]:
        """Return what came of it when all has ended."""
        code = self.wait(seconds)
        out, err = self.said("out"), self.said("err")
        return subprocess.CompletedProcess(self.words, code, out, err)


def _serve() -> None:
    """Start the process that is forked, unless it runs: with these modules, and one thread."""
    _forks.set_forkserver_preload(["tests.preloaded"])
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
