"""LARS under every ZeRO stage trains what it trains on one rank without ZeRO."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from fastclr.optim import LARS

SCRIPT = Path(__file__).with_name("zero_ranks.py")
RANKS = (1, 2, 4)
HALF = [f"{stage} bf16" for stage in range(4)] + [f"{stage} fp16" for stage in (1, 2, 3)]
HALF += ["1 bf16 accumulated in fp32"]  # by DeepSpeed's BF16_Optimizer
pytestmark = pytest.mark.slow
on_all_ranks = pytest.mark.parametrize("ranks", RANKS)


@pytest.fixture(scope="module")
def measured(run_ranks):
    """Train everything; two ranks first, whose state the others load."""
    return {ranks: run_ranks(SCRIPT, ranks, timeout_seconds=240) for ranks in (2, 1, 4)}


@pytest.fixture(scope="module")
def start():
    """Weights that all training starts from."""
    spec = importlib.util.spec_from_file_location("zero_ranks", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    parameters = script.make_model().parameters()
    return torch.cat([p.detach().flatten() for p in parameters]).tolist()


def distance(found: list[float], expected: list[float]) -> float:
    """Relative distance of two sets of weights."""
    a, b = torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    return ((a - b).norm() / b.norm()).item()


@on_all_ranks
@pytest.mark.parametrize("stage", range(4))
def test_fp32_weights_after_ten_steps(measured, ranks, stage, start):
    expected = measured[1]["LARS 0 fp32"]
    assert distance(measured[ranks][f"LARS {stage} fp32"], expected) < 1e-6
    assert distance(start, expected) > 0.1


@on_all_ranks
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_to_the_cpu(measured, ranks, stage):
    found = measured[ranks][f"LARS {stage} fp32 offload"]
    assert distance(found, measured[1]["LARS 0 fp32"]) < 1e-6


@on_all_ranks
@pytest.mark.parametrize("stage", range(4))
def test_trust_ratios_are_those_of_whole_layers(measured, ranks, stage):
    expected = measured[1]["ratios 0"]
    assert len(expected) == 3
    assert all(len(set(steps)) == 10 for steps in expected.values()), "they do not change"
    for name, found in measured[ranks][f"ratios {stage}"].items():
        assert len(found) % 10 == 0 and found, name
        torch.testing.assert_close(
            torch.tensor(found).view(-1, 10),
            torch.tensor(expected[name]).expand(len(found) // 10, 10),
            rtol=1e-6,
            atol=0,
        )


def test_layers_are_cut_across_ranks(measured):
    for stage in (1, 2, 3):
        assert "3.weight" in measured[2][f"cut {stage}"]
        assert "3.weight" in measured[4][f"cut {stage}"]
        assert not measured[1][f"cut {stage}"]


@on_all_ranks
@pytest.mark.parametrize("engine", HALF)
def test_half_precision_is_no_worse_than_with_sgd(measured, ranks, engine, start):
    # Of the way that ten steps went, how much is the engine's rounding? At stage 0 SGD is far
    # worse: it decays in the step without gradients that DeepSpeed begins with.
    part = {}
    for name, its_engine in (("LARS", engine), ("SGD", engine.replace("0 bf16", "1 bf16"))):
        exact, found = measured[1][f"{name} 0 fp32"], measured[ranks][f"{name} {its_engine}"]
        part[name] = distance(found, exact) / distance(start, exact)
    assert 1e-5 < part["LARS"] <= part["SGD"] < 1e-2


@on_all_ranks
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_loss_scaling_skips_what_is_not_finite(measured, ranks, stage):
    after = [measured[ranks][f"skipped {stage}"][f"after {step}"] for step in (0, 1, 2)]
    assert after[0] == after[1] != after[2]
    assert torch.tensor(after[2]).isfinite().all()


@on_all_ranks
def test_fp16_without_zero_is_refused(measured, ranks):
    assert "divides the gradients by a loss scale" in measured[ranks]["fp16 at stage 0"]


@on_all_ranks
def test_an_engine_that_was_not_attached_is_refused(measured, ranks):
    for message in measured[ranks]["not attached"]:
        assert "Call optimizer.attach(engine)" in message


# A state saved on 2 ranks under stage 1


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("stage", range(4))
def test_the_next_steps_are_the_same_under_other_stages_and_ranks(measured, ranks, stage):
    saved = measured[2]["saved"]
    assert distance(measured[ranks][f"loaded {stage}"], saved) < 1e-6
    assert distance(measured[2]["LARS 1 fp32"], saved) > 1e-2, "the next steps go nowhere"


@pytest.mark.parametrize("ranks", [1, 4])
def test_another_precision_goes_on_from_it(measured, ranks, start):
    saved = measured[2]["saved"]
    assert 0 < distance(measured[ranks]["loaded 2 bf16"], saved) < 2e-2 * distance(start, saved)


@pytest.mark.parametrize("loads_a_state", [False, True])
def test_a_foreign_tensor_is_refused_without_deepspeed(loads_a_state):
    optimizer = LARS.for_module(torch.nn.Linear(3, 4), 0.1)
    flat = torch.nn.Parameter(torch.zeros(12))
    flat.grad = torch.ones(12)
    optimizer.param_groups[0]["params"] = [flat]
    if loads_a_state:
        optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="12 elements that it does not know"):
        optimizer.step()


def test_a_step_without_any_gradient_before_attaching_moves_nothing():
    # DeepSpeed takes one in bf16 without ZeRO; weight decay alone would move the weights.
    optimizer = LARS.for_module(torch.nn.Linear(3, 4), 0.1, weight_decay=0.1)
    copy = torch.nn.Parameter(torch.ones(4, 3))
    copy.grad = torch.zeros(4, 3)
    optimizer.param_groups[0]["params"] = [copy]
    optimizer.step()
    assert torch.equal(copy, torch.ones(4, 3))


def test_the_state_of_layers_asks_for_an_engine():
    optimizer = LARS.for_module(torch.nn.Linear(3, 4), 0.1)
    with pytest.raises(RuntimeError, match=r"call optimizer.attach\(engine\)"):
        optimizer.layer_state()
