"""The user's DeepSpeed JSON: read strictly, merged with the run's configuration.

One key, one owner: the JSON owns batch sizes, precision, ZeRO, communication, clipping and
monitors, and may own the optimizer and its schedule; the configuration fills in what it leaves
out. Set on both sides with different values is an error that names both.
"""

from __future__ import annotations

import json
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from fastclr.config import Config, ConfigError, OptimizerConfig, raise_all
from fastclr.optim.schedules import scaled_learning_rate
from fastclr.world import World

JSON = dict[str, Any]

DEFAULT_OPTIMIZER = OptimizerConfig(
    name="LARS",
    weight_decay=1e-6,
    momentum=0.9,
    trust_coefficient=1e-3,
    denominator="decayed_gradient",
    rate_inside_momentum=True,
    clip=False,
    nesterov=False,
)
OPTIMIZERS = ("LARS", "SGD", "Adam", "AdamW", "Lamb")
NUMBERS = ("learning_rate", "weight_decay", "momentum", "trust_coefficient")
# What DeepSpeed 0.19.8 reads; it passes over any other key without a word.
KEYS = frozenset({
    "activation_checkpointing", "aio", "autotuning", "bf16", "bfloat16", "checkpoint", "comet",
    "comms_logger", "communication_data_type", "compile", "csv_monitor", "data_efficiency",
    "data_types", "dataloader_drop_last", "datastates_ckpt", "disable_allgather",
    "disable_python_gc", "dump_state", "expert_parallel", "flops_profiler", "fp16",
    "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping",
    "gradient_predivide_factor", "hybrid_engine", "log_level", "managed_gradient_accumulation",
    "memory_breakdown", "optimizer", "pipeline", "prescale_gradients", "scheduler",
    "seq_parallel_communication_data_type", "steps_per_print", "tensor_parallel", "tensorboard",
    "timers", "torch_autocast", "train_batch_size", "train_micro_batch_size_per_gpu",
    "use_data_before_expert_parallelism", "wall_clock_breakdown", "wandb",
    "weight_quantization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "zero_optimization",
})  # fmt: skip
BUNDLED = Path(__file__).with_name("recipes")  # JSON files that are known by their name
FORMS = ("denominator", "rate_inside_momentum", "clip", "nesterov")  # of LARS


def read(path: str | Path) -> JSON:
    """Read a DeepSpeed JSON file, or one that comes with fastclr by its name: ``fp32``.

    Raises:
        ConfigError: If it is missing, no JSON object, or names one key twice.
    """
    if not str(path):
        raise ConfigError(
            "--ds-config is missing: it says batch, precision and ZeRO stage. Give a DeepSpeed "
            f"JSON, or the name of one that comes with fastclr: {', '.join(bundled())}."
        )

    def unique(pairs: list[tuple[str, Any]]) -> JSON:
        keys = [key for key, _ in pairs]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ConfigError(
                f"DeepSpeed JSON {path} has the key {twice[0]!r} twice in one object: only the "
                "last would count. Remove one."
            )
        return dict(pairs)

    try:
        text = _file(path).read_text(encoding="utf-8")
        loaded: Any = json.loads(text, object_pairs_hook=unique)
    except OSError as error:
        raise ConfigError(
            f"DeepSpeed JSON {path} cannot be read ({error.strerror}): give --ds-config a file, or "
            f"the name of one that comes with fastclr: {', '.join(bundled())}."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"DeepSpeed JSON {path} is no JSON: {error}.") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"DeepSpeed JSON {path} holds a {type(loaded).__name__}, no object.")
    ds = cast(JSON, loaded)
    raise_all(
        [
            f"{key} is {ds[key]!r} in DeepSpeed JSON {path}: give an object, {{...}}."
            for key in ("optimizer", "scheduler", "zero_optimization", "fp16", "bf16", "bfloat16")
            if not isinstance(ds.get(key, {}), dict)
        ]
    )
    return ds


def bundled() -> list[str]:
    """Return the names of the JSON files that come with fastclr."""
    return sorted(file.stem for file in BUNDLED.glob("*.json"))


def _file(path: str | Path) -> Path:
    """Return the file that a path or a name means; a file that is there wins."""
    is_name = not Path(path).exists() and str(path) in bundled()
    return BUNDLED / f"{path}.json" if is_name else Path(path)


def resolve(config: Config, ds: JSON, world: World) -> tuple[Config, JSON]:
    """Merge a configuration and a DeepSpeed JSON; check both and everything between them.

    Args:
        config: The run's configuration; ``None`` where it leaves a value open.
        ds: The user's JSON; not changed.
        world: How many ranks share the batch.

    Returns:
        The configuration with every value of batch and optimizer filled in, and the JSON that goes
        to the engine: batch sizes and, unless it is LARS, the optimizer filled in.

    Raises:
        ConfigError: With every problem found, one a line.
    """
    problems = config.problems()
    ds = dict(ds)
    global_batch_size = _merge_batch(config, ds, world, problems)
    optimizer = _merge_optimizer(config.optimizer, ds, global_batch_size, problems)
    problems += engine_problems(ds, optimizer.name)
    raise_all(problems)
    resolved = replace(config, global_batch_size=global_batch_size, optimizer=optimizer)
    if optimizer.name == "LARS":
        ds.pop("optimizer", None)  # LARS is ours: it reaches the engine as an object
    else:
        ds["optimizer"] = _engine_optimizer(optimizer, ds.get("optimizer", {}))
    return resolved, ds


def images_per_rank(ds: JSON, world: World) -> int:
    """Return the images of one rank and step in a resolved JSON: all its micro-batches."""
    return ds["train_batch_size"] // world.num_ranks


def _one_owner(key: str, ours: Any, ds_key: str, theirs: Any, problems: list[str]) -> Any:
    """Return the value of whichever side sets it; note a problem if both do and differ."""
    if ours is not None and theirs is not None and ours != theirs:
        problems.append(
            f"{key} is {ours!r} in the recipe or flags and {ds_key} is {theirs!r} in the DeepSpeed "
            "JSON: one key, two owners. Make them equal or remove one."
        )
    return theirs if ours is None else ours


def _is_number(value: Any) -> bool:
    """Whether a JSON value is a number; "auto" is another trainer's."""
    return type(value) in (int, float)


def _merge_batch(config: Config, ds: JSON, world: World, problems: list[str]) -> int:
    """Fill the JSON's three batch keys; return the global batch size."""
    micro = ds.get("train_micro_batch_size_per_gpu")
    steps = ds.setdefault("gradient_accumulation_steps", 1)
    total = ds.get("train_batch_size")
    sizes: dict[str, Any] = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    for key, value in sizes.items():
        if value is not None and (type(value) is not int or value < 1):
            problems.append(f"{key} is {value!r} in the DeepSpeed JSON: give an integer >= 1.")
            return 2
    implied = None if micro is None else micro * steps * world.num_ranks
    if None not in (total, implied) and total != implied:
        problems.append(
            f"train_batch_size is {total} and train_micro_batch_size_per_gpu {micro} x {steps} "
            f"steps x {world.num_ranks} ranks is {implied}, both in the DeepSpeed JSON: make them "
            "equal or remove one."
        )
    total = implied if total is None else total
    total = _one_owner(
        "global_batch_size", config.global_batch_size, "train_batch_size", total, problems
    )
    if total is None:
        problems.append(
            "no batch size is set: give --global-batch-size, or train_batch_size in the JSON."
        )
        return 2
    if total < 2:
        problems.append(
            f"global_batch_size is {total}: NT-Xent contrasts images with each other and one "
            "image has no negative. Give 2 or more (hundreds, to learn something)."
        )
        return 2
    if total % (world.num_ranks * steps):
        problems.append(
            f"global_batch_size {total} is no multiple of {world.num_ranks} ranks x {steps} "
            "gradient_accumulation_steps: every rank and micro-batch holds the same number of "
            "images. Change one of them."
        )
    ds["train_batch_size"] = total
    ds["train_micro_batch_size_per_gpu"] = total // (world.num_ranks * steps)
    return total


def _merge_optimizer(
    config: OptimizerConfig, ds: JSON, global_batch_size: int, problems: list[str]
) -> OptimizerConfig:
    """Fill in name, rate, decay and momentum from the JSON, then from the defaults."""
    block: JSON = ds.get("optimizer", {})
    params: JSON = block.get("params", {})
    theirs = {
        "name": block.get("type"),
        **{key: params.get("lr" if key == "learning_rate" else key) for key in NUMBERS},
    }
    for key in NUMBERS:
        value = theirs[key]
        if value is not None and not (_is_number(value) and value >= 0):
            problems.append(
                f"optimizer {key} is {value!r} in the DeepSpeed JSON: give a number >= 0."
            )
            theirs[key] = None
    if (theirs["name"] or config.name or "LARS") == "LARS":
        theirs |= {key: params.get(key) for key in FORMS}
        problems += _form_problems(params)
    elif given := [key for key in FORMS if getattr(config, key) is not None]:
        problems.append(
            f"optimizer.{given[0]} is {getattr(config, given[0])!r}: LARS alone has it. Leave it "
            "out."
        )
    merged = {
        key: _one_owner(
            f"optimizer.{key}", getattr(config, key), f"optimizer {key}", value, problems
        )
        for key, value in theirs.items()
    }
    for key, value in merged.items():
        if value is None:
            merged[key] = getattr(DEFAULT_OPTIMIZER, key)
    if merged["learning_rate"] is None:
        base = config.base_learning_rate if config.base_learning_rate is not None else 0.3
        merged["learning_rate"] = scaled_learning_rate(base, global_batch_size, config.scaling)
    elif config.base_learning_rate is not None and config.learning_rate is None:
        problems.append(
            f"optimizer.base_learning_rate is {config.base_learning_rate} in the recipe or flags "
            f"and lr {merged['learning_rate']} in the DeepSpeed JSON: two owners of the rate. "
            "Pass --optimizer.base-learning-rate None, or remove lr from the JSON."
        )
    if merged["name"] not in OPTIMIZERS:
        problems.append(
            f"optimizer {merged['name']!r} is unknown: choose from {', '.join(OPTIMIZERS)}."
        )
    if "scheduler" in ds and config.schedule != "none":
        problems.append(
            f"optimizer.schedule is {config.schedule!r} and the DeepSpeed JSON has a scheduler: "
            "two owners of the rate. Pass --optimizer.schedule none, or remove it from the JSON."
        )
    return replace(config, **merged, base_learning_rate=None)


def _form_problems(params: JSON) -> list[str]:
    """Say which of the JSON's parameters LARS would not understand."""
    known = ("lr", *NUMBERS[1:], *FORMS)
    problems = [
        f"optimizer {key} in the DeepSpeed JSON is unknown to LARS: choose from {', '.join(known)}."
        for key in sorted(params.keys() - set(known))
    ]
    for key in FORMS:
        values = ("decayed_gradient", "sum_of_norms") if key == "denominator" else (True, False)
        if params.get(key) is not None and params[key] not in values:
            problems.append(
                f"optimizer {key} is {params[key]!r} in the DeepSpeed JSON: give "
                f"{' or '.join(map(json.dumps, values))}."
            )
    return problems


def engine_problems(ds: JSON, optimizer_name: str | None) -> list[str]:
    """Say what the engine would do wrongly without a word, one sentence a problem."""
    problems: list[str] = []
    if optimizer_name is None:
        problems.append("there is no optimizer: pass one, or describe it in the DeepSpeed JSON.")
    problems += _key_problems(ds)
    stage = ds.get("zero_optimization", {}).get("stage", 0)
    if ds.get("fp16", {}).get("enabled") and stage == 0:
        problems.append(
            "fp16 at ZeRO stage 0 is refused: DeepSpeed 0.19.8 divides the gradients by a loss "
            "scale that it has not multiplied the loss by, so every optimizer steps wrongly. Use "
            "stage 1, 2 or 3, or bf16."
        )
    return problems


def _key_problems(ds: JSON) -> list[str]:
    """Say which keys would train something else than they say."""
    near = {key: get_close_matches(key, KEYS, 1, 0.8) for key in sorted(ds.keys() - KEYS)}
    problems = [
        f"{key!r} in the DeepSpeed JSON is no key that DeepSpeed reads: it would be passed over "
        f"without a word. Did you mean {found[0]!r}?"
        for key, found in near.items()
        if found
    ]
    if ds.get("gradient_allreduce_op", "mean") != "mean":
        problems.append(
            f"gradient_allreduce_op is {ds['gradient_allreduce_op']!r} in the DeepSpeed JSON: the "
            "losses count on the mean over ranks, any other gradient is too large by the number of "
            "ranks. Remove it."
        )
    if not ds.get("managed_gradient_accumulation", True):
        problems.append(
            "managed_gradient_accumulation is false in the DeepSpeed JSON: the optimizer would "
            "step after each chunk of a batch. Remove it."
        )
    if "activation_checkpointing" in ds:
        problems.append(
            "activation_checkpointing is in the DeepSpeed JSON: DeepSpeed applies it only where a "
            "model calls its functions, and no encoder of timm does. Remove it and pass "
            "--encoder.activation-checkpointing."
        )
    return problems


def _engine_optimizer(optimizer: OptimizerConfig, block: JSON) -> JSON:
    """Describe SGD, Adam, AdamW or Lamb to DeepSpeed."""
    params: JSON = {"lr": optimizer.learning_rate, "weight_decay": optimizer.weight_decay}
    if optimizer.name == "SGD":
        params["momentum"] = optimizer.momentum
    elif optimizer.name != "Lamb":
        params["torch_adam"] = True  # DeepSpeed's own are compiled at the first start
    return {"type": optimizer.name, "params": {**block.get("params", {}), **params}}
