"""The forms of LARS against their reference and against the libraries that have them."""

from __future__ import annotations

import itertools

import lightly.utils.lars
import pytest
import torch
import torch_optimizer
from torch import nn

from fastclr.kernels.reference import lars_step
from fastclr.optim import LARS, parameter_groups

STEPS = 6
VALUES = {"lr": 0.7, "momentum": 0.9, "weight_decay": 0.05, "trust_coefficient": 0.02}
FORMS = [
    dict(zip(("denominator", "rate_inside_momentum", "clip", "nesterov"), values, strict=True))
    for values in itertools.product(
        ("decayed_gradient", "sum_of_norms"), (True, False), (False, True), (False, True)
    )
]
YOU = {"denominator": "sum_of_norms", "rate_inside_momentum": False}
SHAPES = [(3, 2, 3, 3), (4, 12), (70, 33), (5,), (1,)]


def make_parameters(dtype=torch.float64, seed=0):
    """Return weights of several shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in SHAPES]


def set_gradients(parameters, step):
    """Give gradients that depend on the step and the weights."""
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = 0.1 * noise + 0.01 * p.detach() ** 3


def train(optimizer, parameters):
    """Take some steps; return the weights."""
    for step in range(STEPS):
        set_gradients(parameters, step)
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_follows_its_reference(form):
    parameters = make_parameters()
    expected = [(p.detach().clone(), torch.zeros_like(p)) for p in parameters]
    optimizer = LARS(parameters, **VALUES, **form)
    for step in range(STEPS):
        set_gradients(parameters, step)
        for i, p in enumerate(parameters):
            w, v = expected[i]
            expected[i] = lars_step(w, p.grad, v, **VALUES, **form)
        optimizer.step()
        for p, (w, v) in zip(parameters, expected, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-14)
            momentum = optimizer.state[p]["momentum_buffer"]
            torch.testing.assert_close(momentum, v, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("impl", ["numba", "torch"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_single_precision_errs_no_more_than_the_reference(form, impl):
    generator = torch.Generator().manual_seed(0)
    w, g, v = (size * torch.randn(300, 400, generator=generator) for size in (1.0, 0.1, 0.1))
    exact = lars_step(w.double(), g.double(), v.double(), **VALUES, **form)
    reference = lars_step(w, g, v, **VALUES, **form)
    p = nn.Parameter(w)
    p.grad = g
    optimizer = LARS([p], **VALUES, **form, impl=impl)
    optimizer.state[p]["momentum_buffer"] = v
    optimizer.step()
    for found, theirs, wanted in zip((w, v), reference, exact, strict=True):
        error = (found - wanted).norm() / wanted.norm()
        assert error < 1.05 * (theirs - wanted).norm() / wanted.norm()
        assert error < 6e-8  # half a unit in the last place


def test_the_forms_differ():
    ends = []
    for form in FORMS:
        if form["rate_inside_momentum"]:  # the same at a constant rate; see the end of the file
            parameters = make_parameters()
            weights = train(LARS(parameters, **VALUES, **form), parameters)
            ends.append(torch.cat([w.flatten() for w in weights]))
    for one, other in itertools.combinations(ends, 2):
        assert (one - other).norm() / one.norm() > 1e-6


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_without_adaptation_every_form_follows_its_reference(form):
    parameters = make_parameters()
    expected = [(p.detach().clone(), torch.zeros_like(p)) for p in parameters]
    optimizer = LARS(parameters, adapt=False, **VALUES, **form)
    for step in range(STEPS):
        set_gradients(parameters, step)
        for i, p in enumerate(parameters):
            w, v = expected[i]
            expected[i] = lars_step(w, p.grad, v, adapt=False, **VALUES, **form)
        optimizer.step()
    for p, (w, _) in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("library", [lightly.utils.lars.LARS, torch_optimizer.LARS])
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_form_of_you_is_that_of_the_libraries(library, nesterov):
    ours, theirs = nn.ParameterList(make_parameters()), nn.ParameterList(make_parameters())
    values = {**VALUES, "nesterov": nesterov}
    decay = values.pop("weight_decay")
    mine = LARS(parameter_groups(ours, decay), **values, **YOU)
    # They adapt what decays, and add eps to the denominator.
    groups = [
        {k: g[k] for k in ("params", "weight_decay")} for g in parameter_groups(theirs, decay)
    ]
    other = library(groups, eps=0.0, **values)
    for found, expected in zip(train(mine, ours), train(other, theirs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("library", [lightly.utils.lars.LARS, torch_optimizer.LARS])
def test_where_the_libraries_differ_a_dead_layer_decays_here(library):
    ours, theirs = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    for w in (ours, theirs):
        w.grad = torch.zeros(2, 3)
    LARS([ours], **VALUES, **YOU).step()
    library([theirs], **VALUES).step()
    assert torch.equal(theirs.detach(), torch.ones(2, 3))
    torch.testing.assert_close(ours.detach(), torch.full((2, 3), 1 - 0.7 * 0.05))


def larc_step(sgd, trust_coefficient, weight_decay):
    """Do what apex's LARC does around an optimizer: scale gradients, clip the rate."""
    for group in sgd.param_groups:
        for p in group["params"]:
            w_norm, g_norm = p.detach().norm(), p.grad.norm()
            rate = trust_coefficient * w_norm / (g_norm + w_norm * weight_decay)
            p.grad = (p.grad + weight_decay * p.detach()) * min(rate / group["lr"], 1)
    sgd.step()


def test_clipping_is_that_of_larc():
    ours, theirs = make_parameters(), make_parameters()
    theirs[0].data *= 100  # where the ceiling is reached
    ours[0].data *= 100
    values = {**VALUES, "trust_coefficient": 0.5}
    mine = LARS(ours, **values, **YOU, clip=True)
    sgd = torch.optim.SGD(theirs, lr=0.7, momentum=0.9)
    for step in range(STEPS):
        for parameters in (ours, theirs):
            set_gradients(parameters, step)
        mine.step()
        larc_step(sgd, 0.5, 0.05)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)  # of weights of 100


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_clipping_makes_the_rate_a_ceiling(size):
    w = (size * torch.ones(4, 4)).requires_grad_()
    w.grad = torch.ones(4, 4)
    LARS([w], lr=0.5, weight_decay=0.0, trust_coefficient=0.1, clip=True).step()
    moved = (size - w.detach()).norm() / 4  # of a gradient of length 4
    assert moved.item() == pytest.approx(min(0.5, 0.1 * size), rel=1e-4)


def test_a_rate_of_zero_moves_nothing():
    for clip in (False, True):
        parameters = make_parameters()
        before = [p.detach().clone() for p in parameters]
        after = train(LARS(parameters, lr=0.0, clip=clip), parameters)
        assert all(map(torch.equal, before, after))


# Ratio 1 is SGD


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("impl", ["numba", "torch"])
def test_ratio_one_is_sgd_bit_for_bit(nesterov, weight_decay, foreach, dtype, impl):
    ours, theirs = make_parameters(dtype), make_parameters(dtype)
    values = {"lr": 0.1, "momentum": 0.9, "weight_decay": weight_decay, "nesterov": nesterov}
    mine = LARS(ours, adapt=False, rate_inside_momentum=False, impl=impl, **values)
    sgd = torch.optim.SGD(theirs, foreach=foreach, **values)
    assert all(map(torch.equal, train(mine, ours), train(sgd, theirs)))
    for p, q in zip(ours, theirs, strict=True):
        buffers = (mine.state[p]["momentum_buffer"], sgd.state[q]["momentum_buffer"])
        assert torch.equal(*buffers)


def test_with_the_rate_inside_it_is_sgd_bit_for_bit_where_rates_only_shift():
    # lr * v of SGD is the buffer here; the two round alike where lr is a power of two.
    ours, theirs = make_parameters(torch.float32), make_parameters(torch.float32)
    values = {"lr": 0.25, "momentum": 0.9, "weight_decay": 0.05}
    mine = LARS(ours, adapt=False, **values)
    sgd = torch.optim.SGD(theirs, **values)
    assert all(map(torch.equal, train(mine, ours), train(sgd, theirs)))


def test_with_the_rate_inside_it_is_sgd_up_to_rounding():
    ours, theirs = make_parameters(torch.float32), make_parameters(torch.float32)
    values = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    found = train(LARS(ours, adapt=False, **values), ours)
    for a, b in zip(found, train(torch.optim.SGD(theirs, **values), theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_where_the_rate_stands_matters_once_it_changes():
    ends = []
    for inside in (True, False):
        parameters = make_parameters()
        optimizer = LARS(parameters, **VALUES, rate_inside_momentum=inside)
        train(optimizer, parameters)
        constant = [p.detach().clone() for p in parameters]
        optimizer.param_groups[0]["lr"] *= 0.1
        ends.append((constant, train(optimizer, parameters)))
    (first, then), (other, other_then) = ends
    for a, b in zip(first, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(then, other_then, strict=True))
