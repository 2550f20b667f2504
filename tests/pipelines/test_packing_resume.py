"""Packing that is killed, interrupted or out of disk, and taken up again: the same bytes."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastclr.config import ConfigError
from pipelines import ustar
from pipelines.executors import run_in_processes
from pipelines.packing import facts_file, pack_shard
from pipelines.plan import Plan
from pipelines.shards import ShardSet
from pipelines.transform import Transform
from pipelines.writer import Packing
from tests.pipelines.packs import ROOT, files_of, packing

KILL = """
import os, signal, sys
from pathlib import Path
import pipelines.packing, pipelines.plan, pipelines.writer
from pipelines.plan import Settings
from pipelines.writer import Packing

def killer(function, at, calls=[]):
    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

module, name, at = sys.argv[3].split(":")
owner = getattr(pipelines, module)
for part in name.split(".")[:-1]:
    owner = getattr(owner, part)
last = name.split(".")[-1]
setattr(owner, last, killer(getattr(owner, last), int(at)))
Packing(Settings(sys.argv[1], "train", samples_per_shard=4), Path(sys.argv[2]), workers=1).run()
"""
POINTS = (
    "plan:write_json:1",
    "packing:check_and_decode:1",
    "packing:check_and_decode:23",
    "packing:_HashedFile.finish:10",
    "packing:write_json:1",
    "packing:write_json:10",
    "writer:write_json:1",
    "writer:sync:1",
    "writer:sync:2",
    "writer:_summary:1",
)


@pytest.mark.parametrize("point", POINTS)
def test_resuming_after_a_kill_gives_the_same_bytes(
    many: Path, many_packed: dict[str, bytes], target: Path, point: str
) -> None:
    done = subprocess.run([sys.executable, "-c", KILL, many, target, point], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    published = point in ("writer:sync:2", "writer:_summary:1")
    assert target.exists() == published, "only the rename makes the set appear"
    before = {p: p.stat().st_mtime_ns for p in target.parent.glob("*/set/*.tar")}
    if not published:
        with pytest.raises(ConfigError, match="--resume"):
            packing(many, target)
    kept = packing(many, target, run=False)
    summary = kept.run(resume=True)
    assert summary.num_samples == 40
    assert files_of(target) == many_packed and list(target.parent.iterdir()) == [target]
    finished = [p for p in before if p.name < "train-000005"] if "23" in point else []
    for file in finished:
        assert (target / file.name).stat().st_mtime_ns == before[file], "packed again"
    ShardSet.open(target).verify()


def test_a_worker_that_is_killed(many: Path, target: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"ended with -9.*fewer --workers"):
        list(run_in_processes(_die, str(tmp_path), range(4), 2))


def _die(work: str, number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom pipelines.executors import run_in_processes\n"
        "from tests_packing_job import wait\n"
        "for pid in run_in_processes(wait, '.', range(6), 2): print(pid, flush=True)\n"
    )
    (tmp_path / "tests_packing_job.py").write_text(
        "import os, time\ndef wait(work, number):\n    time.sleep(0.1)\n    return os.getpid()\n"
    )
    (tmp_path / "main.py").write_text(f"if __name__ == '__main__':\n    exec({program!r})")
    path = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    parent = subprocess.Popen([sys.executable, tmp_path / "main.py"], stdout=-1, env=path)
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
    for _ in range(100):
        if not _runs(pid):
            return
        signal.sigtimedwait([], 0.1)
    pytest.fail("a worker outlived the packing by 10 s")


def _runs(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_second_packing_of_the_same_target_is_refused(many: Path, target: Path) -> None:
    first = packing(many, target, run=False)
    said = []

    def second(_: int) -> None:
        if not said:
            with pytest.raises(ConfigError) as caught:
                packing(many, target, run=False).run(resume=True)
            said.append(str(caught.value))

    replace(first, on_images=second).run()
    assert "another packing is at work" in said[0]
    assert len(ShardSet.open(target)) == 40


def interrupted(source: Path, target: Path, **options: Any) -> Packing:
    """Pack three shards and stop."""
    made = packing(source, target, run=False, workers=1, **options)

    def stop(count: int, calls: list[int] = []) -> None:  # noqa: B006
        calls.append(count)
        if len(calls) % 4 == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="--resume goes on"):
        replace(made, on_images=stop).run()
    return made


def test_resuming_another_packing_is_refused(many: Path, target: Path) -> None:
    interrupted(many, target)
    for options in ({"seed": 1}, {"samples_per_shard": 5}, {"transform": Transform("png")}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            packing(many, target, run=False, **options).run(resume=True)


def test_resuming_with_another_source_is_refused(many: Path, target: Path, tmp_path: Path) -> None:
    source = shutil.copytree(many, tmp_path / "bilder")
    made = interrupted(source, target)
    (source / "a" / "neu.png").write_bytes((source / "a" / "0.png").read_bytes())
    with pytest.raises(ConfigError, match=r"lists other images.*rm -r"):
        made.run(resume=True)
    (source / "a" / "neu.png").unlink()
    assert made.run(resume=True).num_samples == 40


def test_resuming_what_was_never_begun_begins(many: Path, target: Path) -> None:
    assert packing(many, target, run=False).run(resume=True).num_samples == 40


def test_a_finished_set_is_not_taken_for_another_one(many: Path, target: Path) -> None:
    packing(many, target)
    with pytest.raises(ConfigError, match="not empty"):
        packing(many, target, run=False, seed=1).run(resume=True)


def test_the_plan_alone_is_enough(many: Path, target: Path, many_packed: dict[str, bytes]) -> None:
    """A shard packed twice at once, in any order, is the same."""
    made = interrupted(many, target)
    plan = Plan.load(made.work)
    for number in (9, 0, 5):
        assert pack_shard(str(made.work), number) == plan.shards[number][0] == 4
        assert facts_file(made.work, number).exists()
        name = f"train-{number:06d}.tar"
        assert (made.work / "set" / name).read_bytes() == many_packed[name]


# A full disk.


def test_a_full_disk_leaves_nothing_that_looks_whole(many: Path, target: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    command = [sys.executable, "tools/make_shards.py", many, "--out", target]
    done = subprocess.run(
        [*command, "--workers", "1"], cwd=ROOT, preexec_fn=limit, capture_output=True, text=True
    )
    assert done.returncode == 74 and "File too large" in done.stderr
    assert list(target.parent.iterdir()) == []
    resource_free = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert resource_free.returncode == 0


def test_a_disk_that_fills_later_can_be_resumed(
    many: Path, many_packed: dict[str, bytes], target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = iter([100] * 3)
    flush = ustar.end

    def full(size: int) -> bytes:
        if next(sizes, None) is None:
            raise OSError(28, "No space left on device")
        return flush(size)

    monkeypatch.setattr("pipelines.ustar.end", full)
    with pytest.raises(OSError, match=r"No space left on device .*--resume") as caught:
        packing(many, target, workers=1)
    assert caught.value.errno == 28
    (work,) = target.parent.iterdir()
    assert not list(work.glob(".train*")), "unfinished files were left"
    monkeypatch.undo()
    packing(many, target, run=False).run(resume=True)
    assert files_of(target) == many_packed
