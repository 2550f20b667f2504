"""Every rule of the configuration has one message, and all come at once."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastclr.config import Config, ConfigError, ViewsConfig, raise_all
from fastclr.recipes import RECIPES

GOOD = replace(
    Config(epochs=1, run_dir="runs/first"), data=replace(Config().data, train="data/train")
)


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """Return a configuration with some dotted keys changed."""
    for name, value in changes.items():
        holder, _, key = name.rpartition(".")
        if holder:
            config = replace(config, **{holder: replace(getattr(config, holder), **{key: value})})
        else:
            config = replace(config, **{key: value})
    return config


# One change, and what its only problem says.
PROBLEMS = [
    ({"views.flip_prob": 1.1}, "views.flip_prob is 1.1"),
    ({"views.jitter_prob": -0.1}, "views.jitter_prob is -0.1"),
    ({"views.grayscale_prob": 2}, "views.grayscale_prob is 2"),
    ({"views.blur_prob": float("nan")}, "views.blur_prob is nan"),
    ({"views.crop_scale": (0.0, 1.0)}, "views.crop_scale is 0.0 1.0"),
    ({"views.crop_ratio": (2.0, 1.0)}, "views.crop_ratio is 2.0 1.0"),
    ({"views.blur_sigma": (-1.0, 1.0)}, "views.blur_sigma is -1.0 1.0"),
    ({"views.crop_scale": (0.1, 1.5)}, "views.crop_scale ends at 1.5"),
    ({"views.size": 7}, "views.size is 7"),
    ({"views.color_strength": -0.5}, "views.color_strength is -0.5"),
    ({"views.color_strength": 2.6}, "views.color_strength is 2.6"),
    ({"head.depth": 1}, "head.depth is 1"),
    ({"head.output_dim": 1}, "head.output_dim is 1"),
    ({"head.hidden_dim": -1}, "head.hidden_dim -1"),
    ({"run_dir": ""}, "run_dir is empty"),
    ({"data.train": ""}, "data.train is empty"),
    ({"epochs": None}, "epochs is None and minutes is None"),
    ({"minutes": 2.0}, "epochs is 1 and minutes is 2.0"),
    ({"epochs": -1.0}, "length of a run is positive"),
    ({"epochs": None, "minutes": -1.0}, "length of a run is positive"),
    ({"loss.temperature": 0.0}, "loss.temperature is 0.0"),
    ({"loss.temperature": 101.0}, "loss.temperature is 101.0"),
    ({"keep_every": -1}, "keep_every is -1"),
    ({"evaluation.every_epochs": 0}, "evaluation.every_epochs is 0"),
    ({"evaluation.most_images": 19}, "evaluation.most_images is 19"),
    ({"evaluation.joint_probe": True}, "evaluation.joint_probe without evaluation.test"),
    ({"faults.most_skipped": -1}, "faults.most_skipped is -1"),
    ({"faults.watchdog_seconds": 0.5}, "faults.watchdog_seconds is 0.5"),
    ({"start_from": "a", "initial_weights": "b"}, "start_from is a and initial_weights b"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**63}, "seed is 9223372036854775808"),
    ({"data.num_threads": -1}, "data.num_threads is -1"),
    ({"data.prefetch": 0}, "data.prefetch is 0"),
    ({"log_every": 0}, "log_every is 0"),
    ({"checkpoint_every": -1}, "checkpoint_every is -1"),
    ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
    (
        {"optimizer.learning_rate": 1.0, "optimizer.base_learning_rate": 0.3},
        "optimizer.learning_rate 1.0 and base_learning_rate 0.3 are both set",
    ),
    ({"optimizer.learning_rate": -1.0}, "optimizer.learning_rate is -1.0"),
    ({"optimizer.base_learning_rate": -1.0}, "optimizer.base_learning_rate is -1.0"),
    ({"optimizer.weight_decay": -1.0}, "optimizer.weight_decay is -1.0"),
    ({"optimizer.momentum": -1.0}, "optimizer.momentum is -1.0"),
    ({"optimizer.warmup_epochs": -1.0}, "optimizer.warmup_epochs is -1.0"),
    ({"epochs": 0}, "epochs is 0"),
    ({"epochs": float("inf")}, "epochs is inf"),
    ({"optimizer.momentum": 1.0}, "optimizer.momentum is 1.0"),
    ({"optimizer.trust_coefficient": 0.0}, "optimizer.trust_coefficient is 0.0"),
    ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate is nan"),
    ({"views.blur_sigma": (0.1, float("inf"))}, "views.blur_sigma is 0.1 inf"),
    ({"data.most_damaged": -1}, "data.most_damaged is -1"),
    ({"views_second": ViewsConfig(size=32)}, "views_second.size is 32 and views.size 224"),
    ({"views_second": ViewsConfig(flip_prob=2)}, "views_second.flip_prob is 2"),
    ({"views_second": ViewsConfig(blur_sigma=(2, 1))}, "views_second.blur_sigma is 2 1"),
]


def test_the_starting_point_has_no_problem():
    assert GOOD.problems() == []


@pytest.mark.parametrize(("changes", "message"), PROBLEMS, ids=[m for _, m in PROBLEMS])
def test_each_problem_has_one_message(changes, message):
    (problem,) = changed(GOOD, changes).problems()
    assert message in problem
    assert len(problem) > len(message) + 10  # and says why or what to do


def test_all_problems_are_reported_at_once():
    several = [PROBLEMS[i] for i in (0, 8, 11, 14, 15, 20, 22, 24, 34)]
    config = GOOD
    for changes, _ in several:
        config = changed(config, changes)
    found = config.problems()
    assert len(found) == len(several)
    with pytest.raises(ConfigError) as caught:
        raise_all(found)
    assert len(str(caught.value).splitlines()) == len(several)
    for _, message in several:
        assert message in str(caught.value)


def test_no_problem_raises_nothing():
    raise_all([])


@pytest.mark.parametrize("length", [{"epochs": None, "minutes": 0.5}, {"epochs": 0.25}])
def test_either_length_is_fine(length):
    assert changed(GOOD, length).problems() == []


def test_linear_and_empty_heads_need_no_depth():
    for kind in ("linear", "none"):
        assert changed(GOOD, {"head.kind": kind, "head.depth": 0}).problems() == []


@pytest.mark.parametrize(("size", "taps"), [(224, 23), (32, 3), (96, 9), (8, 1), (20, 3)])
def test_blur_taps_are_a_tenth_of_the_side(size, taps):
    assert ViewsConfig(size=size).blur_taps == taps


@given(st.integers(8, 1000))
def test_blur_taps_are_odd(size):
    taps = ViewsConfig(size=size).blur_taps
    assert taps % 2 == 1
    assert abs(taps - size / 10) <= 2


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name):
    recipe = RECIPES[name]()
    assert Config.from_dict(json.loads(json.dumps(asdict(recipe)))) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_need_only_data_and_a_folder(name):
    recipe = RECIPES[name]()
    assert len(recipe.problems()) == 2
    assert changed(recipe, {"run_dir": "runs/x", "data.train": "data/x"}).problems() == []


def test_every_value_survives_json():
    config = changed(
        GOOD,
        {
            "views.crop_scale": (0.2, 0.9),
            "encoder.width": 0.25,
            "head.norm": "layer",
            "optimizer.learning_rate": 1 / 3,
            "minutes": 3.5,
            "seed": 2**63 - 1,
            "global_batch_size": 64,
        },
    )
    again = Config.from_dict(json.loads(json.dumps(asdict(config))))
    assert again == config
    assert isinstance(again.views.crop_scale, tuple)
    assert hash(again) == hash(config)


def test_a_second_policy_survives_json():
    second = ViewsConfig(crop_scale=(0.5, 1.0), jitter_prob=0.0)
    config = replace(GOOD, views_second=second)
    assert config.problems() == []
    again = Config.from_dict(json.loads(json.dumps(asdict(config))))
    assert again == config and isinstance(again.views_second, ViewsConfig)
    values = asdict(GOOD)
    del values["views_second"], values["data"]["on_damage"]  # as an older version wrote it
    assert Config.from_dict(values) == GOOD


@pytest.mark.parametrize("place", ["", "views", "optimizer"])
def test_a_configuration_of_another_version_is_refused(place):
    values = asdict(GOOD)
    (values[place] if place else values)["of_tomorrow"] = 1
    with pytest.raises(ConfigError, match=r"of_tomorrow.*use the version that wrote it"):
        Config.from_dict(values)


def test_a_missing_part_is_refused():
    values = asdict(GOOD)
    del values["head"]
    with pytest.raises(ConfigError, match="head"):
        Config.from_dict(values)
