"""A bit that was turned is seen, whatever the tensor; what is compared under which stage."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastclr.agreement import digest, replicas

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (4, 3, 3, 3)])
def test_every_turned_bit_changes_the_digest(dtype, shape):
    generator = torch.Generator().manual_seed(3)
    tensor = torch.randint(0, 100, shape, generator=generator).to(dtype)
    before = int(digest(tensor))
    assert int(digest(tensor.clone())) == before
    raw = tensor.reshape(-1).view(torch.uint8)
    for bit in range(0, 8 * len(raw), 5):
        raw[bit // 8] ^= 1 << bit % 8
        assert int(digest(tensor)) != before
        raw[bit // 8] ^= 1 << bit % 8


def test_order_counts_and_memory_format_does_not():
    tensor = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    assert int(digest(tensor)) != int(digest(tensor.flip(1)))
    assert int(digest(tensor)) == int(digest(tensor.to(memory_format=torch.channels_last)))


@pytest.mark.parametrize(
    ("stage", "local", "names"),
    [
        (0, False, {"0.weight", "1.running_mean", "momentum_buffer of 0.weight"}),
        (0, True, {"0.weight", "momentum_buffer of 0.weight"}),
        (2, False, {"0.weight", "1.running_mean"}),
        (3, False, {"1.running_mean"}),
        (3, True, set()),
    ],
)
def test_what_every_rank_holds_whole(stage, local, names):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    module(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    engine = SimpleNamespace(
        module=module, optimizer=optimizer, zero_optimization_stage=lambda: stage
    )
    found = {name for name, _ in replicas(engine, local)}
    assert names <= found and ("1.running_mean" in found) == ("1.running_mean" in names)
    assert ("0.weight" in found) == ("0.weight" in names)
