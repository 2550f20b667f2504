"""Checkpoints: DeepSpeed's files, the weights in safetensors, and fastclr.json; whole or not there.

DeepSpeed moves its own ``latest`` before the other ranks have written, so it is not used: a
checkpoint is written under a temporary name, hashed, renamed, and only then named in ``latest``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors.torch import load_file, save_file
from torch import nn

from fastclr.config import ConfigError
from fastclr.files import sha256_of, write_json
from fastclr.optim import LARS

FACTS = "fastclr.json"
LAYERS = "lars.safetensors"
WEIGHTS = "model.safetensors"
LATEST = "latest"


def save(
    engine: DeepSpeedEngine,
    folder: Path,
    facts: dict[str, Any],
    keep: int,
    lars: LARS | None = None,
) -> Path:
    """Write a checkpoint; every rank calls this.

    Args:
        engine: Engine whose module, optimizer and schedule are saved.
        lars: The engine's optimizer, if it is LARS: its layers are saved whole too, so that other
            ranks, another ZeRO stage or another precision can go on from them.
        folder: The run's folder of checkpoints, shared by all ranks.
        facts: What fastclr needs to go on; has ``step``. Equal on every rank.
        keep: Checkpoints kept; older ones are deleted after the new one stands.

    Returns:
        Folder of the checkpoint, ``step-0001000``.
    """
    name = f"step-{facts['step']:07d}"
    final, partial = folder / name, folder / f".{name}.partial"
    is_main = dist.get_rank() == 0
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False)
    _save_weights(engine, partial / WEIGHTS)
    layers = lars.layer_state() if lars else {}
    if is_main and layers:
        save_file(layers, partial / LAYERS)
    dist.barrier()  # every rank has written
    if is_main:
        files = [p for p in sorted(partial.rglob("*")) if p.is_file()]
        hashes = {p.relative_to(partial).as_posix(): sha256_of(p) for p in files}
        write_json(partial / FACTS, {**facts, "layout": _layout(engine), "sha256": hashes})
        shutil.rmtree(final, ignore_errors=True)  # left by a run that stopped before `latest`
        partial.replace(final)
        write_json(folder / LATEST, name)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / FACTS).is_file())


def latest(folder: Path) -> Path | None:
    """Return the checkpoint that ``latest`` names, its hashes verified; None for a new run.

    Raises:
        ConfigError: If ``latest`` or the checkpoint it names is missing or damaged.
    """
    if not (folder / LATEST).exists():
        return None
    try:
        name = json.loads((folder / LATEST).read_text(encoding="utf-8"))
        checkpoint = folder / Path(name).name
        expected = read_facts(checkpoint)["sha256"]
        damaged = [n for n, digest in expected.items() if sha256_of(checkpoint / n) != digest]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{folder / LATEST} or the checkpoint it names cannot be read ({error}): nothing is "
            "started over silently. Name an older step-* folder in it, or use a new --run-dir."
        ) from error
    if damaged:
        raise ConfigError(
            f"{checkpoint / damaged[0]} does not have the sha256 it was saved with: the file is "
            f"damaged. Write an older step-* folder's name into {folder / LATEST}."
        )
    return checkpoint


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's fastclr.json."""
    return json.loads((checkpoint / FACTS).read_text(encoding="utf-8"))


def load(engine: DeepSpeedEngine, checkpoint: Path, lars: LARS | None = None) -> dict[str, Any]:
    """Load a verified checkpoint into the engine; every rank calls this. Returns its facts.

    Args:
        engine: To be loaded into.
        checkpoint: Folder of the checkpoint.
        lars: The engine's optimizer, if it is LARS. Then the number of ranks, the ZeRO stage and
            the precision may differ from those it was saved under.

    Raises:
        ConfigError: If the engine is laid out otherwise and no whole layers were saved.
    """
    facts, layout = read_facts(checkpoint), _layout(engine)
    if facts.get("layout", layout) == layout:  # bit for bit
        tag, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if tag is not None:
            return facts
    elif lars and (checkpoint / LAYERS).is_file():
        _load_weights(engine, checkpoint / WEIGHTS)
        lars.load_layer_state(load_file(checkpoint / LAYERS))
        return facts
    raise ConfigError(
        f"{checkpoint} was saved under {facts.get('layout')}, this run has {layout}: DeepSpeed "
        "cannot lay its optimizer's state out anew. Use the same, or LARS, or a new --run-dir."
    )


def _layout(engine: DeepSpeedEngine) -> dict[str, Any]:
    """Return what the pieces of the optimizer's state depend on."""
    return {
        "num_ranks": dist.get_world_size(),
        "stage": engine.zero_optimization_stage(),
        "optimizer": type(engine.optimizer).__name__,
    }


def load_weights(checkpoint: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Return the weights whose name begins with ``prefix``, which is cut off."""
    weights = load_file(checkpoint / WEIGHTS)
    return {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}


def _load_weights(engine: DeepSpeedEngine, file: Path) -> None:
    """Load the module's whole state on every rank; shards it under ZeRO stage 3."""
    sharded = engine.zero_optimization_partition_weights()
    module, state = cast(nn.Module, engine.module), load_file(file)
    parameters = list(module.parameters()) if sharded else []
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=sharded):
        module.load_state_dict(state)


def _save_weights(engine: DeepSpeedEngine, file: Path) -> None:
    """Write the module's whole state on rank 0; gathers it under ZeRO stage 3."""
    sharded = engine.zero_optimization_partition_weights()
    module = cast(nn.Module, engine.module)
    parameters = list(module.parameters()) if sharded else []
    with deepspeed.zero.GatheredParameters(parameters, enabled=sharded):
        if dist.get_rank() == 0:
            state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
            save_file(state, file)
