"""The benchmark of scaling: the model's arithmetic, the recorder, and a tiny run on two ranks."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
Import = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def part(imported) -> Import:
    return lambda name: imported(f"scaling_parts.{name}")


@pytest.fixture
def model(part: Import) -> ModuleType:
    return part("model")


@pytest.fixture
def job(model: ModuleType):
    return model.Job(images=10, dim=4, parameters=1000, layers=6, channels=(8, 8, 3))


def cluster(model: ModuleType, ranks_per_node: int):
    return model.Cluster(ranks_per_node, model.Link(1.0, 10.0), model.Link(100.0, 2.0))


def test_one_rank_costs_nothing(model: ModuleType, job) -> None:
    alone = model.Alone(fixed_seconds=1, image_seconds=2, pair_seconds=0.5)
    for stage in range(4):
        one = model.forecast(replace(job, stage=stage), 1, cluster(model, 4), alone)
        assert sum(one.parts.values()) == sum(one.sent.values()) == 0
        assert one.step_seconds == 1 + 20 + 0.5 * 20 * 20
        assert one.efficiency(one) == 1
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "ring"):
        assert cluster(model, 4).seconds(model.Collective("x", kind, 1e6), 1) == 0


@pytest.mark.parametrize(
    ("kind", "seconds", "sent"),
    [
        ("all_gather", 3 * (1 + 120 / 10), 3 * 120),
        ("ring", 3 * (1 + 120 / 10), 3 * 120),
        ("reduce_scatter", 3 * (1 + 30 / 10), 3 * 30),
        ("all_reduce", 6 * (1 + 30 / 10), 6 * 30),
    ],
)
def test_rings_inside_a_node(model: ModuleType, kind: str, seconds: float, sent: float) -> None:
    collective = model.Collective("x", kind, 120, count=5)
    assert cluster(model, 4).seconds(collective, 4) == pytest.approx(5 * seconds)
    assert collective.sent(4) == 5 * sent


def test_two_levels_over_nodes(model: ModuleType) -> None:
    """Three nodes of two: inside once, over the nodes with each rank's part."""
    two = cluster(model, 2)
    inside, between = 1 * (1 + 60 / 10), 2 * (100 + 20 / 2)
    assert two.seconds(model.Collective("x", "reduce_scatter", 120), 6) == inside + between
    assert two.seconds(model.Collective("x", "all_reduce", 120), 6) == 2 * (inside + between)
    gathered = 2 * (100 + 120 / 2) + 1 * (1 + 3 * 120 / 10)
    assert two.seconds(model.Collective("x", "all_gather", 120), 6) == gathered
    assert two.seconds(model.Collective("x", "ring", 120), 6) == 5 * (100 + 120 / 2)
    single = cluster(model, 1)  # no inside at all
    assert single.seconds(model.Collective("x", "all_reduce", 120), 3) == 4 * (100 + 40 / 2)
    with pytest.raises(ValueError, match="5 ranks do not fill nodes of 2"):
        two.shape(5)


def test_without_latency_bytes_alone_count(model: ModuleType) -> None:
    """An all-reduce over very many ranks costs two tensors, a gather all of them."""
    free = model.Cluster(10**6, model.Link(0.0, 10.0), model.Link(0.0, 1.0))
    reduced = free.seconds(model.Collective("x", "all_reduce", 120), 10**5)
    assert reduced == pytest.approx(2 * 120 / 10, rel=1e-4)
    assert free.seconds(model.Collective("x", "all_gather", 120), 101) == 100 * 12


def test_known_byte_counts(model: ModuleType, job) -> None:
    """Two ranks: an all-reduce sends a tensor, a gather a share."""
    sent = model.bytes_of_parts(job, 2)
    assert sent[model.NORMS] == 24 * (8 + 8 + 3) + 8 * (8 + 8 + 3)
    assert sent[model.LOSS] == 20 * 4 * 4 + 20 * 4
    assert sent[model.GRADIENTS] == 4000 and sent[model.WEIGHTS] == sent[model.LARS_NORMS] == 0
    assert sent[model.VOTES] == 4 + 8
    ring = model.bytes_of_parts(replace(job, exchange="ring"), 2)
    assert ring[model.LOSS] == 2 * 20 * 4 * 4 + 20 * 4
    for stage, gradients, weights in ((1, 4000, 2000), (2, 4000, 2000), (3, 2000, 4000)):
        sent = model.bytes_of_parts(replace(job, stage=stage), 2)
        assert (sent[model.GRADIENTS], sent[model.WEIGHTS]) == (gradients, weights)
        assert sent[model.LARS_NORMS] == 6 * 16
    cached = model.bytes_of_parts(replace(job, chunks=3), 2)
    assert cached[model.NORMS] == 6 * 24 * 19 + 3 * 8 * 19
    assert cached[model.GRADIENTS] == 4000  # once a step, however many chunks
    assert model.bytes_of_parts(replace(job, chunks=3, stage=2), 2)[model.GRADIENTS] == 12000
    half = replace(job, row_bytes=2, gradient_bytes=2, on_gpu=True, channels=(8,), lars=False)
    sent = model.bytes_of_parts(replace(half, stage=1), 2)
    assert sent[model.LOSS] == 20 * 4 * 2 + 20 * 4 and sent[model.GRADIENTS] == 2000
    assert sent[model.NORMS] == 4 * 17 + 8 * 8 and sent[model.LARS_NORMS] == 0


def test_efficiency_and_sharing_out(model: ModuleType, job) -> None:
    alone = model.Alone(0.0, 1.0, 0.0)
    free = model.Cluster(8, model.Link(0.0, 1e30), model.Link(0.0, 1e30))
    one = model.forecast(job, 1, free, alone)
    assert model.forecast(job, 8, free, alone).efficiency(one) == pytest.approx(1)
    shared = model.shared_out(job, 40, 4)
    strong = model.forecast(shared, 4, free, alone)
    assert (shared.images, strong.global_batch) == (10, 40)
    whole = model.forecast(replace(job, images=40), 1, free, alone)
    assert strong.efficiency(whole) == pytest.approx(1)
    slow = model.Cluster(8, model.Link(5 / 4, 1e30), free.between)
    talk = model.forecast(job, 2, slow, alone)
    assert talk.efficiency(one) == pytest.approx(10 / (10 + talk.communication_seconds))
    with pytest.raises(ValueError, match="41 images cannot be divided over 4"):
        model.shared_out(job, 41, 4)


def test_storage(model: ModuleType, job) -> None:
    from pipelines.order import WINDOW

    assert model.WINDOW == WINDOW
    free = model.Cluster(2, model.Link(0.0, 1e30), model.Link(0.0, 1e30))
    found = model.forecast(job, 8, free, model.Alone(0.0, 0.1, 0.0))
    needed = model.storage(found, free, image_bytes=1000, workers_per_rank=3)
    assert found.images_per_second == pytest.approx(80)
    assert needed.whole_shards == pytest.approx(80_000)
    assert needed.by_offset == pytest.approx(20_000)  # a quarter: four nodes
    assert (needed.fewest_per_shard, needed.split_by_rank) == (5, 24)


def test_alpha_and_beta_are_found_again(part: Import) -> None:
    links, model = part("links"), part("model")
    true = model.Link(2e-4, 1.5e9)
    here = model.Cluster(4, true, true)
    times = [
        links.Timed(kind, n, 4, here.seconds(model.Collective("x", kind, n), 4))
        for kind in links.KINDS
        for n in links.SIZES
    ]
    assert links.fit(times) == pytest.approx(true)
    with pytest.raises(ValueError, match="too noisy"):  # more bytes in less time
        links.fit([times[0]._replace(seconds=2.0), times[1]._replace(seconds=1.0)])


def test_waiting_is_told_from_transfer(part: Import) -> None:
    recorder = part("recorder")

    def call(started: float, ended: float, waited_from: float | None = None):
        begin = started if waited_from is None else waited_from
        return recorder.Call("loss rows", "all_gather", 100, started, begin, ended)

    punctual, late = [[call(1.0, 5.0), call(6.0, 7.0)]], [[call(4.0, 5.0), call(6.5, 7.0)]]
    both = recorder.exposed([punctual, late])["loss rows"]
    assert (both.seconds, both.waiting) == ((5 + 1.5) / 2, (3.5 + 0) / 2)
    assert (both.num_bytes, both.calls) == (200, 2)
    # Begun at 1, but the rank computed on until 4.5: only then it stood still.
    ahead = recorder.exposed([[[call(1.0, 5.0, 4.5)]], [[call(4.0, 5.0)]]])["loss rows"]
    assert (ahead.seconds, ahead.waiting) == (0.75, 0.0)
    on_gpu = recorder.exposed([[[call(0.0, 2.0)]], [[call(0.0, 4.0)]]])["loss rows"]
    assert (on_gpu.seconds, on_gpu.waiting, on_gpu.transfer) == (3.0, None, 3.0)


def test_arithmetic_comes_from_single_ranks(part: Import) -> None:
    forecasts, ranks, recorder = part("forecasts"), part("ranks"), part("recorder")
    small, large, many = (ranks.Setup(1, 10), ranks.Setup(1, 20), ranks.Setup(1, 10, worlds=2))
    sums = {"BatchNorm sums": recorder.Exposed(1.0, 0.0, 8, 1)}
    found = {
        small: [ranks.Steps([6.4], {}, 1e-3)],  # 1 + 0.5 an image + 400 pairs
        large: [ranks.Steps([12.6], {}, 1e-3)],  # and 1600 pairs
        many: [ranks.Steps([13.8], sums, 1e-3)],  # twice that, and a second in collectives
    }
    alone = forecasts.alone_of(found, small, large, many)
    assert alone == pytest.approx((2.0, 1.0, 2e-3))


def test_worlds_and_their_cores(part: Import, monkeypatch: pytest.MonkeyPatch) -> None:
    part("model")  # beside which the script lies
    for name in ("OMP_NUM_THREADS", "PYTORCH_NVML_BASED_CUDA_CHECK"):  # which it sets
        monkeypatch.setenv(name, "1")
    script = importlib.import_module("scaling")
    found = script.worlds(3, 4)
    assert [(s.ranks, s.images) for s in found["weak"]] == [(1, 4), (2, 4), (3, 4)]
    assert [(s.ranks, s.images) for s in found["strong"]] == [(1, 12), (2, 6), (3, 4)]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 7, 8})
    assert script.slots(2) == [{2, 3}, {5, 7}]
    assert script.slots(5) == [{2}, {3}, {5}, {7}, {8}]
    assert script.slots(6)[5] == {2}  # one core too few
    with pytest.raises(SystemExit, match="1 rank has nobody"):
        script.main(ranks=1)


def test_a_small_run(tmp_path: Path) -> None:
    out = tmp_path / "scaling.md"
    out.write_text("# By hand\n\n## Measured\n\nof yesterday\n")
    small = ["--ranks", "2", "--images", "8", "--steps", "2", "--warm-up", "1", "--rounds", "1"]
    command = [sys.executable, str(FOLDER / "scaling.py"), *small, "--no-stages", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    text = out.read_text()
    assert "# By hand" in text and "yesterday" not in text
    assert text.count("| weak | ") >= 10 and "nothing here was measured" in text
    assert out.with_suffix(".svg").read_text().count("<svg") == 1
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").open()]
    worlds = {row["variant"]: row for row in rows if row["name"] == "scaling"}
    assert set(worlds) == {"1 x 8", "2 ranks x 8", "1 x 16", "1 x 8, 2 at once"}
    two = worlds["2 ranks x 8"]
    assert set(two["exposed_seconds"]) == {"BatchNorm sums", "loss rows", "gradients", "votes"}
    told = sum(sum(part.values()) for part in two["exposed_seconds"].values())
    assert 0 < told < two["p80_seconds"] and two["model_seconds"] > 0
    assert {"p20_seconds", "repeats", "commit", "hardware"} <= two.keys()
    assert {row["name"] for row in rows} == {"scaling", "collective", "forecast, not measured"}


def test_bytes_of_the_model_are_those_that_travel(part: Import, tmp_path: Path) -> None:
    """What the trainer's ranks tell each other, stage by stage, is what the model counts."""
    script = tmp_path / "count.py"
    script.write_text(COUNT)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(FOLDER), str(tmp_path)],
        capture_output=True, text=True, timeout=240, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    model = part("model")
    for name, (told, counted, padding) in json.loads(done.stdout.splitlines()[-1]).items():
        for each in model.PARTS:
            most = counted[each] + (padding if each in (model.GRADIENTS, model.WEIGHTS) else 0)
            assert counted[each] <= told.get(each, 0) <= most, (name, each, told, counted)


COUNT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from scaling import slots
from scaling_parts.forecasts import job_of
from scaling_parts.ranks import Bench, Setup
from fastclr.recipes import RECIPES
from pipelines.photos import write_photo_tiles
from pipelines.writer import write_shards
from dataclasses import replace

torch.set_num_threads(1)
folder = Path(sys.argv[2])
write_photo_tiles(folder / "images", train_per_photo=6, test_per_photo=1)
write_shards(folder / "images" / "train", folder / "shards")
bench = Bench(RECIPES["demo"](), folder / "shards", folder, slots(2), 1, 2)
found = {}
for setup in (Setup(2, 8, exchange="ring"), Setup(2, 8, stage=2)):
    steps = bench.run(setup)
    told = {name: part.num_bytes for name, part in steps.exposed.items()}
    job = replace(job_of(bench.config, 8), stage=setup.stage, exchange=setup.exchange)
    # A rank's tensors: an all-reduce is counted whole, a gather by the rank's share.
    counted = {}
    for c in job.collectives(2):
        counted[c.part] = counted.get(c.part, 0) + c.num_bytes * c.count
    from scaling_parts.model import PARTS
    found[str(setup)] = (told, {part: counted.get(part, 0) for part in PARTS}, 1024)
print(json.dumps(found))
"""
