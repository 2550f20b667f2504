"""A run that stopped and goes on takes the steps that it would have taken."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from fastclr import checkpointing
from fastclr.files import write_json
from fastclr.metrics import read_rows
from fastclr.verify.case import Case
from fastclr.verify.data import SEED, Images
from fastclr.verify.engine_check import no_batch_norm
from fastclr.verify.model import make_model
from fastclr.verify.rows import Row, compared, worst
from pipelines import SimCLRPolicy, make_loader

STOP, END, PER_EPOCH = 2, 4, 5  # steps
# On a GPU sums may be taken in another order at each start. A step without the momentum of those
# before differs by most of itself.
ON_GPU = 0.05


def measure(case: Case) -> dict[str, Any]:
    """Train to the end, then again from the checkpoint half-way, on new engines."""
    run_dir = case.scratch / "resume"
    checkpoints = run_dir / "checkpoints"
    found: dict[str, Any] = {}
    for seed, name in enumerate(("whole", "resumed")):
        found["clipping"] = _train(case, run_dir, seed)
        dist.barrier()  # the others may still be reading what is changed here
        if case.world.is_main:
            found[name] = _state(checkpoints / f"step-{END:07d}")
            found["halfway"] = _state(checkpoints / f"step-{STOP:07d}")
            rows = read_rows(run_dir / "metrics.jsonl")
            found[f"{name} losses"] = {row["step"]: row["loss"] for row in rows}
            # As if it had been stopped in between: whatever is chosen, it is not the end.
            shutil.rmtree(checkpoints / f"step-{END:07d}")
            write_json(checkpoints / checkpointing.LATEST, f"step-{STOP:07d}")
        dist.barrier()
    return found


def _train(case: Case, run_dir: Path, seed: int) -> float:
    """Train to the end from the latest checkpoint; return the norm that gradients are clipped to.

    What the checkpoint does not restore is another: the seed makes another model.
    """
    model = make_model(batch_norm=not no_batch_norm(case), dropout=0.2, seed=seed)
    owned_by_json = "scheduler" in case.ds
    trainer = case.trainer(
        model,
        run_dir,
        case.ds,
        optimizer=case.lars(model) if case.uses_lars else None,
        warmup_epochs=0.3,
        schedule="none" if owned_by_json else "cosine",
        seed=SEED,
        log_every=1,
        checkpoint_every=STOP,
    )
    loader = make_loader(
        Images(PER_EPOCH * case.images_per_rank * case.world.num_ranks),
        SimCLRPolicy(size=8),
        micro_batch_size=case.images_per_rank,
        seed=SEED,
        world=case.world,
        device=case.device,
    )
    trainer.fit(loader, epochs=END / PER_EPOCH)
    clipping = trainer.engine.gradient_clipping()
    trainer.engine.destroy()
    return clipping


def _state(checkpoint: Path) -> dict[str, Any]:
    """Return the tensors of a checkpoint that are the same under every ZeRO stage."""
    found = {f"model/{k}": v for k, v in checkpointing.load_weights(checkpoint, "").items()}
    if (checkpoint / checkpointing.LAYERS).exists():
        found |= load_file(checkpoint / checkpointing.LAYERS)
    return {name: tensor.double().flatten().tolist() for name, tensor in found.items()}


def judge(case: Case, found: list[dict[str, Any]]) -> Iterator[Row]:
    """Compare the end of both runs: bit for bit on the CPU."""
    main, exact = found[0], case.device.type == "cpu"
    limit, how = (0.0, "bit for bit") if exact else (ON_GPU, "relative to the way from there")
    losses = [main[f"{name} losses"] for name in ("whole", "resumed")]
    after = [str(step) for step in range(STOP + 1, END + 1)]
    off = [abs(losses[0][step] - losses[1].get(step, torch.nan)) for step in after]
    way = 1.0 if exact else abs(losses[0][after[0]])
    what = f"losses of steps {', '.join(after)} on a new engine, {how}"
    yield compared("resume", what, off[worst(off)] / way, limit)
    kinds = "weights and momenta" if case.uses_lars else "weights"
    what = f"{kinds} after step {END} on a new engine, {how}"
    deviations = {}
    for name, numbers in main["whole"].items():
        end = torch.tensor(numbers, dtype=torch.float64)
        start, other = (
            torch.tensor(main[key].get(name, torch.nan), dtype=torch.float64)
            for key in ("halfway", "resumed")
        )
        way = 1.0 if exact else (end - start).norm().clamp(min=1e-30).item()
        deviations[name] = (end - other).norm().item() / way
    name = list(deviations)[worst(list(deviations.values()))]
    note = f"most in {name}" if deviations[name] else ""
    yield compared("resume", what, deviations[name], limit, note)
    named = case.ds.get("gradient_clipping")
    says = "which names none" if named is None else f"{named:g}"
    what = (
        f"norm that gradients are clipped to: the engine's {main['clipping']:g}, the JSON's {says}"
    )
    yield compared("clipping", what, abs(main["clipping"] - (named or 0.0)), 0)
