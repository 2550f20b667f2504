"""What ranks compare under which stage."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastclr.agreement import replicas


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
