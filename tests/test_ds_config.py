"""The DeepSpeed JSON and the configuration: one key, one owner."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest

import fastclr.recipes
from fastclr.config import Config, ConfigError, DataConfig, OptimizerConfig
from fastclr.ds_config import OPTIMIZERS, images_per_rank, read, resolve
from fastclr.world import World

ONE, FOUR = World(), World(0, 4, 0, 4)


def config(global_batch_size: int | None = None, **optimizer) -> Config:
    """Return a configuration without problems of its own."""
    return Config(
        data=DataConfig(train="data/train"),
        run_dir="runs/first",
        epochs=1,
        global_batch_size=global_batch_size,
        optimizer=OptimizerConfig(**optimizer),
    )


def refused(ours: Config, ds: dict, world: World = ONE) -> list[str]:
    """Return the problems that resolving reports."""
    with pytest.raises(ConfigError) as caught:
        resolve(ours, ds, world)
    return str(caught.value).splitlines()


def optimizer_block(name: str, **params) -> dict:
    """Return a JSON with an optimizer."""
    return {"optimizer": {"type": name, "params": params}}


# Reading


def write(tmp_path: Path, text: str) -> Path:
    """Write a JSON file."""
    file = tmp_path / "ds.json"
    file.write_text(text)
    return file


def test_reading(tmp_path):
    file = write(tmp_path, '{"train_batch_size": 8, "fp16": {"enabled": false}}')
    assert read(file) == read(str(file)) == {"train_batch_size": 8, "fp16": {"enabled": False}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"bf16": {}, "bf16": {}}', "key 'bf16' twice.*Remove one"),
        ('{"bf16": {"enabled": true, "enabled": false}}', "key 'enabled' twice"),
        ("[1]", "holds a list, no object"),
        ("3", "holds a int, no object"),
        ('{"a": 1,}', "is no JSON"),
        ("", "is no JSON"),
        ('{"bf16": true}', "bf16 is True in .*give an object"),
        ('{"optimizer": "LARS"}', "optimizer is 'LARS' in .*give an object"),
    ],
)
def test_what_cannot_be_read(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(write(tmp_path, text))
    assert "ds.json" in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none.json cannot be read \(No such file.*--ds-config"):
        read(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path)


# Batch size


@pytest.mark.parametrize(
    ("ours", "ds"),
    [
        (64, {}),
        (None, {"train_batch_size": 64}),
        (None, {"train_micro_batch_size_per_gpu": 16}),
        (64, {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 16}),
        (64, {"gradient_accumulation_steps": 1}),
    ],
)
def test_the_batch_has_one_owner_and_every_key_is_filled(ours, ds):
    before = copy.deepcopy(ds)
    resolved, filled = resolve(config(ours), ds, FOUR)
    assert ds == before, "the user's JSON was changed"
    assert resolved.global_batch_size == filled["train_batch_size"] == 64
    assert filled["train_micro_batch_size_per_gpu"] == images_per_rank(filled, FOUR) == 16
    assert filled["gradient_accumulation_steps"] == 1


def test_two_batch_sizes_are_refused_by_both_names():
    (problem,) = refused(config(64), {"train_batch_size": 32})
    assert "global_batch_size is 64" in problem
    assert "train_batch_size is 32 in the DeepSpeed JSON" in problem
    (problem,) = refused(config(64), {"train_micro_batch_size_per_gpu": 8}, FOUR)
    assert "is 32" in problem


def test_a_json_that_contradicts_itself_is_blamed_alone():
    ds = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8}
    (problem,) = refused(config(), ds, FOUR)
    assert "train_batch_size is 64" in problem
    assert "8 x 1 steps x 4 ranks is 32" in problem
    assert "recipe or flags" not in problem


def test_no_batch_size():
    (problem,) = refused(config(), {})
    assert "no batch size is set" in problem
    assert "--global-batch-size" in problem


@pytest.mark.parametrize("size", [1, 0, -4])
@pytest.mark.parametrize("scaling", ["linear", "sqrt"])
def test_a_batch_of_one_has_no_negative(size, scaling):
    (problem,) = refused(config(size, scaling=scaling), {})
    assert f"global_batch_size is {size}" in problem
    assert "no negative" in problem


def test_a_batch_that_ranks_cannot_share():
    (problem,) = refused(config(66), {}, FOUR)
    assert "66 is no multiple of 4 ranks" in problem
    assert resolve(config(66), {}, ONE)[0].global_batch_size == 66


@pytest.mark.parametrize("value", ["auto", 0, 2.5, True])
@pytest.mark.parametrize(
    "key",
    ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"],
)
def test_sizes_are_whole_numbers(key, value):
    problems = refused(config(8), {key: value})
    assert f"{key} is {value!r} in the DeepSpeed JSON: give an integer >= 1." in problems


def test_accumulation_splits_the_batch_of_a_rank():
    for ds in ({"train_micro_batch_size_per_gpu": 4}, {"train_batch_size": 64}, {}):
        _, filled = resolve(config(64), {**ds, "gradient_accumulation_steps": 4}, FOUR)
        assert filled["train_batch_size"] == 64
        assert filled["train_micro_batch_size_per_gpu"] == 4
        assert images_per_rank(filled, FOUR) == 16
    (problem,) = refused(config(64), {"gradient_accumulation_steps": 3}, FOUR)
    assert "64 is no multiple of 4 ranks x 3 gradient_accumulation_steps" in problem


# Optimizer


def test_the_default_is_the_papers_LARS():
    resolved, filled = resolve(config(256), {}, ONE)
    assert resolved.optimizer == OptimizerConfig(
        name="LARS",
        learning_rate=0.3,
        weight_decay=1e-6,
        momentum=0.9,
        trust_coefficient=1e-3,
        denominator="decayed_gradient",
        rate_inside_momentum=True,
        clip=False,
        nesterov=False,
    )
    assert "optimizer" not in filled  # it reaches the engine as an object


@pytest.mark.parametrize(
    ("scaling", "base", "size", "rate"),
    [
        ("linear", 0.3, 4096, 4.8),
        ("linear", 0.3, 256, 0.3),
        ("linear", 1.0, 512, 2.0),
        ("sqrt", 1.2, 4096, 4.8),  # 0.075 * sqrt(4096)
        ("sqrt", 1.2, 256, 1.2),
    ],
)
def test_the_rate_follows_the_batch(scaling, base, size, rate):
    ours = config(size, base_learning_rate=base, scaling=scaling)
    optimizer = resolve(ours, {}, ONE)[0].optimizer
    assert optimizer.learning_rate == pytest.approx(rate, rel=1e-12)
    assert optimizer.base_learning_rate is None


def test_the_rate_of_the_paper_does_not_depend_on_ranks():
    recipe = fastclr.recipes.RECIPES["simclr-v1-paper"]()
    ours = replace(recipe, run_dir="r", data=DataConfig(train="d"))
    for world in (ONE, FOUR):
        assert resolve(ours, {}, world)[0].optimizer.learning_rate == pytest.approx(4.8)


def test_a_learning_rate_is_taken_as_it_is():
    assert resolve(config(4096, learning_rate=0.1), {}, ONE)[0].optimizer.learning_rate == 0.1
    ds = optimizer_block("LARS", lr=0.2)
    assert resolve(config(4096), ds, ONE)[0].optimizer.learning_rate == 0.2


def test_resolving_twice_changes_nothing():
    resolved, filled = resolve(config(64, name="AdamW", base_learning_rate=1e-3), {}, ONE)
    assert resolve(resolved, filled, ONE) == (resolved, filled)


FIELDS = [
    ("name", "SGD", "type", "AdamW"),
    ("learning_rate", 0.1, "lr", 0.2),
    ("weight_decay", 0.1, "weight_decay", 0.0),
    ("momentum", 0.9, "momentum", 0.5),
    ("trust_coefficient", 0.1, "trust_coefficient", 0.2),
    ("denominator", "decayed_gradient", "denominator", "sum_of_norms"),
    ("rate_inside_momentum", True, "rate_inside_momentum", False),
    ("clip", True, "clip", False),
    ("nesterov", True, "nesterov", False),
]


@pytest.mark.parametrize(("key", "ours", "ds_key", "theirs"), FIELDS)
def test_an_optimizer_value_has_one_owner(key, ours, ds_key, theirs):
    def block(value: object) -> dict:
        params = {} if key == "name" else {ds_key: value}
        return {"optimizer": {"type": value if key == "name" else "LARS", "params": params}}

    (problem,) = refused(config(8, **{key: ours}), block(theirs))
    assert f"optimizer.{key} is {ours!r}" in problem
    assert f"{theirs!r} in the DeepSpeed JSON" in problem
    equal = resolve(config(8, **{key: ours}), block(ours), ONE)[0].optimizer
    alone = resolve(config(8), block(theirs), ONE)[0].optimizer
    assert (getattr(equal, key), getattr(alone, key)) == (ours, theirs)


@pytest.mark.parametrize(
    ("params", "part"),
    [
        ({"trust_coef": 0.1}, "optimizer trust_coef in the DeepSpeed JSON is unknown to LARS"),
        ({"denominator": "norm"}, "optimizer denominator is 'norm'"),
        ({"clip": "yes"}, "give true or false"),
    ],
)
def test_parameters_that_LARS_does_not_have_are_refused(params, part):
    (problem,) = refused(config(8), optimizer_block("LARS", **params))
    assert part in problem


def test_forms_of_LARS_are_refused_for_others():
    (problem,) = refused(config(8, name="SGD", clip=True), {})
    assert "optimizer.clip is True: LARS alone has it" in problem


def test_a_base_rate_beside_a_rate_is_refused():
    (problem,) = refused(config(8, base_learning_rate=0.3), optimizer_block("LARS", lr=0.2))
    assert "optimizer.base_learning_rate is 0.3" in problem
    assert "lr 0.2" in problem


def test_a_schedule_has_one_owner():
    ds = {"scheduler": {"type": "WarmupLR", "params": {}}}
    (problem,) = refused(config(8), ds)
    assert "optimizer.schedule is 'cosine'" in problem
    assert "--optimizer.schedule none" in problem
    assert resolve(config(8, schedule="none"), ds, ONE)[1]["scheduler"] == ds["scheduler"]


@pytest.mark.parametrize("value", ["auto", -0.1, True])
@pytest.mark.parametrize("key", ["lr", "weight_decay", "momentum"])
def test_optimizer_values_are_numbers(key, value):
    (problem,) = refused(config(8), optimizer_block("SGD", **{key: value}))
    assert f"is {value!r} in the DeepSpeed JSON: give a number >= 0" in problem


def test_an_unknown_optimizer():
    (problem,) = refused(config(8, name="Lion"), {})
    assert "'Lion' is unknown" in problem
    assert all(name in problem for name in OPTIMIZERS)


def test_the_block_of_SGD():
    ds = optimizer_block("SGD", nesterov=True)
    _, filled = resolve(config(256, weight_decay=0.5), ds, ONE)
    assert filled["optimizer"] == {
        "type": "SGD",
        "params": {"lr": 0.3, "weight_decay": 0.5, "momentum": 0.9, "nesterov": True},
    }
    assert ds == optimizer_block("SGD", nesterov=True)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_the_block_of_Adam(name):
    ours = config(8, name=name, learning_rate=1e-3, weight_decay=0.1)
    _, filled = resolve(ours, optimizer_block(name, betas=[0.9, 0.95]), ONE)
    assert filled["optimizer"] == {
        "type": name,
        "params": {"lr": 1e-3, "weight_decay": 0.1, "betas": [0.9, 0.95], "torch_adam": True},
    }


def test_fp16_without_ZeRO_is_refused():
    for name in ("LARS", "SGD", "AdamW"):
        (problem,) = refused(config(8, name=name), {"fp16": {"enabled": True}})
        assert "fp16 at ZeRO stage 0" in problem and "stage 1, 2 or 3" in problem


@pytest.mark.parametrize(
    "ds",
    [
        *({"zero_optimization": {"stage": stage}} for stage in range(4)),
        *({"zero_optimization": {"stage": s}, "bf16": {"enabled": True}} for s in range(4)),
        *({"zero_optimization": {"stage": s}, "fp16": {"enabled": True}} for s in (1, 2, 3)),
        {"bf16": {"enabled": False}, "fp16": {"enabled": False}},
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    ],
)
def test_LARS_is_fine_where_it_is_exact(ds):
    assert resolve(config(8), ds, ONE)[0].optimizer.name == "LARS"


# Everything


def test_all_problems_come_at_once():
    ours = replace(config(9, name="SGD", momentum=0.1), run_dir="")
    ds = {
        **optimizer_block("LARS", momentum=0.2),
        "scheduler": {},
        "gradient_accumulation_steps": 3,
    }
    problems = refused(ours, ds, World(0, 2, 0, 2))
    for part in ("run_dir", "no multiple", "name", "momentum", "schedule"):
        assert sum(part in p for p in problems) >= 1, part
    assert len(problems) == 5


SHIPPED = Path(fastclr.recipes.__file__).parent


@pytest.mark.parametrize("recipe", fastclr.recipes.RECIPES)
def test_every_recipe_fits_the_plain_json(recipe):
    ours = fastclr.recipes.RECIPES[recipe]()
    ours = replace(ours, run_dir="runs/x", data=DataConfig(train="data/x"))
    resolved, filled = resolve(ours, read(SHIPPED / "fp32.json"), World(num_ranks=2))
    assert None not in (resolved.optimizer.learning_rate, resolved.optimizer.weight_decay)
    assert json.loads(json.dumps(filled)) == filled


@pytest.mark.parametrize(
    ("recipe", "rate"),
    [
        ("simclr-v1-paper", 4.8),
        ("simclr-tf-head", 0.075 * 4096**0.5),
        ("cifar10-readme", 2.0),
        ("rastogi-2021", 1e-3),
        ("ae-2408.14514", 1.5),
    ],
)
def test_recipes_have_the_rates_of_their_sources(recipe, rate):
    ours = fastclr.recipes.RECIPES[recipe]()
    ours = replace(ours, run_dir="runs/x", data=DataConfig(train="data/x"))
    resolved, _ = resolve(ours, {}, World())
    assert resolved.optimizer.learning_rate == pytest.approx(rate)


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.json")), ids=lambda file: file.name)
def test_every_shipped_json_can_be_read(file):
    assert read(file)
