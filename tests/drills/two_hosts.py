"""Two "hosts", network namespaces joined by a cable, on which a run is started as users start it.

``deepspeed --hostfile ... --no_ssh --node_rank R`` on each, and torchrun. Needs the right to make
network namespaces (root).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from drill import Cells, Skipped
from forks import outcome

from fastclr import checkpointing

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.213.77.1", "10.213.77.2")
CABLE = ("fclr0", "fclr1")
NAMES = (f"fastclr-{os.getpid()}-0", f"fastclr-{os.getpid()}-1")
WATCHDOG_SECONDS = 5
EPOCHS = 24
STEPS = 5 * EPOCHS
Parts = Iterator[tuple[str, Callable[[], str]]]
FLAGS = (
    f"--recipe demo --global-batch-size 16 --epochs {EPOCHS} --log-every 1 --checkpoint-every 10 "
    "--encoder.width 0.125 --encoder.stem small_stride2 --views.size 16 --head.output-dim 16 "
    f"--optimizer.warmup-epochs 1 --faults.watchdog-seconds {WATCHDOG_SECONDS}"
).split()


def ip(*words: str) -> None:
    """Run the ip command."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def hosts() -> Iterator[None]:
    """Make two hosts and the cable between them."""
    try:
        for name in NAMES:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ends = ("type", "veth", "peer", "name", CABLE[1], "netns", NAMES[1])
        ip("link", "add", CABLE[0], "netns", NAMES[0], *ends)
        for name, end, address in zip(NAMES, CABLE, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def try_all(cells: Cells, parts: Parts) -> None:
    """Try the parts of a drill on two hosts, each a cell; none where hosts cannot be made."""
    try:
        with hosts():
            for name, seen in parts:
                with cells.cell(name):
                    cells.notes.append(seen())
    except (OSError, subprocess.CalledProcessError) as error:
        raise Skipped(f"no network namespaces here: {error}") from error


def start(folder: Path, run_dir: Path, launcher: str) -> list[subprocess.Popen[str]]:
    """Start one rank on each host."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    processes = []
    for host in (0, 1):
        address = ["--master_addr", ADDRESSES[0], "--master_port", "29533"]
        if launcher == "deepspeed":
            begin = ["deepspeed", "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(host)]
        else:
            begin = ["torchrun", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(host)]
        processes.append(start_on(host, folder, run_dir, [*begin, *address]))
    return processes


def start_on(host: int, folder: Path, run_dir: Path, begin: list[str]) -> subprocess.Popen[str]:
    """Start a training on a host."""
    script = ["fastclr/train.py", "--ds-config", "fastclr/recipes/fp32.json", *FLAGS]
    script += ["--data.train", str(folder / "train"), "--run-dir", str(run_dir)]
    environ = {**os.environ, "GLOO_SOCKET_IFNAME": CABLE[host], "OMP_NUM_THREADS": "1"}
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    return subprocess.Popen(
        ["ip", "netns", "exec", NAMES[host], *begin, *script],
        cwd=ROOT,
        env=environ,
        stdout=(folder / f"host{host}.txt").open("w"),
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def said(folder: Path) -> str:
    """Return what both hosts said."""
    return "\n".join((folder / f"host{h}.txt").read_text(errors="replace") for h in (0, 1))


def wait(processes: list[subprocess.Popen[str]], seconds: float) -> list[int]:
    """Wait for both hosts; kill both if they take longer."""
    deadline = time.monotonic() + seconds
    try:
        return [p.wait(max(0.1, deadline - time.monotonic())) for p in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def phases(folder: Path, is_long: bool) -> Parts:
    """Yield what is tried, in order: the cable pulled; a whole training, plugged in again."""
    run_dir = folder / "cut"

    def whole() -> str:
        codes = wait(start(folder, folder / "whole", "deepspeed"), 120)
        assert codes == [0, 0], said(folder)
        return "trained"

    def pulled() -> str:
        processes = start(folder, run_dir, "deepspeed")
        deadline = time.monotonic() + 90
        while not (run_dir / "checkpoints/step-0000020").exists():
            assert time.monotonic() < deadline and processes[0].poll() is None, said(folder)
            time.sleep(0.01)
        ip("-n", NAMES[0], "link", "set", CABLE[0], "down")
        started = time.monotonic()
        codes = wait(processes, 60)
        seconds = time.monotonic() - started
        ip("-n", NAMES[0], "link", "set", CABLE[0], "up")
        assert codes == [76, 76], (codes, said(folder))
        saved = checkpointing.latest(run_dir / "checkpoints")
        assert saved is not None and saved.name < f"step-{STEPS:07d}"
        return f"both left after {seconds:.0f} s ({WATCHDOG_SECONDS} allowed)"

    def plugged_in() -> str:
        codes = wait(start(folder, run_dir, "torchrun"), 120)
        assert codes == [0, 0], said(folder)
        assert "going on from" in said(folder)
        assert outcome(run_dir) == outcome(folder / "whole"), "the end is another"
        return "gone on to the same end"

    yield "the cable pulled", pulled
    if is_long:
        yield "deepspeed", whole
        yield "plugged in, torchrun", plugged_in


def owners(folder: Path) -> Parts:
    """Yield what is tried, in order: a run that its host writes is begun on another one too."""
    run_dir, alone, there = folder / "owned", [sys.executable], "anna"
    # Only here: a name that nobody knows makes process groups of several ranks wait for a resolver.
    named = ["unshare", "--uts", "sh", "-c", f'hostname {there} && exec "$@"', "sh", *alone]
    first: list[subprocess.Popen[str]] = []

    def refused() -> str:
        first.append(start_on(0, folder, run_dir, named))
        deadline = time.monotonic() + 90
        while not (run_dir / "checkpoints/latest").exists():
            assert time.monotonic() < deadline and first[0].poll() is None, said(folder)
            time.sleep(0.01)
        os.killpg(first[0].pid, signal.SIGSTOP)
        started = time.monotonic()
        assert wait([start_on(1, folder, run_dir, alone)], 60) == [78], said(folder)
        seconds = time.monotonic() - started
        text = (folder / "host1.txt").read_text()
        for word in ("is being written", f" on {there} ", "process ", "run "):
            assert word in text, (word, text)
        return f"refused after {seconds:.0f} s, imports included"

    def goes_on() -> str:
        os.killpg(first[0].pid, signal.SIGCONT)
        assert wait(first, 120) == [0], said(folder)
        assert wait([start_on(1, folder, folder / "alone", alone)], 120) == [0], said(folder)
        assert outcome(run_dir) == outcome(folder / "alone"), "the end is another"
        return "the first went on to the same end"

    yield "another host", refused
    yield "the first one", goes_on
