"""The Triton implementation behind the public function, interpreted on a CPU."""

from __future__ import annotations

import pytest
import torch

from fastclr.losses import nt_xent
from tests.losses.formulas import Case, gradients, pair

PLAIN = Case("nt_xent")


@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.01])  # the last without a bound
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_the_formula_to_half_precision(dtype, temperature):
    for num_images, dim in ((2, 3), (33, 20)):
        z = pair(num_images, dim, dtype=dtype)
        loss = nt_xent(*z, temperature=temperature, impl="triton")
        assert loss.dtype == torch.float32
        exact = tuple(row.detach().double().requires_grad_() for row in z)
        expected = PLAIN.slow(*exact, temperature)
        assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
        found, true = gradients(loss, *z).double(), gradients(expected, *exact)
        rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps  # of the result
        assert (found - true).norm() <= (2e-3 + rounding) * true.norm()


def test_its_statistics_are_those_written_out():
    z, found = pair(7, dtype=torch.float32), {}
    nt_xent(*z, temperature=0.3, impl="triton", statistics=found)
    told = {name: value.item() for name, value in found.items()}
    assert told == pytest.approx(PLAIN.slow_statistics(*z), abs=1e-3)


def test_a_temperature_is_learned():
    temperature = torch.nn.Parameter(torch.tensor(0.3))
    z = pair(7, dtype=torch.float32)
    loss = nt_xent(*z, temperature=temperature, impl="triton")
    expected = PLAIN.slow(*z, temperature)
    found, true = gradients(loss, temperature), gradients(expected, temperature)
    assert found.item() == pytest.approx(true.item(), rel=2e-3)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_makes_loss_and_gradient_nan(value):
    z = pair(5, dtype=torch.float32)
    with torch.no_grad():
        z[0][3, 1] = value
    for statistics in (None, {}):
        loss = nt_xent(*z, impl="triton", statistics=statistics)
        assert loss.isnan()
        assert gradients(loss, *z).isnan().any()
