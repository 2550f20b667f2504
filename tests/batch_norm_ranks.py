"""Normalises unequal shares of a batch on every rank; started by test_batch_norm."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn

from fastclr.batch_norm import share_statistics
from fastclr.losses import gradient_cache

SHARES = {1: [12], 2: [7, 5], 4: [2, 5, 2, 3]}


def images() -> torch.Tensor:
    """Return a batch whose parts have means and spreads of their own, far from 0."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(12, 3, 4, 4, generator=generator, dtype=torch.float64)
    return 1e3 + (noise + 5 * noise.mean((1, 2, 3), keepdim=True)) * torch.arange(1, 13).view(
        -1, 1, 1, 1
    )


def network(momentum: float | None = 0.2) -> nn.Module:
    """Return every kind of norm."""
    torch.manual_seed(1)
    layers = [
        nn.BatchNorm2d(3, momentum=momentum),
        nn.Conv2d(3, 5, 3, bias=False),
        BatchNormAct2d(5),
        nn.Flatten(),
        nn.Linear(20, 6),
        nn.BatchNorm1d(6, affine=False),
    ]
    network = nn.Sequential(*layers).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


def measure(module: nn.Module, mine: torch.Tensor, scale: float) -> dict[str, list[float]]:
    """Return outputs, input gradients, summed parameter gradients, buffers, after two steps."""
    found = {}
    for _ in range(2):
        module.zero_grad()
        mine = mine.detach().requires_grad_()
        out = module(mine)
        (out.sin().sum() * scale).backward()
    found["out"], found["grad"] = out.detach(), mine.grad
    if dist.is_initialized():
        for parameter in module.parameters():
            dist.all_reduce(parameter.grad)
        for name in ("out", "grad"):
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, found[name])
            found[name] = torch.cat(everyone)
    found["parameters"] = torch.cat([p.grad.flatten() for p in module.parameters()])
    found["buffers"] = torch.cat([b.double().flatten() for b in module.buffers()])
    module.eval()
    found["eval"] = module(images()).detach()
    return {name: tensor.flatten().tolist() for name, tensor in found.items()}


def cached(module: nn.Module, mine: torch.Tensor) -> list[float]:
    """Return the buffers after gradient caching in one chunk, whose first pass counts nothing."""
    chunk = torch.stack([mine, mine + 1])
    gradient_cache(
        module,
        lambda views: module(views.flatten(0, 1)),
        [chunk],
        lambda a, b: (a * b).sum(),
        torch.Tensor.backward,
    )
    return torch.cat([b.double().flatten() for b in module.buffers()]).tolist()


def main(rendezvous: str, result: str) -> None:
    """Measure; rank 0 writes."""
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_ranks
    )
    mine = images().split(SHARES[num_ranks])[rank]
    found = {}
    for name, momentum in (("moving", 0.2), ("cumulative", None)):
        module = network(momentum)
        share_statistics(module)
        found[name] = measure(module, mine, 1.0)
    module = network().to(memory_format=torch.channels_last)
    share_statistics(module)
    last = mine.to(memory_format=torch.channels_last)
    found["channels last"] = measure(module, last, 1.0)
    local = network()
    found["local"] = measure(local, mine, 1.0)
    module = network()
    share_statistics(module)
    found["cached"] = cached(module, mine)
    module = network().bfloat16().float()
    share_statistics(module)
    with torch.autocast("cpu", torch.bfloat16):
        out = module((mine / 1e3).float())
        norm = module[0](mine.bfloat16())
    found["autocast"] = [str(out.dtype), str(norm.dtype)]
    if rank == 0:
        Path(result).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
