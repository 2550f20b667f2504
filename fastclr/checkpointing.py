"""Checkpoints: DeepSpeed's files, the weights in safetensors, and fastclr.json; whole or not there.

DeepSpeed moves its own ``latest`` before the other ranks have written, so it is not used: a
checkpoint is written under a temporary name, hashed, synced to disk and renamed. The newest one
whose files have their hashes is gone on from; ``latest`` and ``best`` only say names.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors.torch import load_file, save_file
from torch import nn

from fastclr.config import ConfigError
from fastclr.facts import versions
from fastclr.files import sha256_of, sync, write_json
from fastclr.optim import LARS

logger = logging.getLogger(__name__)

FACTS = "fastclr.json"
LAYERS = "lars.safetensors"
PROBE = "probe.safetensors"
WEIGHTS = "model.safetensors"
LATEST, BEST = "latest", "best"


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept; the best by online evaluation always is.

    Attributes:
        last: The last so many.
        every: And those whose step is a multiple; 0 for none.
    """

    last: int = 2
    every: int = 0


def save(
    engine: DeepSpeedEngine,
    folder: Path,
    facts: Mapping[str, Any],
    retention: Retention,
    lars: LARS | None = None,
    best: bool = False,
    probe: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a checkpoint; every rank calls this.

    Args:
        engine: Engine whose module, optimizer and schedule are saved.
        folder: The run's folder of checkpoints, shared by all ranks.
        facts: What fastclr needs to go on; has ``step``. Equal on every rank.
        retention: Which older ones are kept once the new one stands.
        lars: The engine's optimizer, if it is LARS: its layers are saved whole too, so that other
            ranks, another ZeRO stage or another precision can go on from them.
        best: Whether no earlier one scored higher.
        probe: State of a probe that is trained beside the model; equal on every rank.

    Returns:
        Folder of the checkpoint, ``step-0001000``.

    Raises:
        FloatingPointError: If a weight is not finite; on every rank, and nothing is kept.
    """
    name = f"step-{facts['step']:07d}"
    final, partial = folder / name, folder / f".{name}.partial"
    is_main = dist.get_rank() == 0
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    _refuse_non_finite(engine, _save_weights(engine, partial / WEIGHTS), facts["step"])
    engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False)
    layers = lars.layer_state() if lars else {}
    if is_main and layers:
        save_file(layers, partial / LAYERS)
    if is_main and probe:
        save_file({k: v.cpu().contiguous() for k, v in probe.items()}, partial / PROBE)
    dist.barrier()  # every rank has written
    if is_main:
        files = [p for p in sorted(partial.rglob("*")) if p.is_file()]
        hashes = {p.relative_to(partial).as_posix(): sha256_of(p) for p in files}
        for path in (*files, partial):
            sync(path)
        stamp = {"layout": _layout(engine), "versions": versions(), "sha256": hashes}
        write_json(partial / FACTS, {**facts, **stamp})
        shutil.rmtree(final, ignore_errors=True)  # a damaged one that was passed over
        partial.replace(final)
        sync(folder)
        for pointer in (LATEST, BEST) if best else (LATEST,):
            write_json(folder / pointer, name)
        _prune(folder, retention)
    dist.barrier()
    return final


def _prune(folder: Path, retention: Retention) -> None:
    """Delete the checkpoints that nothing keeps."""
    best = _named(folder, BEST)
    for old in list_checkpoints(folder)[: -retention.last]:
        is_multiple = retention.every and int(old.name.split("-")[1]) % retention.every == 0
        if old.name != best and not is_multiple:
            shutil.rmtree(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / FACTS).is_file())


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files have their hashes; None for a new run.

    A damaged one is named in a warning and passed over.

    Raises:
        ConfigError: If there are checkpoints and all are damaged.
    """
    checkpoints = list_checkpoints(folder)[::-1]
    for checkpoint in checkpoints:
        damage = _damage(checkpoint)
        if damage is None:
            pointer = _named(folder, LATEST)
            if pointer != checkpoint.name:
                logger.warning(
                    "%s says %r; %s is the newest whole one", folder / LATEST, pointer, checkpoint
                )
            return checkpoint
        logger.warning("%s: it is passed over for the one before it", damage)
    if checkpoints or (folder / LATEST).exists():
        raise ConfigError(
            f"{folder} holds no whole checkpoint of the {len(checkpoints)} there "
            f"({_damage(checkpoints[0]) if checkpoints else 'latest names one that is gone'}): "
            "nothing is started over silently. Restore one, or use a new --run-dir."
        )
    return None


def choose(folder: Path, given: Path | None, device: torch.device) -> Path | None:
    """Return the run's own newest checkpoint, or else the given one; every rank calls this.

    Rank 0 alone reads and hashes.

    Raises:
        ConfigError: On every rank, as :func:`latest` and :func:`verified` do.
    """
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = latest(folder) or (verified(given) if given else None)
        except ConfigError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, device=device)
    if found[1]:
        raise ConfigError(found[1])
    return found[0]


def verified(checkpoint: Path) -> Path:
    """Return a checkpoint that was named by hand.

    Raises:
        ConfigError: If it is none, or damaged.
    """
    if damage := _damage(checkpoint):
        raise ConfigError(f"{damage}. Name a folder RUN/checkpoints/step-*.")
    return checkpoint


def _damage(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint."""
    try:
        for name, digest in read_facts(checkpoint)["sha256"].items():
            if sha256_of(checkpoint / name) != digest:
                return f"{checkpoint / name} does not have the sha256 it was saved with"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{checkpoint} cannot be read ({type(error).__name__}: {error})"
    return None


def _named(folder: Path, pointer: str) -> str | None:
    """Return what a pointer file names, or None."""
    try:
        return str(json.loads((folder / pointer).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's fastclr.json."""
    return json.loads((checkpoint / FACTS).read_text(encoding="utf-8"))


def load(
    engine: DeepSpeedEngine, checkpoint: Path, lars: LARS | None = None, probe: Any = None
) -> dict[str, Any]:
    """Load a verified checkpoint into the engine; every rank calls this. Returns its facts.

    Args:
        engine: To be loaded into.
        checkpoint: Folder of the checkpoint.
        lars: The engine's optimizer, if it is LARS. Then the number of ranks, the ZeRO stage and
            the precision may differ from those it was saved under.
        probe: Gets the saved probe's state, by ``load_state_dict``; stays as it is if there is
            none in the checkpoint.

    Raises:
        ConfigError: If the engine is laid out otherwise and no whole layers were saved.
    """
    facts, layout = read_facts(checkpoint), _layout(engine)
    if probe and (state := load_probe(checkpoint)):
        probe.load_state_dict(state)
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


def load_probe(checkpoint: Path) -> dict[str, torch.Tensor] | None:
    """Return the state of the probe that was trained beside the model; None if there was none."""
    file = checkpoint / PROBE
    return load_file(file) if file.is_file() else None


def _load_weights(engine: DeepSpeedEngine, file: Path) -> None:
    """Load the module's whole state on every rank; shards it under ZeRO stage 3."""
    sharded = engine.zero_optimization_partition_weights()
    module, state = cast(nn.Module, engine.module), load_file(file)
    parameters = list(module.parameters()) if sharded else []
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=sharded):
        module.load_state_dict(state)


def _refuse_non_finite(engine: DeepSpeedEngine, name: str | None, step: int) -> None:
    """Raise on every rank if rank 0 found a weight that is not finite."""
    found = [name]
    dist.broadcast_object_list(found, device=engine.device)
    if found[0]:
        raise FloatingPointError(
            f"{found[0]} is not finite after step {step}: such weights are not saved, the last "
            "checkpoint stands. Lower the learning rate, or raise the temperature."
        )


def _save_weights(engine: DeepSpeedEngine, file: Path) -> str | None:
    """Write the module's whole state on rank 0; gathers it under ZeRO stage 3.

    Returns:
        The name of a tensor that is not finite, on rank 0, and then writes nothing.
    """
    sharded = engine.zero_optimization_partition_weights()
    module = cast(nn.Module, engine.module)
    parameters = list(module.parameters()) if sharded else []
    with deepspeed.zero.GatheredParameters(parameters, enabled=sharded):
        if dist.get_rank() == 0:
            state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
            for name, tensor in state.items():
                if not tensor.isfinite().all():
                    return name
            save_file(state, file)
    return None
