"""LARS against its rule in numpy, its exclusions and its edges."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fastclr.heads import SupervisedHead
from fastclr.optim import LARS, parameter_groups

STEPS = 10
LR, MOMENTUM, DECAY, TRUST = 0.7, 0.9, 0.05, 0.02


def model() -> nn.Sequential:
    """Return a small network with every role of parameter, in float64."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)
    ).double()


def optimizer(module: nn.Module) -> LARS:
    """Return LARS with numbers that all matter."""
    return LARS.for_module(
        module,
        learning_rate=LR,
        weight_decay=DECAY,
        momentum=MOMENTUM,
        trust_coefficient=TRUST,
    )


def backward(module: nn.Module, step: int) -> None:
    """Compute gradients of some loss."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(5, 2, 4, 4, dtype=torch.float64, generator=generator)
    module.zero_grad()
    module(images).pow(2).mean().backward()


def numpy_step(
    w: np.ndarray, g: np.ndarray, v: np.ndarray, *, adapted: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Write the rule out: returns the new weights and the new buffer."""
    if not adapted:
        v = MOMENTUM * v + LR * g
        return w - v, v
    g = g + DECAY * w
    w_norm, g_norm = np.sqrt((w**2).sum()), np.sqrt((g**2).sum())
    ratio = TRUST * w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0
    v = MOMENTUM * v + LR * ratio * g
    return w - v, v


def test_ten_steps_follow_the_rule():
    module = model()
    lars = optimizer(module)
    weights = {n: p.detach().numpy().copy() for n, p in module.named_parameters()}
    buffers = {n: np.zeros_like(w) for n, w in weights.items()}
    for step in range(STEPS):
        backward(module, step)
        for name, p in module.named_parameters():
            weights[name], buffers[name] = numpy_step(
                weights[name],
                p.grad.numpy(),
                buffers[name],
                adapted=name in ("0.weight", "4.weight"),
            )
        lars.step()
        for name, p in module.named_parameters():
            np.testing.assert_allclose(p.detach().numpy(), weights[name], rtol=1e-12, atol=1e-14)


def test_biases_and_norms_take_plain_momentum():
    module, plain = model(), model()
    lars = optimizer(module)
    sgd = torch.optim.SGD(
        [plain[1].weight, plain[1].bias, plain[0].bias, plain[4].bias], lr=LR, momentum=MOMENTUM
    )
    for step in range(3):
        backward(module, step)
        for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
            theirs.grad = ours.grad.clone()
        lars.step()
        sgd.step()
    for layer, name in [(1, "weight"), (1, "bias"), (0, "bias"), (4, "bias")]:
        torch.testing.assert_close(getattr(module[layer], name), getattr(plain[layer], name))


@pytest.mark.parametrize("rate_inside_momentum", [True, False])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-6, 1.0, 1e6, 1e20, 1e30])
def test_the_first_step_has_the_length_of_the_trust(scale, rate_inside_momentum):
    # In single precision, whose squares end at 1e-45 and 1e38.
    w = torch.randn(40, 50, requires_grad=True)
    before = w.detach().double()
    w.grad = scale * torch.randn_like(w)
    options = {"rate_inside_momentum": rate_inside_momentum, "trust_coefficient": 0.01}
    LARS([w], lr=0.3, weight_decay=1e-30, **options).step()
    moved = (w.detach().double() - before).norm()
    torch.testing.assert_close(moved, 0.3 * 0.01 * before.norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_without_adaptation_the_gradient_sets_the_length(scale):
    w = torch.ones(4, 5, dtype=torch.float64, requires_grad=True)
    w.grad = torch.full_like(w, scale)
    LARS([w], lr=0.3, weight_decay=0.0, adapt=False).step()
    torch.testing.assert_close(w.detach(), torch.full_like(w, 1 - 0.3 * scale))


def test_the_rate_acts_inside_the_buffer():
    # A lower rate does not shrink the momentum that has gathered.
    w = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    lars = LARS([w], lr=1.0, weight_decay=0.0, adapt=False, momentum=0.5)
    w.grad = torch.ones_like(w)
    lars.step()
    lars.param_groups[0]["lr"] = 0.0
    lars.step()
    torch.testing.assert_close(w.detach(), torch.full_like(w, 1 - 1 - 0.5))


def test_zero_weights_move_by_the_gradient_alone():
    w = torch.zeros(2, 3, requires_grad=True)
    w.grad = torch.ones(2, 3)
    LARS([w], lr=0.5).step()
    assert torch.equal(w.detach(), torch.full((2, 3), -0.5))


def test_a_zero_gradient_moves_nothing_and_divides_by_nothing():
    w = torch.ones(2, 3, requires_grad=True)
    w.grad = torch.zeros(2, 3)
    LARS([w], lr=0.5, weight_decay=0.0).step()
    assert torch.equal(w.detach(), torch.ones(2, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("impl", ["torch", "numba", "triton"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on NaN, where it interprets
def test_a_gradient_that_is_not_finite_shows_in_the_weights(bad, impl):
    # The ratio must not turn it into a step of 0, or of another length; the run is to stop.
    bad_w, good_w = (torch.ones(3, 4, requires_grad=True) for _ in range(2))
    for w in (bad_w, good_w):
        w.grad = torch.ones(3, 4)
    bad_w.grad[1, 2] = bad
    LARS([bad_w, good_w], lr=0.5, impl=impl).step()
    assert bad_w[1, 2].isnan()
    assert bad_w.isnan().all() or bad == float("inf")
    assert good_w.isfinite().all() and (good_w < 1).all()


def test_parameters_without_gradient_stay():
    w = torch.ones(2, 3, requires_grad=True)
    lars = LARS([w], lr=0.5)
    lars.step()
    assert torch.equal(w.detach(), torch.ones(2, 3))
    assert not lars.state


def test_a_saved_state_goes_on_identically():
    module = model()
    lars = optimizer(module)
    for step in range(3):
        backward(module, step)
        lars.step()
    saved = copy.deepcopy((module.state_dict(), lars.state_dict()))
    for step in range(3, 6):
        backward(module, step)
        lars.step()

    again = model()
    again.load_state_dict(saved[0])
    resumed = LARS.for_module(again, learning_rate=9.0)
    resumed.load_state_dict(saved[1])
    assert resumed.param_groups[0]["lr"] == LR
    for step in range(3, 6):
        backward(again, step)
        resumed.step()
    for ours, theirs in zip(again.parameters(), module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_closure_is_called_with_gradients():
    w = torch.ones(2, 3, requires_grad=True)
    lars = LARS([w], lr=0.5)

    def closure() -> float:
        lars.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss.item()

    assert lars.step(closure) == 6.0
    assert (w < 1).all()
    assert lars.step() is None


@pytest.mark.parametrize(
    "values",
    [
        {"lr": -0.1},
        {"lr": 0.1, "momentum": 1.0},
        {"lr": 0.1, "momentum": -0.1},
        {"lr": 0.1, "weight_decay": -1e-6},
        {"lr": 0.1, "trust_coefficient": 0.0},
    ],
)
def test_values_out_of_range_are_refused(values):
    (name, value), *_ = [item for item in values.items() if item != ("lr", 0.1)]
    with pytest.raises(ValueError, match=f"{name} {value}.*give"):
        LARS([torch.ones(2, 2, requires_grad=True)], **values)


@pytest.mark.parametrize("values", [{"denominator": "norms"}, {"impl": "cuda"}])
def test_unknown_names_are_refused(values):
    ((name, value),) = values.items()
    with pytest.raises(ValueError, match=f"{name} '{value}': give one of"):
        LARS([torch.ones(2, 2, requires_grad=True)], lr=0.1, **values)


def test_a_state_from_before_the_forms_loads():
    w = torch.ones(2, 3, requires_grad=True)
    saved = LARS([w], lr=0.1).state_dict()
    for name in ("denominator", "rate_inside_momentum", "clip", "nesterov"):
        del saved["param_groups"][0][name]
    lars = LARS([w], lr=0.2)
    lars.load_state_dict(saved)
    w.grad = torch.ones(2, 3)
    lars.step()
    assert lars.param_groups[0]["denominator"] == "decayed_gradient"


def test_the_state_is_in_the_form_of_torch():
    module = model()
    lars, sgd = optimizer(module), torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    backward(module, 0)
    for either in (lars, sgd):
        either.step()
    ours, theirs = lars.state_dict(), sgd.state_dict()
    assert ours.keys() == theirs.keys()
    assert ours["state"].keys() == theirs["state"].keys()
    assert all(s.keys() == {"momentum_buffer"} for s in ours["state"].values())
    assert [g["params"] for g in ours["param_groups"]] == [[0, 1], [2, 3, 4, 5]]


# Memory


def channels_last(shape):
    return torch.randn(shape).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "make",
    [
        lambda: channels_last((4, 3, 5, 5)),
        lambda: channels_last((4, 3, 1, 1)),
        lambda: torch.randn(7, 3, 5).permute(2, 0, 1),
        lambda: torch.randn(()),
        lambda: torch.randn(3, 4)[1:],
    ],
)
@pytest.mark.parametrize("impl", ["torch", "numba", "triton"])
def test_any_order_of_memory(make, impl):
    torch.manual_seed(0)
    weight = make()
    plain, other = weight.clone(memory_format=torch.contiguous_format), weight
    ends = []
    for w in (plain, other):
        w.requires_grad_()
        lars = LARS([w], lr=0.5, weight_decay=0.1, trust_coefficient=0.1, impl=impl)
        for step in range(3):
            w.grad = torch.full(w.shape, float(step)) + torch.arange(w.numel()).view(w.shape)
            if step == 2:
                w.data = w.data.clone(memory_format=torch.contiguous_format)
            lars.step()
        ends.append(w.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


def test_weights_with_gaps_are_refused():
    w = torch.randn(4, 6)[:, ::2].requires_grad_()
    w.grad = torch.ones(4, 3)
    with pytest.raises(RuntimeError, match=r"not one block of memory\. Make it contiguous"):
        LARS([w], lr=0.1).step()


def test_precisions_may_be_mixed():
    parameters = [torch.ones(3, 4, dtype=d) for d in (torch.float32, torch.float64, torch.bfloat16)]
    for p in parameters:
        p.requires_grad_().grad = torch.ones_like(p)
    LARS(parameters, lr=1.0, trust_coefficient=0.5, weight_decay=0.0).step()
    for p in parameters:
        assert torch.equal(p.detach().double(), torch.full((3, 4), 0.5).double())


# Groups


def test_groups_hold_each_trainable_parameter_once():
    module = model()
    module.add_module("tied", nn.Linear(12, 4).double())
    module.tied.weight = module[4].weight
    module[0].weight.requires_grad_(False)
    groups = parameter_groups(module, 0.1)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in module.parameters() if p.requires_grad}


def test_groups_go_by_role():
    weights, others = parameter_groups(model(), 0.1)
    assert [tuple(p.shape) for p in weights["params"]] == [(3, 2, 3, 3), (4, 12)]
    assert (weights["weight_decay"], weights["adapt"]) == (0.1, True)
    assert [tuple(p.shape) for p in others["params"]] == [(3,), (3,), (3,), (4,)]
    assert (others["weight_decay"], others["adapt"]) == (0.0, False)


def test_a_supervised_head_is_left_out():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), SupervisedHead(5, 4))
    weights, others = parameter_groups(module, 0.1)
    assert [tuple(p.shape) for p in weights["params"]] == [(5, 6)]
    assert [tuple(p.shape) for p in others["params"]] == [(5,), (4, 5), (4,)]
    optimizer, images = LARS.for_module(module, 0.5), torch.randn(64, 6)
    label_N = images[:, :4].argmax(1)
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(images), label_N)
        loss.backward()
        optimizer.step()
    assert loss < 0.4  # by the ratio it is 0.7 or more still: steps are a share of next to nothing


def test_a_frozen_or_empty_role_has_no_group():
    module = model()
    module[1].requires_grad_(False)
    module[0].bias = None
    module[4].bias = None
    (group,) = parameter_groups(module, 0.1)
    assert group["adapt"]
    assert parameter_groups(module.requires_grad_(False), 0.1) == []


def test_for_module_passes_every_value_on():
    first, second = optimizer(model()).param_groups
    for group in (first, second):
        assert (group["lr"], group["momentum"], group["trust_coefficient"]) == (LR, MOMENTUM, TRUST)
    assert (first["weight_decay"], second["weight_decay"]) == (DECAY, 0.0)


def test_a_copy_of_model_and_optimizer_steps_like_the_original():
    module = model()
    pair = (module, optimizer(module))
    copied = copy.deepcopy(pair)
    for network, lars in (pair, copied):
        backward(network, 0)
        lars.step()
    for ours, theirs in zip(pair[0].parameters(), copied[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours is not theirs
