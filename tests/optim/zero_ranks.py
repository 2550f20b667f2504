"""Trains a model of odd sizes under every ZeRO stage on each rank; started by test_zero."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from fastclr.optim import LARS, parameter_groups

NUM_STEPS, NUM_ROWS, WIDTH = 10, 8, 12
STAGES = (0, 1, 2, 3)
MAKERS = {
    "LARS": lambda model: LARS.for_module(model, 0.5, weight_decay=1e-2, trust_coefficient=0.05),
    "SGD": lambda model: torch.optim.SGD(parameter_groups(model, 1e-2), lr=0.05, momentum=0.9),
}


def make_model() -> nn.Module:
    """Return layers whose sizes no number of ranks divides; a bias and a norm among them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, 17, bias=False),
        nn.LayerNorm(17),
        nn.ReLU(),
        nn.Linear(17, 33),
        nn.ReLU(),
        nn.Linear(33, 5, bias=False),
    )


def train(name: str, stage: int, bf16: bool) -> list[float]:
    """Return all weights after ten steps, in fp32."""
    model = make_model()
    optimizer = MAKERS[name](model)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": NUM_ROWS // num_ranks,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if name == "LARS":
        optimizer.attach(engine)
    generator = torch.Generator().manual_seed(1)
    for _ in range(NUM_STEPS):
        rows_NP = torch.randn(NUM_ROWS, WIDTH, generator=generator).chunk(num_ranks)[rank]
        rows_NP = rows_NP.bfloat16() if bf16 else rows_NP
        loss = (engine(rows_NP).float() - 1).square().mean()
        engine.backward(loss)
        engine.step()
    full = deepspeed.utils.safe_get_full_fp32_param
    weights = [full(p) if stage else p.detach() for p in engine.module.parameters()]
    engine.destroy()
    return torch.cat([w.flatten() for w in weights]).tolist()


def refusal() -> str:
    """Return what LARS says that was not attached."""
    model = make_model()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=MAKERS["LARS"](model), config=config)
    engine.backward(engine(torch.ones(4, WIDTH)).square().mean())
    try:
        engine.step()
    except RuntimeError as error:
        return str(error)
    return "nothing"


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
    found = {f"LARS {stage} fp32": train("LARS", stage, bf16=False) for stage in STAGES}
    for stage in STAGES[1:]:
        for name in MAKERS:
            found[f"{name} {stage} bf16"] = train(name, stage, bf16=True)
    found["SGD 0 fp32"] = train("SGD", 0, bf16=False)
    found["refusal"] = refusal()
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # engines that were destroyed leave hooks that hinder an orderly end


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
