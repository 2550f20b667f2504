"""Checkpoints: DeepSpeed's files, the weights in safetensors, and fastclr.json; whole or not there.

DeepSpeed moves its own ``latest`` before the other ranks have written, so it is not used: a
checkpoint is written under a temporary name, hashed, synced to disk and renamed, by the last start
of the run alone (``fencing.py``). The newest one whose files have their hashes is gone on from;
``latest`` and ``best`` only say names.

DeepSpeed unpickles its files. Nothing of a checkpoint is loaded before it is known that its files
are those of its list, plain ones, and not written by others than this user.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fastclr import fencing
from fastclr.collectives import from_all, from_first, together
from fastclr.config import ConfigError
from fastclr.facts import versions
from fastclr.fencing import Fence
from fastclr.files import keep_from_others, plain_files, sha256_of, sync, written_by_others
from fastclr.optim import LARS
from fastclr.sealing import Seals

logger = logging.getLogger(__name__)

FACTS, SEAL = "fastclr.json", "sha256_of_the_rest"
LAYERS = "lars.safetensors"
PROBE = "probe.safetensors"
WEIGHTS = "model.safetensors"
LATEST, BEST = "latest", "best"
_LOADED = (".pt", ".safetensors")  # what DeepSpeed and this module would read


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
    fence: Fence,
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
        fence: The right to write there.
        lars: The engine's optimizer, if it is LARS: its layers are saved whole too, so that other
            ranks, another ZeRO stage or another precision can go on from them.
        best: Whether no earlier one scored higher.
        probe: State of a probe that is trained beside the model; equal on every rank.

    Returns:
        Folder of the checkpoint, ``step-0001000``.

    Raises:
        FloatingPointError: If a weight is not finite; on every rank, and nothing is kept.
        OSError: If it cannot be written; on every rank. The last checkpoint stands.
        ConfigError: If a later start of the run has taken over; likewise.
    """
    name = f"step-{facts['step']:07d}"
    number = fence.writer.number
    partial = folder / f".{name}.{number}.partial"
    pointers = {folder / p: folder / f".{p}.{number}.partial" for p in (LATEST, BEST)[: 1 + best]}
    try:
        with Seals(partial) as seals:
            with together(), _disk_named(folder):
                if dist.get_rank() == 0:
                    fence.check()
                    for old in folder.glob(".*.partial"):  # of starts that were killed
                        _remove(old)
                    partial.mkdir(parents=True, mode=0o755)
            hashes = _write_tensors_of(engine, partial, facts["step"], seals, lars, probe)
            with together(), _disk_named(folder):
                if dist.get_rank() == 0:
                    whole = {**facts, "layout": _layout(engine)}
                    _write_list(partial, whole, hashes, fence, seals)
                    for coming in pointers.values():
                        seals.write_text(coming, json.dumps(name))
                seals.wait()
        with together(), _disk_named(folder):  # every rank's files are on the disk
            if dist.get_rank() == 0:
                _commit(partial, folder / name, fence)
                for pointer, coming in pointers.items():
                    _point(pointer, coming)
                _prune(folder, retention)
    except BaseException:
        if dist.get_rank() == 0:
            for part in (partial, *pointers.values()):
                _remove(part)  # it would take room that is needed
        raise
    return folder / name


def _write_tensors_of(
    engine: DeepSpeedEngine,
    partial: Path,
    step: int,
    seals: Seals,
    lars: LARS | None,
    probe: Mapping[str, torch.Tensor] | None,
) -> dict[str, str]:
    """Write all but the list; return the sha256 of every rank's files by name."""
    failures, folder = _save_weights(engine, partial / WEIGHTS, step, seals), partial.parent
    with together(), _disk_named(folder):
        if failures:
            raise failures[0]
    layers = lars.layer_state() if lars else {}
    with together(), _disk_named(folder):
        if dist.get_rank() == 0:
            _write_tensors(partial / LAYERS, layers, seals)
            _write_tensors(partial / PROBE, probe or {}, seals)
    # Last, because it takes longest: the files above are sealed beside it.
    with _failures_kept(engine, seals) as failures:
        engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False)
    with together(), _disk_named(folder):
        if failures:
            raise failures[0]
        hashes = seals.hashes()
    return {file: digest for own in from_all(hashes) for file, digest in own.items()}


def _write_tensors(file: Path, state: Mapping[str, torch.Tensor], seals: Seals) -> None:
    """Write tensors, if there are any."""
    if state:
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, file)
        seals.begin(file)


def _write_list(
    partial: Path, facts: Mapping[str, Any], hashes: dict[str, str], fence: Fence, seals: Seals
) -> None:
    """Write the list of a checkpoint's files, and begin to sync it and their names."""
    fence.check()
    files = {p.relative_to(partial).as_posix(): p for p in plain_files(partial)}
    for name in sorted(files.keys() - hashes.keys()):  # nobody said that it was written
        seals.begin(files[name])
        hashes = {**hashes, name: sha256_of(files[name])}
    if gone := sorted(hashes.keys() - files.keys()):
        raise OSError(f"{partial / gone[0]} was written by a rank and is not there for rank 0")
    owner = {"run": fence.writer.run, "start": fence.writer.number}
    settings = partial.parent.parent / "config.json"
    stamp = {"versions": versions(), "sha256": hashes, "config_sha256": None}
    if settings.is_file():
        stamp["config_sha256"] = sha256_of(settings)
    whole = {**facts, **owner, **stamp}
    keep_from_others(partial)
    seals.write_text(partial / FACTS, json.dumps({**whole, SEAL: _seal(whole)}, indent=1))
    seals.sync(partial)


def _remove(part: Path) -> None:
    """Remove what was begun, a folder or a file."""
    shutil.rmtree(part, ignore_errors=True)
    with suppress(OSError):
        part.unlink()


def _commit(partial: Path, final: Path, fence: Fence) -> None:
    """Put a checkpoint that is written, complete and on the disk, where it is looked for."""
    fence.check()
    shutil.rmtree(final, ignore_errors=True)  # a damaged one that was passed over
    partial.replace(final)
    sync(final.parent)


def _point(pointer: Path, coming: Path) -> None:
    """Let a pointer name its checkpoint; a folder that is in its way is put aside."""
    if pointer.is_dir() and not pointer.is_symlink():
        pointer.rename(pointer.with_name(f"{pointer.name}.was-a-folder"))
    coming.replace(pointer)


@contextmanager
def _disk_named(folder: Path) -> Iterator[None]:
    """Turn what is raised when a file cannot be written into one error that says where."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        free = "unknown"
        with suppress(OSError):
            free = f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB"
        raise OSError(
            f"a checkpoint in {folder} cannot be written: {error} (free on its disk: {free}). The "
            "last one stands: make room or mend the disk, and start the same command again."
        ) from error


@contextmanager
def _failures_kept(engine: Any, seals: Seals) -> Iterator[list[Exception]]:
    """Let DeepSpeed go on when a file cannot be written: the other ranks wait in its barriers.

    The failures are raised after it: a collective that a rank leaves alone hangs.
    What it has written is sealed while it writes the next.
    """
    writer, failures = engine.checkpoint_engine, []
    save_one = writer.save

    def keep(*args: Any, **options: Any) -> None:
        file = options.get("path") or args[-1]
        try:
            save_one(*args, **options)
            seals.begin(Path(file))
        except (OSError, RuntimeError) as error:  # torch's own writer raises the second
            failures.append(OSError(f"{file}: {error}"))

    writer.save = keep
    try:
        yield failures
    finally:
        del writer.save


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


def latest(folder: Path, run: str | None = None) -> Path | None:
    """Return the newest checkpoint whose files have their hashes; None for a new run.

    A damaged one is named in a warning and passed over.

    Args:
        folder: The run's folder of checkpoints.
        run: Name of the run that they must be of; None for any.

    Raises:
        ConfigError: If there are checkpoints and all are damaged.
    """
    checkpoints = list_checkpoints(folder)[::-1]
    for checkpoint in checkpoints:
        damage = _damage(checkpoint, run)
        if damage is None:
            pointer = _named(folder, LATEST)
            if pointer != checkpoint.name:
                logger.warning(
                    "%s says %r; %s is the newest whole one",
                    folder / LATEST,
                    pointer and pointer[:100],
                    checkpoint,
                )
            return checkpoint
        logger.warning("%s: it is passed over for the one before it", damage)
    if checkpoints or (folder / LATEST).exists():
        raise ConfigError(
            f"{folder} holds no whole checkpoint of the {len(checkpoints)} there "
            f"({_damage(checkpoints[0], run) if checkpoints else 'latest names one that is gone'}):"
            " nothing is started over silently. Restore one, or use a new --run-dir."
        )
    return None


def choose(folder: Path, given: Path | None, fence: Fence) -> Path | None:
    """Return the run's own newest checkpoint, or else the given one; every rank calls this.

    Rank 0 alone reads and hashes.

    Args:
        folder: The run's folder of checkpoints.
        given: Checkpoint of another run that a new run goes on from.
        fence: The right to write there.

    Raises:
        ConfigError: On every rank, as :func:`latest` and :func:`verified` do, or if others than
            this user could have written it: it will be unpickled.
    """
    found = None
    with together():
        if dist.get_rank() == 0:
            found = latest(folder, None if fence.is_first else fence.writer.run)
            ours: set[int] = set()
            if found:  # storage may call us another user: as it does with what we have just written
                ours = {(fence.run_dir / fencing.WRITER).stat().st_uid}
            elif given:
                found = verified(given)
            if found:
                _refuse_foreign(found, ours)
    return from_first(found)


def _refuse_foreign(checkpoint: Path, ours: set[int]) -> None:
    """Refuse to unpickle what others could have written."""
    if os.environ.get("FASTCLR_TRUST_FOLDER") == "1":
        return
    for path in (checkpoint, *plain_files(checkpoint)):
        if reason := written_by_others(path, ours):
            raise ConfigError(
                f"{reason}: whoever wrote it could run programs here, because DeepSpeed unpickles "
                f"its files. If you trust all of {checkpoint}, own it and `chmod -R go-w` it, or "
                "set FASTCLR_TRUST_FOLDER=1; weights alone are safe: --initial-weights "
                f"{checkpoint / WEIGHTS}."
            )


def verified(checkpoint: Path) -> Path:
    """Return a checkpoint that was named by hand.

    Raises:
        ConfigError: If it is none, or damaged.
    """
    if damage := _damage(checkpoint):
        raise ConfigError(f"{damage}. Name a folder RUN/checkpoints/step-*.")
    return checkpoint


def _damage(checkpoint: Path, run: str | None = None) -> str | None:
    """Say what is wrong with a checkpoint; nothing of it is unpickled."""
    try:
        # Before anything is opened: a pipe would never end.
        files = {p.relative_to(checkpoint).as_posix() for p in plain_files(checkpoint)} - {FACTS}
        facts = _sealed_facts(checkpoint / FACTS)
        hashes, name = facts["sha256"], checkpoint.name
        said = f"step {facts['step']} of run {facts.get('run', 'unknown')}"
        if name.startswith("step-") and name != f"step-{facts['step']:07d}":
            return f"{checkpoint} holds {said}"
        if run and facts.get("run", run) != run:
            return f"{checkpoint} holds {said}, and this is run {run}"
        for name in sorted(set(hashes) - files):
            return f"{checkpoint / name} is missing in {said}"
        for name in sorted(files - set(hashes)):
            if name.endswith(_LOADED):
                return f"{checkpoint / name} is none of the files of {said}"
        for name, digest in hashes.items():
            if (found := sha256_of(checkpoint / name)) != digest:
                return (
                    f"{checkpoint / name} does not have the sha256 it was saved with in {said}: "
                    f"{found}, not {digest}"
                )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{checkpoint} cannot be read ({type(error).__name__}: {error})"
    return None


def _sealed_facts(file: Path) -> dict[str, Any]:
    """Read a fastclr.json as it was written, to the byte; older ones have no seal."""
    text = file.read_text(encoding="utf-8")
    facts = json.loads(text)
    rest = {key: value for key, value in facts.items() if key != SEAL}
    is_whole = facts.get(SEAL) == _seal(rest) and text == json.dumps(facts, indent=1)
    if not is_whole and (SEAL in facts or "run" in facts):
        raise ValueError(f"{file.name} is not as it was written")
    return facts


def _seal(facts: Mapping[str, Any]) -> str:
    """Return the sha256 of facts."""
    return hashlib.sha256(json.dumps(facts, indent=1).encode()).hexdigest()


def _named(folder: Path, pointer: str) -> str | None:
    """Return what a pointer file names, or None."""
    try:
        return str(json.loads((folder / pointer).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
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


def _save_weights(engine: DeepSpeedEngine, file: Path, step: int, seals: Seals) -> list[Exception]:
    """Write the module's whole state on rank 0; gathers it under ZeRO stage 3.

    Returns:
        On rank 0, why it could not be written, or that a tensor is not finite; else nothing.
    """
    sharded = engine.zero_optimization_partition_weights()
    module = cast(nn.Module, engine.module)
    parameters = list(module.parameters()) if sharded else []
    with deepspeed.zero.GatheredParameters(parameters, enabled=sharded):
        if dist.get_rank() == 0:
            state = module.state_dict()
            for name, tensor in state.items():
                if not tensor.isfinite().all():
                    what = (
                        f"{name} is not finite after step {step}: such weights are not saved, the "
                        "last checkpoint stands. Lower the learning rate, or raise the temperature."
                    )
                    return [FloatingPointError(what)]
            try:
                _write_tensors(file, state, seals)
            except (OSError, SafetensorError) as error:
                return [error]
    return []
