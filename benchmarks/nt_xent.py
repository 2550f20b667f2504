"""Time and peak memory of NT-Xent, forward and backward: ours, other libraries', and the floor.

python benchmarks/nt_xent.py [--sizes 256 2048] [--dims 128] [--impls blocked lightly] [--out DIR]

The floor is what `blocked` cannot do without: its own matrix products and its own exponentials,
each alone, tile by tile. Rows are written as they are measured, then a page and a plot of them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import multiprocessing
import os
import resource
import shlex
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import torch
import torch.nn.functional as F
import tyro
from harness import facts, interleaved
from nt_xent_page import write_page
from peer_parts.nt_xent import IMPLEMENTATIONS, Loss
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fastclr.kernels.tiles import Keys, tiles

TEMPERATURE = 0.5
SMALL = 64  # images: of the check, and of the call before memory is measured
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-2  # relative; half precision is off by 0.1 %
OTHER_DIMS_UP_TO = 2048  # images
FEWEST_ROUNDS = 3
PROCESSES = 3  # whose highest memory counts: where an allocator puts blocks is chance
MEMORY_SHARE = 0.5  # of what is free, for one call

Row = dict[str, Any]


class Point(NamedTuple):
    """What is measured.

    Attributes:
        num_images: N; two rows each.
        dim: D, the width of projections.
        device: cpu or cuda.
    """

    num_images: int
    dim: int
    device: str

    def projections(self) -> list[torch.Tensor]:
        """Return the two views, each (N, D), the same at every call."""
        generator = torch.Generator().manual_seed(0)
        z_VND = torch.randn(2, self.num_images, self.dim, generator=generator).to(self.device)
        return [z_ND.clone().requires_grad_() for z_ND in z_VND]


class Call(NamedTuple):
    """One forward and backward in a fresh process.

    Attributes:
        seconds: Wall time; no other call of this size went before.
        extra_mib: Highest memory during the call less that before; None if the system hides it.
        loss: In nats.
    """

    seconds: float
    extra_mib: float | None
    loss: float


def forward_backward(loss: Loss, z: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return the loss and its gradients by both views."""
    value = loss(*z)
    return value.detach(), *torch.autograd.grad(value, z)


def check(names: Iterable[str], dim: int, device: str) -> dict[str, str]:
    """Compare loss and gradient with the reference, on few images.

    Returns:
        Why an implementation cannot run, by name.

    Raises:
        RuntimeError: If one runs and computes something else.
    """
    z, failed = Point(SMALL, dim, device).projections(), {}
    expected = forward_backward(IMPLEMENTATIONS["reference"].build(TEMPERATURE), z)
    for name in names:
        try:
            found = forward_backward(IMPLEMENTATIONS[name].build(TEMPERATURE), z)
        except Exception as error:
            failed[name] = reason(error)
            continue
        agree({"reference": float(expected[0]), name: float(found[0])})
        for right, wrong in zip(expected[1:], found[1:], strict=True):
            off = float((wrong - right).norm() / right.norm())
            if not off <= GRADIENT_TOLERANCE:
                raise RuntimeError(
                    f"{name}: the gradient is {off:.1e} off the reference's (relative), allowed "
                    f"{GRADIENT_TOLERANCE}: its time would be that of another function; mend its "
                    "adapter in peer_parts/nt_xent.py."
                )
    return failed


def agree(losses: Mapping[str, float]) -> None:
    """Raise RuntimeError unless all losses of the same data are the same."""
    for name, loss in losses.items():
        first, expected = next(iter(losses.items()))
        if not abs(loss - expected) <= LOSS_TOLERANCE * abs(expected):
            raise RuntimeError(
                f"{name}: the loss is {loss:.6f} where {first}'s is {expected:.6f}, relative "
                f"tolerance {LOSS_TOLERANCE}: its time would be that of another function; mend its "
                "adapter in peer_parts/nt_xent.py."
            )


def reason(error: Exception) -> str:
    """Return an error in a line; without a message, the line of code that raised it."""
    text, frames = str(error).strip(), traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {text.splitlines()[0] if text else frames[-1].line}"


class PeakMemory:
    """Highest memory of this process, or of the GPU, since it was made.

    Args:
        device: cpu or cuda.
    """

    def __init__(self, device: str) -> None:
        self.device, self.known = device, True
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM = VmRSS
        except OSError:
            self.known = False
        self.before = self._bytes("VmRSS")

    def extra_mib(self) -> float | None:
        """Return how much more than at the start."""
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else self._bytes("VmHWM")
        return (peak - self.before) / 2**20 if self.known else None

    @staticmethod
    def _bytes(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def call_once(name: str, point: Point, limit_bytes: int) -> Call:
    """Measure one call; to be run in a fresh process.

    Args:
        name: Key of IMPLEMENTATIONS.
        point: Its input.
        limit_bytes: How much more memory this process may take, on the CPU.
    """
    loss = IMPLEMENTATIONS[name].build(TEMPERATURE)
    z = point.projections()
    forward_backward(loss, point._replace(num_images=SMALL).projections())
    if point.device == "cpu":
        allowed = psutil.Process().memory_info().vms + limit_bytes
        resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    memory, start = PeakMemory(point.device), time.perf_counter()
    value = float(forward_backward(loss, z)[0])
    return Call(time.perf_counter() - start, memory.extra_mib(), value)


def call_or_reason(name: str, point: Point, limit_bytes: int) -> Call | str:
    """Return what call_once does, or why it cannot."""
    try:
        return call_once(name, point, limit_bytes)
    except Exception as error:
        gib = limit_bytes / 2**30
        return f"{reason(error)}; it may take {gib:.1f} GiB, {MEMORY_SHARE:.0%} of what is free"


def call_apart(name: str, point: Point) -> Call | str:
    """Run call_or_reason in a process that has computed nothing; on a GPU, in this one."""
    limit_bytes = int(psutil.virtual_memory().available * MEMORY_SHARE)
    if point.device == "cuda":
        return call_or_reason(name, point, limit_bytes)
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_call, args=(sender, name, point, limit_bytes))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return f"its process died, exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()


def call_with_most_memory(name: str, point: Point, processes: int) -> Call | str:
    """Return one of several calls apart, or why there is none."""
    calls = []
    for _ in range(processes):
        found = call_apart(name, point)
        if isinstance(found, str):
            return found
        calls.append(found)
    return max(calls, key=lambda call: call.extra_mib or 0)


def _send_call(sender: Connection, name: str, point: Point, limit_bytes: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who waits for this process ends it
    sender.send(call_or_reason(name, point, limit_bytes))


def floor(point: Point) -> dict[str, Callable[[], object]]:
    """Return the matrix products of `blocked` alone, and its exponentials alone.

    Both go through its tiles in its order: a forward and a backward pass, upper triangle only.
    """
    rows_MD = F.normalize(torch.cat(point.projections()).detach(), dim=1) * TEMPERATURE**-0.5
    keys, gradient_MD = Keys(rows_MD, [point.num_images], 0), torch.zeros_like(rows_MD)
    shapes = [tile.s_block.shape for tile in tiles(rows_MD, keys, symmetric=True)]
    widest = max(shapes, key=lambda shape: shape.numel())
    source = (rows_MD[: widest[0]] @ rows_MD[: widest[1]].T).flatten()
    result = torch.empty_like(source)

    def products() -> None:
        for _ in tiles(rows_MD, keys, symmetric=True):
            pass
        for tile in tiles(rows_MD, keys, symmetric=True):
            gradient_MD[tile.rows].addmm_(tile.s_block, rows_MD[tile.columns])
            if tile.mirrored:
                gradient_MD[tile.columns].addmm_(tile.s_block.T, rows_MD[tile.rows])

    def exponentials() -> None:
        for shape in shapes * 2:
            torch.exp(source[: shape.numel()], out=result[: shape.numel()])

    return {"products": products, "exponentials": exponentials}


@dataclass
class Session:
    """One run of the benchmark.

    Attributes:
        names: Implementations.
        device: cpu or cuda.
        repeats: Most rounds of a point.
        seconds: Aim for the rounds of a point.
        path: JSONL that rows are appended to.
        say: Takes a line for people.
        rows: All of them so far.
    """

    names: Sequence[str]
    device: str
    repeats: int
    seconds: float
    path: Path
    say: Callable[[str], None]
    rows: list[Row] = field(default_factory=list)

    def keep(self, name: str, point: Point, **measured: Any) -> None:
        """Append one row, on disk before this returns."""
        package = IMPLEMENTATIONS[name].package
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = None
        row = {"implementation": name, "library": package, "version": version}
        self.rows.append({**row, **point._asdict(), **measured, **facts()})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        result = measured.get("error") or f"{measured['median_ms']:,.1f} ms"
        self.say(f"{name:16} N = {point.num_images:6,}  D = {point.dim:4}  {result}")

    def calls(
        self, names: Iterable[str], point: Point, failed: dict[str, str], processes: int
    ) -> dict[str, Call]:
        """Call each apart; note, and leave out from now on, what fails."""
        calls = {}
        for name in names:
            if name in failed:
                continue
            found = call_with_most_memory(name, point, processes)
            if isinstance(found, Call):
                calls[name] = found
            else:
                failed[name] = found
                self.keep(name, point, error=found)
        agree({name: call.loss for name, call in calls.items()})
        return calls

    def compare(self, point: Point, failed: dict[str, str]) -> None:
        """Measure all implementations and the floor in turn."""
        calls = self.calls(self.names, point, failed, PROCESSES)
        if not calls:
            return
        z, functions = point.projections(), floor(point)
        for name in calls:
            loss = IMPLEMENTATIONS[name].build(TEMPERATURE)
            functions[name] = lambda loss=loss: forward_backward(loss, z)
        aim = int(self.seconds / sum(call.seconds for call in calls.values()))
        rounds = max(FEWEST_ROUNDS, min(self.repeats, aim))
        seconds = interleaved(functions, rounds, warm_ups=1)
        parts = [seconds.pop("products"), seconds.pop("exponentials")]
        floors_ms = [1e3 * (a + b) for a, b in zip(*parts, strict=True)]
        for name, call in calls.items():
            rounds_ms = [1e3 * s for s in seconds[name]]
            ratios = [ms / least for ms, least in zip(rounds_ms, floors_ms, strict=True)]
            self.keep(
                name, point, **spread(rounds_ms), extra_mib=call.extra_mib, loss=call.loss,
                floor_ms=statistics.median(floors_ms), floor_ratio=statistics.median(ratios),
                products_ms=1e3 * statistics.median(parts[0]),
                exponentials_ms=1e3 * statistics.median(parts[1]),
            )  # fmt: skip

    def once(self, point: Point, failed: dict[str, str]) -> None:
        """Measure one call of each that keeps no matrix."""
        lean = [name for name in self.names if not IMPLEMENTATIONS[name].keeps_matrix]
        for name, call in self.calls(lean, point, failed, processes=1).items():
            times = spread([1e3 * call.seconds])
            self.keep(name, point, **times, extra_mib=call.extra_mib, loss=call.loss)


def spread(rounds_ms: list[float]) -> Row:
    """Return the fields of a row that tell times, in milliseconds."""
    return {
        "median_ms": statistics.median(rounds_ms),
        "lowest_ms": min(rounds_ms),
        "highest_ms": max(rounds_ms),
        "rounds_ms": rounds_ms,
    }


def benchmark(
    sizes: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192),
    dims: tuple[int, ...] = (128, 64, 512),
    large_sizes: tuple[int, ...] = (16384, 32768, 65536),
    impls: tuple[str, ...] | None = None,
    repeats: int = 7,
    seconds: float = 15,
    device: Literal["cpu", "cuda"] = "cpu",
    out: Path = Path(__file__).parent / "results",
) -> None:
    """Measure the implementations of NT-Xent side by side.

    Args:
        sizes: Numbers of images N (two rows each), for all implementations.
        dims: Widths D of projections: the first at all sizes, the others up to 2,048 images.
        large_sizes: More N at the first width, for one call of what keeps no matrix.
        impls: Which implementations; if not given, all that suit the device.
        repeats: Most rounds of a point; a round calls every implementation once.
        seconds: Aim for the rounds of a point; at least 3 are made.
        device: cpu or cuda.
        out: Folder of nt_xent_<device>.jsonl, .md and .svg.
    """
    names = impls or tuple(n for n in IMPLEMENTATIONS if device == "cuda" or n != "triton")
    if unknown := set(names) - set(IMPLEMENTATIONS):
        raise SystemExit(f"error: unknown {unknown}: choose from {', '.join(IMPLEMENTATIONS)}.")
    if not sizes or not dims or min(*sizes, *large_sizes, *dims) < 2 or repeats < FEWEST_ROUNDS:
        raise SystemExit("error: give sizes and dims of at least 2 and at least 3 repeats.")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"nt_xent_{device}.jsonl"
    path.write_text("", encoding="utf-8")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            say = functools.partial(progress.console.print, markup=False, soft_wrap=True)
            session = Session(names, device, repeats, seconds, path, say)
            measure(session, sizes, dims, large_sizes, progress)
    except KeyboardInterrupt:
        print(f"stopped: the rows so far are in {path}", file=sys.stderr)
        raise SystemExit(130) from None
    print(write_page(session.rows, dims[0], path, shlex.join(sys.argv[1:])))


def measure(
    session: Session,
    sizes: Sequence[int],
    dims: Sequence[int],
    large_sizes: Sequence[int],
    progress: Progress,
) -> None:
    """Check all implementations, then measure all points; see :func:`benchmark`."""
    modules = [IMPLEMENTATIONS[name].module for name in session.names]
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
    failed = {dim: check(session.names, dim, session.device) for dim in dims}
    for dim, reasons in failed.items():
        for name, why in reasons.items():
            session.keep(name, Point(SMALL, dim, session.device), error=why)
    plan = [
        (session.compare, Point(size, dim, session.device))
        for dim in dims
        for size in sorted({*sizes})
        if dim == dims[0] or size <= OTHER_DIMS_UP_TO
    ]
    large = [Point(size, dims[0], session.device) for size in sorted({*large_sizes} - {*sizes})]
    plan += [(session.once, point) for point in large]
    for run, point in progress.track(plan, description="points"):
        run(point, failed[point.dim])


if __name__ == "__main__":
    tyro.cli(benchmark)
