"""A temperature that is learned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import nn

from fastclr.kernels.blocked import LOWEST_TEMPERATURE
from fastclr.losses import NTXent, nt_xent
from tests.losses.draws import batches, quick, temperatures
from tests.losses.formulas import CASES, EXPLICIT, gradients, pair

every_case = pytest.mark.parametrize("case", [c for c in CASES if not c.is_cosine], ids=str)
every_impl = pytest.mark.parametrize("impl", EXPLICIT)


def learnable(temperature: float, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor(temperature, dtype=dtype))


@every_case
@quick
@given(z=batches, temperature=temperatures)
def test_its_gradient_is_that_of_the_formula(case, z, temperature):
    leaves = (*z, learnable(temperature))
    expected = case.slow(*leaves)
    true = gradients(expected, *leaves)
    for impl in EXPLICIT:
        loss = case.build(leaves[-1], impl=impl)(*z)
        assert abs(loss - expected) <= 1e-13 * max(1, abs(expected))
        found = gradients(loss, *leaves)
        # That of the temperature sums over all rows: its terms cancel where pairs are found.
        assert (found - true).norm() <= 1e-13 * true.norm() + 1e-13 / temperature


@every_case
@every_impl
def test_gradcheck_by_it(case, impl):
    def loss(z0, z1, temperature):
        return case.build(temperature, impl=impl)(z0, z1)

    assert torch.autograd.gradcheck(loss, (*pair(3, 4), learnable(0.3)))


@every_case
@every_impl
def test_a_low_one_does_not_overflow(case, impl):
    for dtype, rounding in ((torch.float32, 1e-4), (torch.float64, 1e-11)):
        leaves = (*pair(6, dtype=dtype), learnable(LOWEST_TEMPERATURE[dtype] / 3, dtype))
        loss, expected = case.build(leaves[-1], impl=impl)(*leaves[:2]), case.slow(*leaves)
        found, true = gradients(loss, *leaves), gradients(expected, *leaves)
        assert (found - true).norm() <= rounding * true.norm()


@every_case
@every_impl
def test_a_negative_one_gives_nan(case, impl):
    z, temperature = pair(3), learnable(-0.1)
    loss = case.build(temperature, impl=impl)(*z)
    assert loss.isnan()
    assert gradients(loss, *z, temperature).isnan().all()


def test_a_single_precision_one_serves_double_precision_rows():
    z, temperature = pair(4), learnable(0.25, torch.float32)
    loss = nt_xent(*z, temperature=temperature)
    assert loss.item() == pytest.approx(nt_xent(*z, temperature=0.25).item(), rel=1e-13)
    assert torch.autograd.grad(loss, temperature)[0].dtype == torch.float32


def test_a_module_may_own_it():
    module = NTXent(learnable(0.3))
    assert module.temperature in list(module.parameters())


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"temperature has shape \(1,\): give a scalar"):
        nt_xent(*pair(2), temperature=torch.tensor([0.1]))
