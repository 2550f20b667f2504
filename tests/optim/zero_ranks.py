"""Trains a model of odd sizes under every ZeRO stage on each rank; started by test_zero."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from fastclr.config import ConfigError
from fastclr.optim import LARS, lars
from fastclr.optim.segments import numel

NUM_STEPS, NUM_ROWS, WIDTH = 10, 8, 12
STAGES = (0, 1, 2, 3)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RATE, DECAY = 0.5, 1e-2


def make_model() -> nn.Module:
    """Return layers whose sizes no number of ranks divides; a bias and a norm among them.

    Smooth: at a kink, one bit of rounding decides whether a neuron learns at all, and distances in
    half precision say more of that than of the optimizer (LARS over SGD: 0.06 to 27 with ReLU).
    """
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, 17, bias=False),
        nn.LayerNorm(17),
        nn.Tanh(),
        nn.Linear(17, 33),
        nn.Tanh(),
        nn.Linear(33, 5, bias=False),
    )


def make_lars(model: nn.Module) -> LARS:
    """Return LARS with numbers that all matter."""
    return LARS.for_module(model, RATE, DECAY, trust_coefficient=0.05)


def make_sgd(model: nn.Module) -> torch.optim.SGD:
    """Return SGD whose layers move as far as LARS moves them: only roundings tell them apart."""
    mean = {name: sum(r) / len(r) for name, r in ratios(0).items()}
    groups = [
        {"params": [p], "lr": RATE * mean.get(name, 1.0), "weight_decay": DECAY * (p.ndim > 1)}
        for name, p in model.named_parameters()
    ]
    return torch.optim.SGD(groups, momentum=0.9)


MAKERS = {"LARS": make_lars, "SGD": make_sgd}


def make_engine(optimizer: Any, model: nn.Module, stage: int, precision: str, **zero: Any) -> Any:
    """Start an engine; LARS is attached."""
    config = {
        "train_micro_batch_size_per_gpu": NUM_ROWS // dist.get_world_size(),
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16", "initial_scale_power": 8},
    }
    if precision == "bf16 accumulated in fp32":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if isinstance(optimizer, LARS):
        optimizer.attach(engine)
    return engine


def take_steps(engine: Any, first: int = 0, num_steps: int = NUM_STEPS, spoil: int = -1) -> None:
    """Train; step ``spoil`` gets an infinite loss."""
    dtype = next(engine.module.parameters()).dtype
    for step in range(first, first + num_steps):
        generator = torch.Generator().manual_seed(step)
        rows_NP = torch.randn(NUM_ROWS, WIDTH, generator=generator).to(dtype)
        rows_NP = rows_NP.chunk(dist.get_world_size())[dist.get_rank()]
        loss = (engine(rows_NP).float() - 1).square().mean()
        engine.backward(loss * float("inf") if step == spoil else loss)
        engine.step()


def weights(engine: Any) -> list[float]:
    """Return all fp32 weights of an engine, whole."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups"):  # bf16 at stage 0
        copies = zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups), strict=True)
        by_id = {id(p): copy for p, copy in copies}
        found = [by_id[id(p)] for p in engine.module.parameters()]
    elif optimizer is engine.basic_optimizer:
        found = list(engine.module.parameters())
    else:
        found = [deepspeed.utils.safe_get_full_fp32_param(p) for p in engine.module.parameters()]
    return torch.cat([w.detach().flatten() for w in found]).tolist()


def train(name: str, stage: int, precision: str, **zero: Any) -> list[float]:
    """Return all weights after ten steps."""
    model = make_model()
    engine = make_engine(MAKERS[name](model), model, stage, precision, **zero)
    take_steps(engine)
    found = weights(engine)
    engine.destroy()
    return found


@contextmanager
def recorded_ratios() -> Iterator[list[torch.Tensor]]:
    """Record the trust ratios of every step."""
    found: list[torch.Tensor] = []
    original = lars._ratios

    def recording(*args: Any) -> torch.Tensor:
        found.append(original(*args))
        return found[-1]

    with mock.patch.object(lars, "_ratios", recording):
        yield found


@functools.cache
def ratios(stage: int) -> dict[str, list[float]]:
    """Return the ratios that any rank gave a layer in ten steps."""
    model = make_model()
    optimizer = make_lars(model)
    engine = make_engine(optimizer, model, stage, "fp32")
    with recorded_ratios() as ratio_TS:
        take_steps(engine)
    adapted = {name for name, p in make_model().named_parameters() if p.ndim > 1}
    table = optimizer._table
    held = [table.names[s.layer] for b in table.buffers.values() for s in b.segments]
    held = [name for name in held if name in adapted]
    own = {name: [r[i].item() for r in ratio_TS] for i, name in enumerate(held)}
    every: list[dict[str, list[float]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, own)
    engine.destroy()
    return {name: [r for e in every for r in e.get(name, [])] for name in adapted}


def layers_cut_across_ranks(stage: int) -> list[str]:
    """Return the names of layers of which this or another rank holds only a part."""
    model = make_model()
    optimizer = make_lars(model)
    engine = make_engine(optimizer, model, stage, "fp32")
    table = optimizer._table
    segments = [s for b in table.buffers.values() for s in b.segments]
    own = [table.names[s.layer] for s in segments if s.numel < numel(table.parameters[s.layer])]
    every: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(every, own)
    engine.destroy()
    return sorted(set(chain(*every)))


def skipped(stage: int) -> dict[str, list[float]]:
    """Return weights around a step whose loss is infinite, in fp16 with loss scaling."""
    model = make_model()
    engine = make_engine(make_lars(model), model, stage, "fp16")
    found = {}
    for first, spoil in ((0, -1), (1, 1), (2, -1)):
        take_steps(engine, first, 1, spoil)
        found[f"after {first}"] = weights(engine)
    engine.destroy()
    return found


def save(file: Path) -> list[float]:
    """Train under stage 1, keep the layers' state, go on; return the final weights."""
    model = make_model()
    optimizer = make_lars(model)
    engine = make_engine(optimizer, model, 1, "fp32")
    take_steps(engine)
    state = optimizer.layer_state()
    if dist.get_rank() == 0:
        torch.save(state, file)
    take_steps(engine, NUM_STEPS, 5)
    return weights(engine)


def load(file: Path, stage: int, precision: str) -> list[float]:
    """Go on from :func:`save` under another stage and number of ranks."""
    model = make_model()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)  # nothing of it may be left
    optimizer = make_lars(model)
    engine = make_engine(optimizer, model, stage, precision)
    optimizer.load_layer_state(torch.load(file))
    take_steps(engine, NUM_STEPS, 5)
    return weights(engine)


def refusal(stage: int, precision: str, attached: bool) -> str:
    """Return what LARS says of an engine."""
    model = make_model()
    optimizer = make_lars(model)
    try:
        with mock.patch.object(LARS, "attach", LARS.attach if attached else lambda *_: None):
            take_steps(make_engine(optimizer, model, stage, precision), num_steps=1)
    except (RuntimeError, ConfigError) as error:
        return str(error)
    return "nothing"


def measure(folder: Path) -> dict[str, Any]:
    """Train everything."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        found[f"LARS {stage} fp32"] = train("LARS", stage, "fp32")
        found[f"ratios {stage}"] = ratios(stage)
        for name in MAKERS:
            found[f"{name} {stage} bf16"] = train(name, stage, "bf16")
    for name in MAKERS:
        found[f"{name} 0 fp32"] = train(name, 0, "fp32")
        found[f"{name} 1 bf16 accumulated in fp32"] = train(name, 1, "bf16 accumulated in fp32")
    for stage in STAGES[1:]:
        offload = {"offload_optimizer": {"device": "cpu"}}
        found[f"LARS {stage} fp32 offload"] = train("LARS", stage, "fp32", **offload)
        found[f"cut {stage}"] = layers_cut_across_ranks(stage)
    # DeepSpeed refuses fp16 on a CPU, which torch has learnt meanwhile.
    with mock.patch.object(get_accelerator(), "is_fp16_supported", lambda: True):
        for stage in STAGES[1:]:
            for name in MAKERS:
                found[f"{name} {stage} fp16"] = train(name, stage, "fp16")
            found[f"skipped {stage}"] = skipped(stage)
        found["fp16 at stage 0"] = refusal(0, "fp16", attached=True)
    found["not attached"] = [refusal(1, "fp32", False), refusal(0, "bf16", False)]
    file = folder / "lars_layers.pt"
    if dist.get_world_size() == 2:
        found["saved"] = save(file)
    elif file.exists():
        for stage in STAGES:
            found[f"loaded {stage}"] = load(file, stage, "fp32")
        found["loaded 2 bf16"] = load(file, 2, "bf16")
    return found


def main(rendezvous: str, result: str) -> None:
    """Train everything; rank 0 writes."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    deepspeed.init_distributed(
        "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        init_method=f"file://{rendezvous}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    torch.set_num_threads(1)
    found = measure(Path(result).parents[1])  # where runs on other numbers of ranks leave files
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # engines that were destroyed leave hooks that hinder an orderly end


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
