"""A: writing a checkpoint. Killed at any call, on a full disk, slowly, by two at once."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import two_hosts
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from drill import Cells, Drill
from forks import Ranks, outcome, train
from tracing import SAVED, SAVING, WRITING, begun, need_strace, stopped, traced

from fastclr import checkpointing, fencing
from fastclr.checkpointing import list_checkpoints, read_facts

OLD, NEW = f"step-{SAVED:07d}", f"step-{SAVING:07d}"
EVER = 10**6
_MOUNTS = 0x20000  # CLONE_NEWNS


def killed_at_every_call(cells: Cells) -> None:
    """A2: SIGKILL at each call of a save that writes; the old or the new checkpoint is there."""
    need_strace()
    start, log, run_dir = begun(cells.folder), cells.folder / "strace.txt", cells.folder / "run"
    points = _points(cells.folder, start, log, run_dir)
    chosen = points
    if not cells.is_long:
        chosen = sorted(cells.generator.sample(points, min(30, len(points))))
    found = Counter[str]()
    for name, flags in chosen:
        with cells.cell(name):
            run = stopped(cells.folder, _copy(start, run_dir))
            code = traced(run, *flags)
            assert code in (0, -signal.SIGKILL), (code, run.said())
            checkpoint = checkpointing.latest(run_dir / "checkpoints")
            assert checkpoint is not None and checkpoint.name in (OLD, NEW), checkpoint
            found[f"{checkpoint.name} after {'a kill' if code else 'the end'}"] += 1
            if checkpoint.name == OLD:
                facts = [read_facts(d / "checkpoints" / OLD) for d in (start, run_dir)]
                assert facts[0] == facts[1]
    cells.notes.append(f"{len(points)} calls, {len(chosen)} tried: " + ", ".join(
        f"{n} x {what}" for what, n in sorted(found.items())))  # fmt: skip


def _points(
    folder: Path, start: Path, log: Path, run_dir: Path
) -> list[tuple[str, tuple[str, ...]]]:
    """Return the writing calls of a save by name, each with strace's flags for a kill at it.

    Threads sync the files, each one once: those calls are told apart by their path. All others are
    the main thread's, and counted.
    """
    main, lines = _traced_save(folder, start, log)
    counts = Counter(text.split("(")[0] for thread, text in lines if thread == main and "(" in text)
    synced = {path for _, text in lines for path in re.findall(r"^f(?:data)?sync\(\d+<(.*)>", text)}
    points = []
    for call in counts.keys() - {"fsync", "fdatasync"}:
        for k in range(1, counts[call] + 1):
            kill = ("-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={k}")
            points.append((f"{call} {k}", kill))
    for path in synced:
        mine = path.replace(str(folder / "counted"), str(run_dir))
        kill = ("-P", mine, "-e", "trace=fsync", "-e", "inject=fsync:signal=SIGKILL")
        points.append((f"fsync of {Path(mine).relative_to(run_dir)}", kill))
    return sorted(points)


def _traced_save(folder: Path, start: Path, log: Path) -> tuple[str, list[tuple[str, str]]]:
    """Return the main thread's id, and (thread, call) of all writing calls of a whole save."""
    run = stopped(folder, _copy(start, folder / "counted"))
    assert traced(run, "-e", f"trace={','.join(WRITING)}", log=log) == 0, run.said()
    found = [line.split(None, 1) for line in log.read_text(errors="replace").splitlines()]
    return str(run.ids[0]), [(thread, text) for thread, text in found]


def _copy(start: Path, run_dir: Path) -> Path:
    shutil.rmtree(run_dir, ignore_errors=True)
    return shutil.copytree(start, run_dir)


def order_of_calls(cells: Cells) -> None:
    """A3: every file is on the disk before the name, the name before the pointer."""
    need_strace()
    _, calls = _traced_save(cells.folder, begun(cells.folder), cells.folder / "strace.txt")
    lines = [text for _, text in calls]
    part = rf".*{re.escape(f'.{NEW}.2.partial')}"

    def last(pattern: str) -> int:
        found = [n for n, line in enumerate(lines) if re.match(pattern, line)]
        assert found, f"no {pattern}"
        return found[-1]

    def synced(path: str) -> int:
        """Return where a sync ended: calls of other threads may stand in between."""
        begun_at = last(rf"f(?:data)?sync\(\d+<{path}>")
        if "<unfinished" not in lines[begun_at]:
            return begun_at
        later = range(begun_at + 1, len(calls))
        return next(
            n for n in later if calls[n][0] == calls[begun_at][0] and "sync resumed" in lines[n]
        )

    final = last(rf'rename\w*\({part}", .*{NEW}"')
    pointer = last(r'rename\w*\(.*\.latest\.2\.partial", .*latest"')
    writes = r"(?:p?write(?:64|v)?)\(\d+<"
    made = cells.folder / "counted/checkpoints" / NEW
    names = sorted(p.name for p in made.iterdir() if p.name != checkpointing.FACTS)
    listed = last(rf"{writes}{part}/fastclr\.json>")
    for name in names:
        with cells.cell(name):
            path = f"{part}/{re.escape(name)}"
            # safetensors writes under another name and renames.
            wrote = last(rf"{writes}{path}>|rename.*{path}\"\)")
            assert wrote < listed and wrote < synced(path) < final
    with cells.cell("list, folders, pointer"):
        assert listed < synced(f"{part}/fastclr\\.json") < final
        assert listed < last(rf"fsync\(\d+<{part}>") < final and synced(part) < final
        assert final < synced(".*/checkpoints") < pointer
        assert synced(r".*/\.latest\.2\.partial") < pointer
    cells.notes.append(f"{len(names)} files, {len(lines)} calls")


def a_slow_rank(cells: Cells) -> None:
    """A4: while rank 1 still writes, nothing names the new one; killed there, all is well."""
    folder, run_dir = cells.folder, cells.folder / "slow"
    whole = Ranks(folder, 2, partial(train, folder, folder / "whole", 1))
    assert whole.wait() and not any(whole.codes), whole.said()
    save = TorchCheckpointEngine.save

    def slow(self: Any, *args: Any, **options: Any) -> None:
        if os.environ["RANK"] == "1" and NEW in str(args) + str(options.get("path")):
            time.sleep(10)
        save(self, *args, **options)

    with mock.patch.object(TorchCheckpointEngine, "save", slow):
        run = Ranks(folder, 2, partial(train, folder, run_dir, 1))
    run.wait_for(run_dir / f"checkpoints/.{NEW}.1.partial")
    time.sleep(1)
    for poll in range(20):
        with cells.cell(f"poll {poll}"):
            assert (run_dir / "checkpoints/latest").read_text() == f'"{OLD}"'
            assert checkpointing.verified(run_dir / "checkpoints" / OLD)
            assert not (run_dir / "checkpoints" / NEW).exists()
        time.sleep(0.05)
    run.kill()
    with cells.cell("gone on with"):
        run = Ranks(folder, 2, partial(train, folder, run_dir, 1))
        assert run.wait() and run.codes == [0, 0], run.said()
        assert outcome(run_dir) == outcome(folder / "whole")


def a_full_disk(cells: Cells) -> None:
    """A8: the old checkpoint stands, the new one leaves nothing, all ranks leave with 74."""
    start, folder = begun(cells.folder), cells.folder
    whole = Ranks(folder, 1, partial(train, folder, folder / "whole"))
    assert whole.wait() and not any(whole.codes), whole.said()
    expected = outcome(folder / "whole")

    def ended(run: Ranks, run_dir: Path, *words: str) -> None:
        """Check how it ended, and that it goes on once there is room."""
        assert set(run.codes) == {74}, (run.codes, run.said())
        for word in (str(run_dir / "checkpoints"), "free on its disk", *words):
            assert word in run.said(), (word, run.said())
        assert "Traceback" not in run.said(), run.said()
        left = {p.name for p in (run_dir / "checkpoints").iterdir()}
        left -= {"zero_to_fp32.py", "zero_to_torch.py"}  # DeepSpeed's, at every save under ZeRO
        assert left == {"latest", OLD}, left
        assert checkpointing.verified(run_dir / "checkpoints" / OLD)

    def goes_on(run_dir: Path, work: Callable[[], object]) -> None:
        again = Ranks(folder, 1, work)
        assert again.wait() and again.codes == [0], again.said()
        assert outcome(run_dir) == expected

    with cells.cell("a file may not grow"):
        run_dir = _copy(start, folder / "limited")
        with mock.patch.object(checkpointing, "save", _limited(checkpointing.save)):
            run = Ranks(folder, 1, partial(train, folder, run_dir))
        assert run.wait(30), run.said()
        ended(run, run_dir)
        goes_on(run_dir, partial(train, folder, run_dir))
    _on_small_disks(cells, start, ended, goes_on)
    need_strace()
    part = f".{NEW}.2.partial"
    for call, error, name in (
        ("/rename", "ENOSPC", "model.safetensors"),
        ("/rename", "EDQUOT", "lars.safetensors"),
        ("write", "ENOSPC", "mp_rank_00_model_states.pt"),
        ("fsync", "EIO", "model.safetensors"),
        ("fsync", "ENOSPC", "mp_rank_00_model_states.pt"),
        ("write", "EIO", "fastclr.json"),
    ):
        with cells.cell(f"{error} at a {call} of {name}"):
            run_dir = _copy(start, folder / "broken")
            run = stopped(folder, run_dir)
            path = run_dir / "checkpoints" / part / name
            traced(
                run, "-P", str(path), "-e", f"trace={call}", "-e", f"inject={call}:error={error}"
            )
            hidden = name.endswith(".pt") and call == "write"  # torch does not say which error
            ended(run, run_dir, name if hidden else os.strerror(getattr(errno, error)))
            goes_on(run_dir, partial(train, folder, run_dir))


def _limited(save: Callable[..., Path]) -> Callable[..., Path]:
    """Return a save during which no file may have more than 20 kB."""

    def limited(engine: Any, folder: Path, facts: Any, *args: Any, **options: Any) -> Path:
        if facts["step"] == SAVING:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            return save(engine, folder, facts, *args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    return limited


def _on_small_disks(cells: Cells, start: Path, ended: Callable, goes_on: Callable) -> None:
    """Train on disks of a namespace of this process's own, which go with it."""
    if os.geteuid() or ctypes.CDLL(None).unshare(_MOUNTS):
        cells.notes.append("no disks of its own here: root only")
        return

    def mount(*words: str) -> None:
        subprocess.run(["mount", *words], check=True, capture_output=True)

    mount("--make-rprivate", "/")
    need = sum(p.stat().st_size for p in (start / "checkpoints" / OLD).iterdir())
    for ranks in (1, 2):
        with cells.cell(f"a disk with room for one and a half, {ranks} ranks"):
            disk, begin = cells.folder / f"disk{ranks}", start if ranks == 1 else None
            disk.mkdir()
            begin = begin or begun(cells.folder, 2, 1)
            used = sum(p.stat().st_size for p in begin.rglob("*") if p.is_file())
            mount("-t", "tmpfs", "-o", f"size={used + need // 2}", "tmpfs", str(disk))
            run_dir, folder = _copy(begin, disk / "run"), cells.folder
            work = partial(train, folder, run_dir, ranks - 1)
            run, started = Ranks(folder, ranks, work), time.monotonic()
            assert run.wait(45), run.said()
            ended(run, run_dir, "free on its disk: 0 MiB")
            cells.notes.append(f"{ranks} ranks left in {time.monotonic() - started:.0f} s")
            mount("-o", f"remount,size={10 * (used + need)}", str(disk))
            if ranks == 1:
                goes_on(run_dir, work)
    with cells.cell("a disk that becomes read-only"):
        disk = cells.folder / "read_only"
        disk.mkdir()
        mount("-t", "tmpfs", "tmpfs", str(disk))
        run_dir = disk / "run"
        run = Ranks(cells.folder, 1, partial(train, cells.folder, run_dir, epochs=EVER))
        run.wait_for(run_dir / "checkpoints" / OLD)
        # Files that are open for writing forbid a remount: a second mount on top of it does not.
        os.kill(run.ids[0], signal.SIGSTOP)
        mount("--bind", str(disk), str(disk))
        mount("-o", "remount,ro,bind", str(disk))
        os.kill(run.ids[0], signal.SIGCONT)
        assert run.wait(30) and run.codes == [74], (run.codes, run.said())
        assert "error: " in run.said() and "Read-only" in run.said(), run.said()
        assert checkpointing.latest(run_dir / "checkpoints") is not None


def two_writers(cells: Cells) -> None:
    """A9: the second is refused by name; who was passed over saves nothing more."""
    folder, run_dir = cells.folder, cells.folder / "owned"
    whole = Ranks(folder, 1, partial(train, folder, folder / "whole"))
    assert whole.wait() and not any(whole.codes), whole.said()
    # Each half as fast as it could be, so that it lives long enough.
    with mock.patch.object(checkpointing, "sync", lambda _: time.sleep(0.3)):
        (folder / "first").mkdir()
        first = Ranks(folder / "first", 1, partial(train, folder, run_dir))
    first.wait_for(run_dir / "checkpoints/latest")
    first.signal(signal.SIGSTOP)
    with cells.cell("a second start while the first lives, though stopped"):
        started = time.monotonic()
        second = Ranks(folder, 1, partial(train, folder, run_dir))
        assert second.wait(10) and second.codes == [78], (second.codes, second.said())
        for word in (f"process {first.ids[0]}", "being written", "run ", os.uname().nodename):
            assert word in second.said(), (word, second.said())
        cells.notes.append(f"refused in {time.monotonic() - started:.1f} s")
    with cells.cell("passed over, it wakes and saves nothing"):
        (run_dir / fencing.LOCK).unlink()  # as the message says for a host that is gone
        later = Ranks(folder, 1, partial(train, folder, run_dir))
        assert later.wait() and later.codes == [0], later.said()
        before = {p: p.stat().st_mtime_ns for p in (run_dir / "checkpoints").rglob("*")}
        first.signal(signal.SIGCONT)
        assert first.wait(30) and first.codes == [78], (first.codes, first.said())
        assert "taken over from start 1" in first.said(), first.said()
        after = {p: p.stat().st_mtime_ns for p in (run_dir / "checkpoints").rglob("*")}
        assert {p: t for p, t in after.items() if p.is_file()} == {
            p: t for p, t in before.items() if p.is_file()
        }
        assert outcome(run_dir) == outcome(folder / "whole")
    with cells.cell("an owner that died is no owner"):
        run_dir = folder / "dead"
        run = Ranks(folder, 1, partial(train, folder, run_dir, epochs=EVER))
        run.wait_for(run_dir / "checkpoints/latest")
        run.kill()
        next_one = Ranks(folder, 1, partial(train, folder, run_dir, epochs=EVER))
        next_one.wait_for(run_dir / "checkpoints/step-0000020")
        next_one.kill()


def two_hosts_write(cells: Cells) -> None:
    """A9b: the second start is on another host, which shares the folder."""
    two_hosts.try_all(cells, two_hosts.owners(cells.folder))


def kept_checkpoints(cells: Cells) -> None:
    """A13: the last k, each multiple, and nothing else."""
    folder, run_dir = cells.folder, cells.folder / "kept"
    work = partial(train, folder, run_dir, checkpoint_every=1, keep_checkpoints=2, keep_every=4)
    run = Ranks(folder, 1, work)
    assert run.wait() and not any(run.codes), run.said()
    with cells.cell("which are kept"):
        steps = [int(p.name.split("-")[1]) for p in list_checkpoints(run_dir / "checkpoints")]
        assert steps == [4, 8, 12, 14, 15], steps
    with cells.cell("another run begun from one"):
        start = run_dir / "checkpoints/step-0000008"
        begin = folder / "begin"
        run = Ranks(folder, 1, partial(train, folder, begin, start_from=str(start)))
        assert run.wait() and not any(run.codes), run.said()
        ends = [read_facts(p / "checkpoints/step-0000015")["sha256"] for p in (run_dir, begin)]
        assert ends[0]["model.safetensors"] == ends[1]["model.safetensors"]


DRILLS = {
    "A2": Drill(
        "killed at each writing call of a save: exactly the old or the new checkpoint loads",
        killed_at_every_call,
        180,
        1800,
    ),
    "A3": Drill(
        "each file, their list and folder synced < rename < folder synced < pointer",
        order_of_calls,
        60,
    ),
    "A4": Drill(
        "no pointer moves before the slowest rank has written; killed there, it goes on",
        a_slow_rank,
        180,
    ),
    "A8": Drill(
        "disk full, quota, broken or read-only: 74 on all ranks, the old checkpoint stands",
        a_full_disk,
        180,
    ),
    "A9": Drill(
        "one writer a run: the second 78 by name, one that was passed over saves nothing",
        two_writers,
        90,
    ),
    "A9b": Drill(
        "one writer a run on two hosts: the second 78 by host, the first goes on",
        two_hosts_write,
        300,
        is_long_only=True,  # starts of whole programs; A9 is the same on one host
    ),
    "A13": Drill("the last k checkpoints, each multiple, nothing else", kept_checkpoints, 60),
}
