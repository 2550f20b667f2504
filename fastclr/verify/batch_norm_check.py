"""BatchNorm over ranks against torch's BatchNorm over all rows in one process in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastclr.batch_norm import share_statistics
from fastclr.verify import data
from fastclr.verify.case import Case, NotApplicable
from fastclr.verify.rows import Row, compared, distance, worst

CHANNELS = 5
PARTS = {
    "output": "output of each rank's rows",
    "input gradient": "gradient by each rank's rows",
    "parameter gradient": "gradients of weight and bias, summed over ranks",
    "running statistics": "running mean and variance on each rank",
}
OF_ROWS = ("output", "input gradient")


def num_rows(rank: int) -> int:
    """Return how many images a rank has: not all equally many."""
    return 2 + rank % 3


def measure(case: Case) -> dict[str, Any]:
    """Return what the norm that the trainer would put in computes on this rank."""
    if case.dtype != torch.float32:
        raise NotApplicable(
            "the trainer refuses BatchNorm in 16 bit: DeepSpeed casts its weights and not its "
            "running statistics"
        )
    norm = _norm().to(case.device)
    if case.world.num_ranks > 1:
        norm = share_statistics(norm, case.device)
    dtype = case.autocast_dtype or torch.float32
    with case.autocast():
        return {k: v.tolist() for k, v in _compute(norm, [case.world.rank], dtype).items()}


def judge(case: Case, found: list[dict[str, Any]]) -> Iterator[Row]:
    """Compare with one process in float64; torch's in the run's precision sets the limit."""
    ranks = list(range(len(found)))
    dtype = case.autocast_dtype or torch.float32
    expected = _compute(_norm().double(), ranks, torch.float64, rounded_to=dtype)
    with case.autocast():
        own = _compute(_norm().to(case.device), ranks, dtype)
    for part, what in PARTS.items():
        mine = [torch.tensor(rank[part], dtype=torch.float64) for rank in found]
        limit = case.limit_for(distance(own[part], expected[part]))
        if part in OF_ROWS:
            parts = list(zip(mine, expected[part].split([len(m) for m in mine]), strict=True))
        elif part == "parameter gradient":
            parts = [(torch.stack(mine).sum(0), expected[part])]
        else:
            parts = [(m, expected[part]) for m in mine]
        deviations = [distance(*pair) for pair in parts]
        rank = worst(deviations)
        note = f"most on rank {rank}" if len(parts) > 1 else ""
        yield compared("BatchNorm", what, deviations[rank], limit, note)


def _norm() -> nn.Module:
    """Return a norm whose parameters matter."""
    norm = nn.BatchNorm2d(CHANNELS, momentum=0.3)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.5 * data.noise(0, 6, CHANNELS))
        norm.bias.copy_(data.noise(0, 7, CHANNELS))
    return norm


def _compute(
    norm: nn.Module, ranks: list[int], dtype: torch.dtype, rounded_to: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Return the parts for the rows of some ranks, float64 on the CPU."""
    device = next(norm.parameters()).device
    inputs = [data.activations(rank, num_rows(rank), CHANNELS) for rank in ranks]
    x = torch.cat(inputs).to(rounded_to or dtype).to(device, dtype).requires_grad_()
    weights = torch.cat([data.noise(r, 5, *i.shape) for r, i in zip(ranks, inputs, strict=True)])
    y = norm(x)
    (y.double() * weights.to(device)).sum().backward()
    parameters = [p.grad for p in norm.parameters() if p.grad is not None]
    buffers = [b for b in norm.buffers() if b.is_floating_point()]
    assert x.grad is not None
    found = dict(
        zip(PARTS, (y.detach(), x.grad, torch.cat(parameters), torch.cat(buffers)), strict=True)
    )
    return {name: tensor.double().cpu() for name, tensor in found.items()}
