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

from forks import outcome

from fastclr import checkpointing

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.213.77.1", "10.213.77.2")
CABLE = ("fclr0", "fclr1")
NAMES = (f"fastclr-{os.getpid()}-0", f"fastclr-{os.getpid()}-1")
WATCHDOG_SECONDS = 5
FLAGS = (
    "--recipe demo --global-batch-size 16 --epochs 24 --log-every 1 --checkpoint-every 10 "
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


def start(folder: Path, run_dir: Path, launcher: str) -> list[subprocess.Popen[str]]:
    """Start one rank on each host."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    script = ["fastclr/train.py", "--ds-config", "fastclr/recipes/fp32.json", *FLAGS]
    script += ["--data.train", str(folder / "train"), "--run-dir", str(run_dir)]
    processes = []
    for host, name in enumerate(NAMES):
        address = ["--master_addr", ADDRESSES[0], "--master_port", "29533"]
        if launcher == "deepspeed":
            begin = ["deepspeed", "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(host)]
        else:
            begin = ["torchrun", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(host)]
        environ = {**os.environ, "GLOO_SOCKET_IFNAME": CABLE[host], "OMP_NUM_THREADS": "1"}
        environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *begin, *address, *script],
                cwd=ROOT,
                env=environ,
                stdout=(folder / f"host{host}.txt").open("w"),
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    return processes


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


def phases(folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield what is tried, in order: trained whole, with the cable pulled, plugged in again."""
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
        assert saved is not None
        assert saved.name < f"step-{outcome(folder / 'whole')['step']:07d}"
        return f"both left after {seconds:.0f} s ({WATCHDOG_SECONDS} allowed)"

    def plugged_in() -> str:
        codes = wait(start(folder, run_dir, "torchrun"), 120)
        assert codes == [0, 0], said(folder)
        assert "going on from" in said(folder)
        assert outcome(run_dir) == outcome(folder / "whole"), "the end is another"
        return "gone on to the same end"

    yield "deepspeed", whole
    yield "the cable pulled", pulled
    yield "plugged in, torchrun", plugged_in
