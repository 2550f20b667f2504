"""Run the drills: break runs, data, storage, files in every way; each must end as it promises.

python tests/drills/run.py [--tier P] [--only A1,C3] [--seed 0] [--out FOLDER]

Tier P is for every change, L for a release: more kills, flips and cuts. One line a drill: name,
seed, cells that passed of all, seconds, the slowest cell, what was seen. Each is a process of its
own under a hard limit that fails it instead of waiting; what it leaves running is killed and fails
it too. The exit code is 1 if one fails. With --out each result is added to ``drills.jsonl`` and
``drills.md`` there, in the place of an older one of its drill. Traffic stays on loopback or in
network namespaces; some drills need root, strace or the like, and are left out with the reason
where that is missing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import a_checkpoints
import a_saves
import b_data
import c_damage
import d_storage
import e_neighbours
import e_ranks
import f_numbers
import g_resources
import h_security
import psutil
from drill import Cells, Drill, Skipped
from forks import small_data
from results import Result, add
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

GROUPS = (
    a_checkpoints, a_saves, b_data, c_damage, d_storage, e_ranks, e_neighbours, f_numbers,
    g_resources, h_security,
)  # fmt: skip
DRILLS: dict[str, Drill] = {name: drill for group in GROUPS for name, drill in group.DRILLS.items()}
_SUBREAPER = 36  # prctl: orphans become children of this process, not of init


def run(name: str, base: Path, seed: int, is_long: bool) -> Result:
    """Run a drill in a child process."""
    drill = DRILLS[name]
    limit = drill.long_seconds if is_long and drill.long_seconds else drill.seconds
    folder, started = base / name, time.monotonic()
    folder.mkdir()
    (folder / "train").symlink_to(base / "train")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _be(drill, Cells(folder, seed, is_long), writing, folder / "drill.txt")
    os.close(writing)
    ended = _wait(child, limit)
    with os.fdopen(reading, "rb") as stream:
        os.set_blocking(stream.fileno(), False)  # an orphan may hold the other end
        raw = stream.read() or b""
    left = _end_all()
    seconds = time.monotonic() - started
    try:
        found = json.loads(raw)
    except ValueError:
        log = (folder / "drill.txt").read_text(errors="replace")[-1500:]
        why = "it ended without a word" if ended else f"it took more than {limit:.0f} s"
        found = {"num_cells": 1, "num_failed": 1, "failures": [f"{why}: {log}"]}
        found |= {"slowest": seconds, "seen": ""}
    if left and not found.get("skipped"):
        found["num_failed"] += 1
        found["failures"].append(f"it left processes: {'; '.join(left)[:500]}")
    return Result(name, seed, seconds=seconds, **found)


def _be(drill: Drill, cells: Cells, writing: int, log: Path) -> None:
    """Be the child that runs a drill; never returns."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    skipped = ""
    try:
        drill.run(cells)
    except Skipped as reason:
        skipped = str(reason)
    except BaseException as error:
        traceback.print_exc()
        cells.num_cells = max(1, cells.num_cells)
        cells.failures.append(f"the drill itself: {type(error).__name__}: {error}")
    found = {
        "num_cells": cells.num_cells, "num_failed": len(cells.failures),
        "failures": cells.failures[:20], "slowest": cells.slowest,
        "seen": "; ".join(cells.notes), "skipped": skipped,
    }  # fmt: skip
    os.write(writing, json.dumps(found).encode())
    sys.stdout.flush()
    os._exit(0)


def _wait(child: int, limit: float) -> bool:
    """Wait for a drill; return whether it ended in time."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, _ = os.waitpid(child, os.WNOHANG)
        if done:
            return True
        time.sleep(0.02)
    return False


def _end_all() -> list[str]:
    """Kill every process that a drill left, and say which."""
    left = []
    deadline = time.monotonic() + 2  # ranks that were told to leave may be about to
    while children := psutil.Process().children(recursive=True):
        alive = [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]
        if time.monotonic() > deadline:
            for process in alive:
                with suppress(psutil.Error):
                    left.append(" ".join(process.cmdline())[-80:] or process.name())
                    process.send_signal(signal.SIGCONT)
                    process.kill()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)
    return left


@contextmanager
def progress(count: int) -> Iterator[Progress]:
    """Show a bar on a terminal; results are plain lines anywhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console()
    bar = Progress(*columns, TimeElapsedColumn(), console=console, auto_refresh=False,
                   disable=not console.is_terminal)  # fmt: skip
    with bar:  # without a thread: drills are forks of this process
        bar.add_task("drills", total=count)
        yield bar


def main() -> int:
    """Parse the flags and run."""
    parser = argparse.ArgumentParser(description="Break everything; see that it ends well.")
    parser.add_argument("--tier", choices=("P", "L"), default="P", help="how much (default: P)")
    parser.add_argument("--only", default="", help="names of drills, A1,C3 (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    parser.add_argument(
        "--out", type=Path, help="folder whose drills.md and drills.jsonl the results are added to"
    )
    args = parser.parse_args()
    wanted = [name for name in args.only.split(",") if name]
    if unknown := sorted(set(wanted) - set(DRILLS)):
        parser.error(f"no drill {', '.join(unknown)}; there are {', '.join(DRILLS)}")
    is_long = args.tier == "L"
    names = wanted or [n for n, d in DRILLS.items() if is_long or not d.is_long_only]
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    results, started = [], time.monotonic()
    with small_data() as base, progress(len(names)) as bar:
        for name in names:
            bar.update(bar.task_ids[0], description=name, refresh=True)
            result = run(name, base, args.seed, is_long)
            results.append(result)
            if args.out:
                add(args.out, result, args.tier, {n: d.what for n, d in DRILLS.items()})
            bar.console.print(
                result.line(DRILLS[name].what), markup=False, highlight=False, soft_wrap=True
            )
            for failure in result.failures:
                bar.console.print(f"     {failure}", markup=False, highlight=False, soft_wrap=True)
            bar.advance(bar.task_ids[0])
    seconds = time.monotonic() - started
    failed = [r.name for r in results if r.failures]
    print(
        f"{len(results)} drills, {sum(r.num_cells for r in results)} cells in {seconds:.0f} s: "
        f"{'failed: ' + ', '.join(failed) if failed else 'all passed'}"
        f"{', skipped: ' * bool([r for r in results if r.skipped])}"
        f"{', '.join(r.name for r in results if r.skipped)}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
