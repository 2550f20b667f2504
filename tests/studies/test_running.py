"""Rows: one a run, whole, found again by what they are of, shared, paired over a seed."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastclr import data_sets, encoders
from fastclr.config import ConfigError
from fastclr.interruption import Preempted
from fastclr.simclr import SimCLR
from fastclr.studies import STUDIES, running
from fastclr.studies.head_starts import Context, build
from fastclr.studies.scales import SCALES, TOY, changed
from fastclr.studies.study import Arm, Run, Variant
from fastclr.studies.work import WORKS, _source, _trainer, train
from pipelines.loader import make_loader
from tests.studies.conftest import plain_study

LINEAR = replace(TOY.base, head=replace(TOY.base.head, kind="linear"))
TWO = plain_study({"a": Arm(TOY.base), "bb": Arm(LINEAR)}, [])


def test_a_second_start_does_nothing_again(study, instant, tmp_path):
    first = study("two", TWO, 2)
    assert [(run.arm, run.config.seed) for run in instant] == [
        ("a", 0), ("bb", 0), ("a", 1), ("bb", 1),
    ]  # fmt: skip
    said = []
    assert study("two", TWO, 2, said) == first
    assert len(instant) == 4
    assert said == ["two: 4 runs, 4 of them done before"]
    study("two", TWO, 3)
    assert [run.config.seed for run in instant[4:]] == [2, 2]
    assert len(list((tmp_path / "results/two/toy").glob("*.json"))) == 6


def test_a_row_says_what_it_is_of(study, instant, images):
    row = study("two", TWO)[1]
    assert row["arm"] == "bb"
    assert row["scores"]["h"]["linear"] == pytest.approx(0.7)
    assert row["key"]["config"]["head"]["kind"] == "linear"
    assert row["key"]["data"] == images.facts
    assert {"seconds", "measured", "hardware", "threads", "versions", "command"} <= row.keys()


def test_studies_share_runs_under_their_own_names(study, instant):
    study("two", TWO)
    other = plain_study({"mine": Arm(LINEAR)}, [])
    rows = study("other", other)
    assert len(instant) == 2
    assert rows[0]["arm"] == "mine"
    assert rows[0]["study"] == "two"


@pytest.mark.parametrize(
    "change",
    [
        lambda run: replace(run, config=replace(run.config, seed=1)),
        lambda run: replace(run, config=replace(run.config, epochs=2)),
        lambda run: replace(run, variant=Variant(frozen=("fc1",))),
        lambda run: replace(run, variant=Variant(norm_parts=4)),
        lambda run: replace(run, work="changes"),
    ],
)
def test_what_changes_a_result_changes_the_digest(change, images):
    run = Run("a", TOY.base, Variant(), "train")
    assert change(run).digest(images.facts) != run.digest(images.facts)
    assert run.digest({**images.facts, "test": "other"}) != run.digest(images.facts)


def test_what_does_not_change_a_result_does_not_change_the_digest(images):
    run = Run("a", TOY.base, Variant(), "train")
    elsewhere = replace(run.config, run_dir="x", log_every=3, checkpoint_every=7)
    other = replace(run, arm="b", config=elsewhere)
    assert other.digest(images.facts) == run.digest(images.facts)


@pytest.mark.parametrize(
    ("name", "value"), [("brightness", "additive"), ("blur_sigma_images", 128)]
)
def test_rows_older_than_a_setting_are_found(images, name, value):
    key = Run("a", TOY.base, Variant(), "train").key(images.facts)
    assert "norm_parts" not in key["variant"]
    assert name not in key["config"]["views"]
    other = changed(TOY.base, "views", **{name: value})
    for config in (other, replace(TOY.base, views_second=other.views)):
        of_other = Run("a", config, Variant(), "train").key(images.facts)
        assert f'"{name}": {json.dumps(value)}' in json.dumps(of_other["config"])


def test_a_damaged_row_is_refused_and_not_made_up(study, instant, tmp_path):
    study("two", TWO)
    file = next(iter(running.find_rows(tmp_path / "results").values()))
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    with pytest.raises(ConfigError, match=r"cannot be read.*delete it"):
        study("two", TWO)
    row = json.loads(text)
    row["key"]["config"]["seed"] = 5
    file.write_text(json.dumps(row))
    with pytest.raises(ConfigError, match="changed by hand"):
        study("two", TWO)
    file.unlink()
    assert len(study("two", TWO)) == 2


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_stops_between_runs_and_keeps_rows(study, instant, monkeypatch, number, error):
    def work(job):
        os.kill(os.getpid(), number)
        return {"h": {"linear": 0.5}, "z": {"linear": 0.5}}

    once = WORKS["instant"]
    monkeypatch.setitem(WORKS, "instant", work)
    with pytest.raises(error, match="finished runs are kept"):
        study("two", TWO)
    monkeypatch.setitem(WORKS, "instant", once)
    study("two", TWO)
    assert [run.arm for run in instant] == ["bb"]


def test_a_run_that_another_process_does_is_waited_for(
    study, instant, images, tmp_path, monkeypatch
):
    run = TWO.runs(TOY, 1)[0]
    digest = run.digest(images.facts)
    (tmp_path / "work").mkdir()
    row = {"arm": "a", "seed": 0, "key": run.key(images.facts), "scores": {"h": {"linear": 1.0}}}

    def finish(seconds):
        lock.__exit__(None, None, None)
        folder = tmp_path / "results/two/toy"
        (folder / f"{digest}.json").write_text(json.dumps(row))

    monkeypatch.setattr(running.time, "sleep", finish)
    lock = running._claim(tmp_path / "work" / f"{digest}.lock")
    assert lock.__enter__()
    rows = study("two", TWO)
    assert [run.arm for run in instant] == ["bb"]
    assert rows[0]["scores"] == row["scores"]


def test_most_seeds_limits_an_arm():
    study = plain_study({"a": Arm(TOY.base), "b": Arm(LINEAR, most_seeds=1)}, [])
    assert [(run.arm, run.config.seed) for run in study.runs(TOY, 2)] == [
        ("a", 0), ("b", 0), ("a", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_runs_of_a_seed_are_paired(name, images):
    """The same order and numbers of views, and the same first weights of the encoder."""
    runs = {}
    for run in STUDIES[name].runs(TOY, 2):
        runs.setdefault(run.config.seed, []).append(run)
    assert set(runs) == {0, 1}
    weights, orders = {}, {}
    for seed, of_seed in runs.items():
        first = {}  # weights by encoder
        for run in of_seed:
            state = SimCLR.from_config(run.config).encoder.state_dict()
            expected = first.setdefault(run.config.encoder, state)
            assert all(torch.equal(state[key], expected[key]) for key in expected)
        assert len(first) == (6 if name == "encoder_size" else 1)
        weights[seed] = next(iter(first.values()))["network.conv1.weight"]
        ids = [_first_ids(run, images) for run in of_seed]
        assert all((other == ids[0]).all() for other in ids[1:])
        orders[seed] = ids[0]
    assert not torch.equal(weights[0], weights[1])
    assert not (orders[0] == orders[1]).all()


@pytest.mark.parametrize(
    ("change", "start"), [("rotate", "random"), ("noise", "orthogonal"), ("cutout", "autoencoder")]
)
def test_a_seed_varies_all_that_it_should(job, change, start):
    """Weights of encoder and head, order, numbers of views, changes; all again with the same."""
    variant = Variant(start=start, changes=((change,), (change,)))
    seen, fixed = [], None
    for place, seed in enumerate((0, 0, 1)):
        config = replace(TOY.base, seed=seed)
        of = job(config, variant, f"{change}-{place}")
        model = build(variant, Context(config, of.images, 2), torch.device("cpu"))
        source = _source(of, config, torch.device("cpu"))
        batch = next(iter(_source(job(config), config, torch.device("cpu"))))
        fixed = fixed or batch  # what is changed, so that the changes alone differ
        assert _trainer(of, config, {}, model, source).seed == seed
        seen.append(
            {
                "encoder": model.encoder.network.conv1.weight,
                "first layer of the head": model.projection_head.fc1.weight,
                "last layer of the head": model.projection_head.fc2.weight,
                "order": batch.sample_id_B,
                "views": batch.views_VBCHW,
                "changes": source._changed(fixed, 0).views_VBCHW,
            }
        )
    for name, value in seen[0].items():
        assert torch.equal(value, seen[1][name]), name
        assert not torch.equal(value, seen[2][name]), name
    assert not torch.equal(seen[0]["changes"], fixed.views_VBCHW)


def _first_ids(run, images) -> np.ndarray:
    return images.train.order(run.config.seed).ids(0, 0, 32)


def test_a_training_sees_what_pairing_promises(job, images, monkeypatch):
    """Two heads: the batches that the trainer gets are equal to the last bit."""
    seen = []
    import fastclr.studies.work as work

    def recording(*args, **kwargs):
        loader = make_loader(*args, **kwargs)
        batches = loader.__iter__

        class Recording:
            def __getattr__(self, name):
                return getattr(loader, name)

            def __iter__(self):
                for batch in batches():
                    seen[-1].append(batch.views_VBCHW)
                    yield batch

        return Recording()

    monkeypatch.setattr(work, "make_loader", recording)
    for name, config in {"mlp": TOY.base, "linear": LINEAR}.items():
        seen.append([])
        train(job(config, name=name))
    assert len(seen[0]) == len(seen[1]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_of_every_scale_is_a_configuration(name, scale):
    for arm in STUDIES[name].arms(SCALES[scale]).values():
        named = replace(arm.config, run_dir="x", data=replace(arm.config.data, train="x"))
        assert named.problems() == []
        assert len(data_sets.policies_of(named)) == 2


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_a_scale_knows_the_width_of_its_encoder(scale):
    with torch.device("meta"):
        assert encoders.from_config(scale.base.encoder).feature_dim == scale.feature_dim


@pytest.mark.parametrize("name", STUDIES)
def test_claims_and_published_numbers_are_of_arms_that_exist(name):
    study = STUDIES[name]
    for scale in ("pilot", "small", "cifar10", "paper"):
        arms = study.arms(SCALES[scale])
        assert set(study.published) <= set(arms)
        for claim in study.claims(list(arms)):
            assert {*claim.arms, *claim.than} <= set(arms)
            assert claim.arms


def test_a_training_that_a_signal_broke_off_is_gone_on_with(job, broken_off):
    """Weights after an interruption equal those without one."""
    whole, _ = train(job(name="whole"))
    broken = job(name="broken")
    steps = broken_off(broken)
    resumed, _ = train(broken)
    assert len(steps) == 3
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
