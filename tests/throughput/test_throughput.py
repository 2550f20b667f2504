"""Where the time goes: timeline, account, search, files; all of it on a machine made up."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fastclr import ds_config, runs, train
from fastclr.config import Config, ConfigError, HeadConfig
from fastclr.recipes import RECIPES
from fastclr.world import World
from pipelines import SimCLRPolicy, make_loader, shards
from pipelines.photos import write_photo_tiles
from pipelines.writer import write_shards

Import = Callable[[str], ModuleType]


@pytest.fixture
def part() -> Import:
    """Import a part; torch takes seconds."""
    return lambda name: importlib.import_module(f"fastclr.throughput.{name}")


def test_each_moment_belongs_to_the_innermost_stage(
    part: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks_module, torch = part("marks"), importlib.import_module("torch")
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(marks_module.time, "perf_counter", lambda: clock.now)
    marks = marks_module.Marks(torch.device("cpu"))

    def passes(seconds: float) -> None:
        clock.now += seconds

    marks.lap("marked", True)
    passes(1)  # nobody's
    with marks.during("outer"):
        passes(2)
        marks.within("inner", passes)(4)
        passes(8)
        marks.switch("later")
        passes(16)
    passes(0.5)  # nobody's again
    marks.switch("end")
    passes(32)
    marks.lap("plain", False)
    with marks.during("outer"):
        passes(64)
    marks.lap("open", True)
    passes(128)
    found = {"not explained": 1.5, "outer": 10, "inner": 4, "later": 16, "end": 32}
    assert marks.seconds("marked") == [found]
    assert marks.seconds("plain") == [{"not explained": 64}]
    assert marks.wall("marked") == [63.5] and marks.wall("plain") == [64]
    assert marks.seconds("open") == []


class Machine:
    """A machine whose speed is known, and whose clock goes by what it is asked to do."""

    def __init__(self, speed: Callable[[Any], float], outcome: type) -> None:
        self.now, self.asked, self._speed, self._outcome = 0.0, [], speed, outcome

    def measure(self, setting: Any, seconds: float, limit: float) -> Any:
        self.asked.append(setting)
        speed = self._speed(setting)
        if speed <= 0:
            self.now += 1
            return self._outcome(problem="out of memory" if speed == 0 else "failed: Boom")
        took = 4 + seconds
        self.now += min(took, limit)
        if took > limit:
            return self._outcome(problem=f"not done within {limit:.0f} s")
        return self._outcome(speed, (0.1,) * 3)


AXES = {
    "precision": ["json", "bf16"], "torch_threads": [2, 1], "chunks": [1, 2, 4],
    "in_memory": [False, True], "loader_threads": [2, 1], "prefetch": [4, 2, 8],
    "compile": [False, True],
}  # fmt: skip


def planted(setting: Any) -> float:
    """Three things help, one of them only together with another; two need too much memory."""
    if setting.chunks == 2:
        return 0
    speed = 100.0 * (1.5 if setting.precision == "bf16" else 1)
    speed *= 1.2 if setting.in_memory else 1
    speed *= 1.1 if setting.loader_threads == 1 else 1
    speed *= 0.6 if setting.torch_threads == 1 else 1
    speed *= {2: 0.99, 4: 1.0, 8: 1.01}[setting.prefetch]  # not worth a change
    return speed * (0.8 if setting.chunks == 4 else 1) * (0.9 if setting.compile else 1)


@pytest.mark.parametrize("drift", [1.0, 0.5])
def test_halving_finds_what_was_planted_within_the_budget(part: Import, drift: float) -> None:
    """Also on a machine that is half as fast in each rung as in the one before."""
    search, setting = part("search"), part("settings").Setting
    base = setting(loader_threads=2, torch_threads=2)
    machine = Machine(lambda s: planted(s) * drift ** machine.asked.count(base), search.Outcome)
    found = search.search(
        base, AXES, machine.measure, budget_seconds=250, first_seconds=2, now=lambda: machine.now
    )
    best = {"precision": "bf16", "in_memory": True, "loader_threads": 1}
    assert part("settings").changes(found.best, base) == best
    assert machine.now <= 250 and not found.left_out
    refused = [t for t in found.trials if t.outcome.problem]
    assert {t.setting.chunks for t in refused} == {2} and refused[0].outcome.problem
    ratios = [planted(t.setting) / planted(base) for t in found.trials]
    assert [t.ratio for t in found.trials] == pytest.approx(ratios)
    assert len(machine.asked) < 288 / 10  # settings of the full grid
    # Later rungs are of what helped, and measured longer.
    late = [t.setting for t in found.trials if t.rung > 0 and t.setting != base]
    assert late and all(s.torch_threads == 2 and not s.compile for s in late)


def test_a_search_without_time_measures_what_comes_first(part: Import) -> None:
    search, setting = part("search"), part("settings").Setting
    base = setting(loader_threads=2, torch_threads=2)
    machine = Machine(planted, search.Outcome)
    found = search.search(
        base, AXES, machine.measure, budget_seconds=31, first_seconds=2, now=lambda: machine.now
    )
    assert machine.now <= 31
    assert found.best.precision == "bf16"
    assert [s.chunks for s in found.left_out[:2]] == [2, 4] and found.left_out[-1].compile


def test_a_base_that_does_not_fit_is_cut_into_chunks(part: Import) -> None:
    search, setting = part("search"), part("settings").Setting
    machine = Machine(lambda s: 100.0 if s.chunks >= 4 else 0.0, search.Outcome)
    found = search.search(
        setting(), {"chunks": [1, 2, 4], "prefetch": [4, 8]}, machine.measure, budget_seconds=200,
        first_seconds=2, now=lambda: machine.now,
    )  # fmt: skip
    assert found.base.chunks == 4 and found.best == found.base
    assert [t.outcome.problem for t in found.trials[:3]] == ["out of memory"] * 2 + [""]
    broken = Machine(lambda s: -1.0, search.Outcome)
    with pytest.raises(search.NothingRuns, match="Boom"):
        search.search(
            setting(), {}, broken.measure, budget_seconds=9, first_seconds=2,
            now=lambda: broken.now,
        )  # fmt: skip
    assert len(broken.asked) == 1


def test_what_does_not_fit_is_tried_again_with_what_takes_less(part: Import) -> None:
    search, setting = part("search"), part("settings").Setting

    def speed(s: Any) -> float:
        if s.chunks < 4 and s.precision != "bf16":
            return 0
        return 100.0 * (1.5 if s.precision == "bf16" else 1) * (1.3 if s.chunks < 4 else 1)

    machine = Machine(speed, search.Outcome)
    axes = {"precision": ["json", "bf16"], "chunks": [4, 2]}
    found = search.search(
        setting(chunks=4), axes, machine.measure, budget_seconds=200, first_seconds=2,
        now=lambda: machine.now,
    )  # fmt: skip
    assert found.best == setting(chunks=2, precision="bf16")


def session_of(part: Import, config: Config, ds: dict[str, Any], tmp_path: Path) -> Any:
    """Return a session; nothing is started yet."""
    return part("session").Session(
        replace(config, data=replace(config.data, train=str(tmp_path))), ds, ranks=1,
        budget_seconds=60, started=time.monotonic(), say=lambda _: None,
    )  # fmt: skip


def test_train_takes_the_tuned_files(
    part: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(part, RECIPES["demo"](), {"gradient_clipping": 1.0}, tmp_path)
    best = replace(
        session.base, precision="bf16", chunks=2, compile=True, backend="kornia", in_memory=True,
        loader_threads=5, prefetch=8, torch_threads=3, zero_stage=1,
    )  # fmt: skip
    command = part("session").write_tuned(
        tmp_path / "out", session, "demo", ["--data.train", "D"], best
    )
    assert command.startswith("OMP_NUM_THREADS=3 deepspeed ")
    taken: list[Any] = []
    monkeypatch.setattr(runs, "train", lambda *arguments: taken.append(arguments))
    words = command.split(" --module fastclr train ")[1].split()
    assert train.main(words) == 0
    config, path = taken[0][:2]
    data = config.data
    assert (data.backend, data.in_memory, data.num_threads, data.prefetch) == ("kornia", True, 5, 8)
    assert config.compile and data.train == "D" and config.run_dir == "runs/tuned"
    assert replace(config, data=RECIPES["demo"]().data, compile=False, run_dir="") == (
        RECIPES["demo"]()
    )
    _, ds = ds_config.resolve(config, ds_config.read(path), World())
    assert ds["gradient_accumulation_steps"] == 2 and ds["train_batch_size"] == 128
    assert ds["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert ds["zero_optimization"] == {"stage": 1} and ds["gradient_clipping"] == 1.0
    # What is typed after the file wins.
    assert train.main([*words, "--data.prefetch", "3", "--no-compile"]) == 0
    assert taken[1][0].data.prefetch == 3 and not taken[1][0].compile


def test_a_setting_changes_nothing_silently(part: Import, tmp_path: Path) -> None:
    settings = part("settings")
    ds = {"bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 64}
    config = replace(RECIPES["demo"](), global_batch_size=None, batch_norm="none")
    session = session_of(part, config, ds, tmp_path)
    assert "precision" not in session.axes  # the user's stands
    assert session.axes["chunks"] == [1, 2, 4]  # 8 images are too few
    same = settings.apply(session.base, session.base, session.config, ds)
    assert same == (session.config, ds) and settings.flags(session.base, session.base) == []
    cut = replace(session.base, chunks=4)
    _, changed = settings.apply(cut, session.base, session.config, ds)
    assert ds_config.resolve(session.config, changed, World())[0].global_batch_size == 64
    assert settings.notes(cut, session.base, 64)[0].endswith("16 images a rank.")
    loud = {"precision": "bf16", "chunks": 4, "backend": "dali", "compile": True}
    quiet = {"in_memory": True, "loader_threads": 7, "prefetch": 9, "torch_threads": 7}
    for name, value in (loud | quiet | {"zero_stage": 2}).items():
        said = settings.notes(replace(session.base, **{name: value}), session.base, 64)
        assert len(said) == (name in loud), name


def measured(**changes: Any) -> dict[str, Any]:
    """Return what a run says of itself: two steps of 100 ms, 8 of them waiting for batches."""
    lap = {
        "not explained": 0.002, "signals": 0.001, "next batch": 0.009, "encoder forward": 0.03,
        "encoder backward": 0.05, "optimizer": 0.004, "communication: gradients and weights": 0.004,
    }  # fmt: skip
    return {
        "images": 64, "images_per_rank": 32, "batches_per_epoch": 9, "ranks": 1, "dtype": "float32",
        "backend": "threads", "peak_bytes": 2**30, "save": {"hashes": 0.1, "bare": 0.4, "all": 0.5},
        "marked": [lap, lap], "wall": [0.1, 0.1], "plain": [0.09],
        "resident": [{**lap, "next batch": 0.0}], "resident_wall": [0.08],
        "waits": [0.008, 0.008], "loader_work": {"read": 0.02, "decode": 0.12, "augment": 0.06},
        "alone": {"read": 9e5, "decode": 9e3, "augment": 9e4}, "chunks": 1,
        "flops_per_image": 1e8, "bytes_per_image": 1e6, "matmul_flops_per_second": 1e11,
        "triad_bytes_per_second": 1e10, **changes,
    }  # fmt: skip


def test_the_account_adds_up(part: Import) -> None:
    account = part("account").account_of(measured())
    assert sum(stage.exposed for stage in account.stages) == pytest.approx(0.1)
    assert account.accounted == pytest.approx(0.98)
    by_name = {stage.name: stage for stage in account.stages}
    # The wait is shared out by work: 10, 60 and 30 ms a step in threads.
    assert by_name["decode"].exposed == pytest.approx(0.6 * 0.008)
    assert by_name["decode"].overlapped == pytest.approx(0.06 - 0.6 * 0.008)
    assert by_name["hand out"].exposed == pytest.approx(0.001)
    assert by_name["encoder forward"].alone == pytest.approx(64 / 0.03)
    assert account.verdict.bottleneck == "model"
    assert account.verdict.share == pytest.approx(0.8)
    assert account.uses["FLOPs"] == pytest.approx(32e8 / 1e11 / 0.08)
    assert account.mfu == pytest.approx(32e8 / 1e11 / 0.1)
    # A wait beyond all the work is nobody's work.
    lazy = part("account").account_of(measured(loader_work={"decode": 0.004}))
    assert {s.name: s.exposed for s in lazy.stages}["decode"] == pytest.approx(0.002)
    assert sum(stage.exposed for stage in lazy.stages) == pytest.approx(0.1)


def test_the_bottleneck_is_named_with_its_limit(part: Import) -> None:
    verdict = part("limits").verdict
    uses = {"FLOPs": 0.7, "memory bandwidth": 0.4}
    work = {"read": 1.0, "decode": 6.0, "augment": 3.0}
    shares = {"data": 0.1, "model": 0.8, "loss": 0.0, "communication": 0.1}
    assert verdict(shares, work, uses).limit.startswith("FLOPs, 70%")
    memory = verdict(shares, work, {"FLOPs": 0.2, "memory bandwidth": 0.6})
    assert memory.limit.startswith("memory bandwidth, 60%")
    assert verdict(shares, work, {"FLOPs": 0.2, "memory bandwidth": 0.1}).limit.startswith("no lim")
    data = verdict({**shares, "data": 0.9}, work, uses)
    assert data.bottleneck == "data" and data.limit.startswith("decode: 60%")
    assert "link" in verdict({**shares, "communication": 0.9}, work, uses).limit


def test_demand_is_counted_by_shapes(part: Import) -> None:
    demand = part("limits").demand
    config = RECIPES["demo"]()
    small, large = (
        demand(replace(config, head=HeadConfig(hidden_dim=32, output_dim=d)), 4) for d in (64, 128)
    )
    # 64 more columns of 32: two views, forward and twice as much backward, 2 FLOPs each.
    assert large.flops - small.flops == 2 * 3 * 2 * 32 * 64
    assert large.gradient_bytes - small.gradient_bytes == 4 * 32 * 64
    assert large.num_bytes - small.num_bytes == 2 * (2 * 64) * 4
    assert demand(config, 2).num_bytes == demand(config, 4).num_bytes / 2


def test_the_work_of_the_loaders_threads_is_counted(part: Import, tmp_path: Path) -> None:
    data_work = part("data_work")
    write_photo_tiles(tmp_path / "tiles", train_per_photo=4, test_per_photo=1)
    images = write_shards(tmp_path / "tiles" / "train", tmp_path / "packed")
    loader = make_loader(images, SimCLRPolicy(size=16), micro_batch_size=32, num_threads=2)
    plain, backend = shards.decode, loader._backend
    work = data_work.Work()
    with data_work.watched(loader, work):
        batches = iter(loader)
        next(batches)
        assert not work.seconds
        work.is_on = True
        for _ in range(8):
            next(batches)
        batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert set(work.seconds) == {"read and decode", "augment"}  # small PNGs
    assert all(seconds > 0 for seconds in work.seconds.values())
    assert shards.decode is plain and loader._backend is backend
    alone = data_work.alone(loader, 0.05)
    assert set(alone) == set(work.seconds) and min(alone.values()) > 0


def test_problems_are_named(part: Import) -> None:
    problem_of = part("jobs").problem_of
    text = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    assert problem_of(RuntimeError(text)) == "out of memory"
    assert problem_of(RuntimeError("CUDA out of memory. Tried")) == "out of memory"
    assert problem_of(MemoryError()) == "out of memory"
    assert problem_of(ConfigError("no\nmore")) == "refused: no"
    assert problem_of(KeyError("k")) == "failed: KeyError: 'k'"


class MadeUp:
    """Processes that take their time by a clock of their own, and find what was made up."""

    def __init__(self, clock: SimpleNamespace, speed: Callable[[Config, dict], float]) -> None:
        self._clock, self._speed = clock, speed
        self.jobs: list[Any] = []

    def run(self, job: Any, limit: float) -> dict[str, Any]:
        self.jobs.append(job)
        took = 6 + job.seconds
        self._clock.now += min(took, max(0.0, limit))
        if took > limit:
            return {"problem": f"not done within {limit:.0f} s"}
        if job.kind == "account":
            return measured()
        if job.kind == "profile":
            return {"bytes": 1}
        speed = self._speed(job.config, job.ds)
        if not speed:
            return {"problem": "out of memory"}
        return {"seconds": [64 / speed] * 3, "images": 64, "peak_bytes": 2**30}


def speed_of(config: Config, ds: dict[str, Any]) -> float:
    """Be faster in memory and in bf16; have no memory for two chunks."""
    if ds.get("gradient_accumulation_steps") == 2:
        return 0
    return 600 * (1.3 if "torch_autocast" in ds else 1) * (1.1 if config.data.in_memory else 1)


@pytest.mark.parametrize("minutes", [5.0, 0.35, 0.1])
def test_a_session_ends_in_time_and_leaves_its_files(
    part: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float
) -> None:
    clock = SimpleNamespace(now=0.0)
    session, script = part("session"), part("command")
    made_up = MadeUp(clock, speed_of)
    monkeypatch.setattr(session, "Processes", lambda ranks, on_cuda: made_up)
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(script, "time", session.time)
    page, out = tmp_path / "page.md", tmp_path / "out"
    page.write_text("Written by hand.\n\n## Measured\n\nof yesterday\n")
    options = script.Options(
        budget_minutes=minutes, recipe="demo", out=out, page=page, profile=True
    )
    if minutes < 0.2:
        with pytest.raises(ConfigError, match="not done within 6 s"):
            script.measure(options, [])
        assert "yesterday" in page.read_text()
        return
    script.measure(options, [])
    assert clock.now <= 60 * minutes
    text = page.read_text()
    assert text.startswith("Written by hand.") and "yesterday" not in text
    assert "Accounted for: **98.0%**" in text and "Bottleneck: **model**, 80%" in text
    rows = [json.loads(line) for line in page.with_suffix(".jsonl").open()]
    stages = {row["variant"]: row["exposed_seconds"] for row in rows if row["name"] == "stage"}
    assert sum(stages.values()) == pytest.approx(0.1)
    if minutes < 1:
        assert "Give more --budget-minutes." in text and not out.exists()
        return
    assert json.loads((out / "tuned.json").read_text())["torch_autocast"]["enabled"]
    assert "--data.in-memory" in (out / "tuned.flags").read_text().splitlines()
    assert "**1.43x**" in text and ">= 1.2x: met" in text and "| out of memory |" in text
    assert "600 -> 858 images/s" in text and f"--ds-config {out}/tuned.json" in text
    assert {"trial", "end to end", "save", "step"} <= {row["name"] for row in rows}
    traced = [job for job in made_up.jobs if job.kind == "profile"]
    assert len(traced) == 1 and traced[0].out == str(out / "trace.json.gz")
    assert all(job.config.checkpoint_every == 10**9 for job in made_up.jobs)


def test_a_machine_that_was_not_quiet_is_said(part: Import) -> None:
    search, page = part("search"), part("page")
    account = part("account").account_of(measured())  # 711 images a second
    found = search.Found("base", "best", [])
    results = part("session").Results(account, found)
    for speed, is_quiet in ((600.0, True), (500.0, False), (900.0, False)):
        pair = (search.Outcome(speed, (0.1,)), search.Outcome(2 * speed, (0.1,)))
        results.pairs = [pair]
        assert bool(page._unrest_lines(results)) != is_quiet
    results.pairs = None
    found.trials = [search.Trial("base", 1, search.Outcome(100.0, (0.1,)), 1.0)]
    assert "from 100 to 711 images/s" in page._unrest_lines(results)[1]


@pytest.mark.slow
def test_processes_account_for_a_real_run_and_survive_what_fails(
    part: Import, tmp_path: Path
) -> None:
    jobs = part("jobs")
    images = part("synthetic").write(tmp_path / "images", 16, 64)
    demo = RECIPES["demo"]()
    config = replace(
        demo, data=replace(demo.data, train=str(images)), views=replace(demo.views, size=16),
        encoder=replace(demo.encoder, width=0.0625), global_batch_size=16,
        checkpoint_every=10**9, log_every=2,
    )  # fmt: skip
    processes = jobs.Processes(1, on_cuda=False)

    def run(limit: float, kind: str = "trial", config: Config = config) -> dict[str, Any]:
        return processes.run(jobs.Job(kind, config, {}, 1, 0.5), limit)

    raw = run(100, "account")
    assert "problem" not in raw, raw
    account = part("account").account_of(raw)
    names = {stage.name for stage in account.stages}
    assert {
        "read and decode",
        "augment",
        "encoder forward",
        "head forward",
        "loss forward",
        "loss backward",
        "head backward",
        "encoder backward",
        "optimizer",
        "ledger",
        "logging",
    } <= names
    assert 0.95 <= account.accounted <= 1.01
    assert {"hashes", "fsync", "ledger", "list of files"} <= raw["save"].keys()
    assert all(seconds > 0 for seconds in raw["save"].values())
    assert raw["save"]["list of files"] < raw["save"]["all"]
    found = run(100)
    assert len(found["seconds"]) >= 2 and found["images"] == 16
    assert run(100, config=replace(config, global_batch_size=4096))["problem"].startswith("refused")
    large = replace(config, head=HeadConfig(hidden_dim=10**7, output_dim=4096))  # 150 GiB
    assert run(100, config=large)["problem"] == "out of memory"
    assert run(100, "no such kind")["problem"].startswith("failed: KeyError")
    started = time.monotonic()
    assert run(0.3)["problem"] == "not done within 0 s"
    assert time.monotonic() - started < 20


def test_what_cannot_be_meant_is_refused(part: Import, tmp_path: Path) -> None:
    part("page")
    script = part("command")
    for options, what in (
        ({"data": str(tmp_path), "synthetic": True}, "give one of them"),
        ({"recipe": "nobody"}, "choose from"),
    ):
        with pytest.raises(ConfigError, match=what):
            script.measure(script.Options(page=tmp_path / "page.md", **options), [])
    assert not (tmp_path / "page.md").exists()
