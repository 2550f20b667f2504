"""Every contrastive loss and its gradient against the formula, in every implementation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastclr.kernels import tiles
from fastclr.losses import NTXent, margin_triplet, nt_logistic, nt_xent
from tests.losses.draws import batches, quick
from tests.losses.formulas import CASES, EXPLICIT, gradients, pair


def assert_exact(found: torch.Tensor, expected: torch.Tensor, z: tuple[torch.Tensor, ...]) -> None:
    """Ask for the last bits of float64; a gradient that cancels has only those of its terms."""
    assert abs(found - expected) <= 1e-14 * max(1, abs(expected))
    true = gradients(expected, *z)
    assert (gradients(found, *z) - true).norm() <= 1e-13 * true.norm() + 2e-14


@pytest.mark.parametrize("case", CASES, ids=str)
@quick
@given(z=batches, temperature=st.floats(0.02, 5), block=st.sampled_from([1, 3, 8]))
def test_value_and_gradient_are_those_of_the_formula(case, z, temperature, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "BLOCK", block)
        for impl in EXPLICIT:
            found = case.build(temperature, impl=impl)(*z)
            assert_exact(found, case.slow(*z, temperature), z)


@pytest.mark.parametrize("impl", EXPLICIT)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck(case, impl):
    assert torch.autograd.gradcheck(case.build(impl=impl), pair(3, 4))


@pytest.mark.parametrize("impl", EXPLICIT)
def test_numbers_by_hand(impl):
    # Views equal, images orthogonal: each anchor has similarity 1 once and 0 twice.
    z = torch.eye(2, dtype=torch.float64)
    softplus = {x: math.log1p(math.exp(x)) for x in (-2, 0)}
    assert nt_xent(z, z, temperature=0.5, impl=impl).item() == pytest.approx(
        math.log(math.exp(2) + 2) - 2, rel=1e-14
    )
    assert nt_logistic(z, z, temperature=0.5, impl=impl).item() == pytest.approx(
        softplus[-2] + softplus[0], rel=1e-14
    )
    assert margin_triplet(z, z, impl=impl).item() == 0
    assert margin_triplet(z, z, margin=1.6, impl=impl).item() == pytest.approx(0.6, rel=1e-14)


@pytest.mark.parametrize("impl", EXPLICIT)
@pytest.mark.parametrize("semi_hard", [False, True])
def test_a_logarithm_is_not_cut_off_where_torch_cuts_its_softplus(semi_hard, impl):
    # Views opposite, images orthogonal: a positive of -21 nats and negatives of 0.
    z = torch.eye(2, dtype=torch.float64)
    loss = nt_logistic(z, -z, temperature=1 / 21, semi_hard=semi_hard, impl=impl)
    expected = 21 + math.log1p(math.exp(-21)) + math.log(2)
    assert loss.item() == pytest.approx(expected, rel=1e-14)


def test_mining_by_hand():
    # On a circle, in degrees: a positive of 40, then negatives of 10, 50, 70 (from anchor 0).
    def circle(*degrees):
        angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], 1)

    z0, z1 = circle(0, 10), circle(40, 50)
    cos = {d: math.cos(math.radians(d)) for d in (10, 30, 40, 50)}
    mined = margin_triplet(z0, z1, margin=0.1, semi_hard=True)
    # Anchors 0 and 50: the nearest negative farther than 40 is at 50. Anchors 10 and 40: none is
    # farther than 40 (theirs are at 10 and 30), so the farthest of all counts.
    nearest, farthest = max(cos[50] - cos[40] + 0.1, 0), cos[30] - cos[40] + 0.1
    assert mined.item() == pytest.approx((nearest + farthest) / 2, rel=1e-12)


@pytest.mark.parametrize("impl", EXPLICIT)
@pytest.mark.parametrize("temperature", [0.005, 0.02])
@pytest.mark.parametrize("case", [c for c in CASES if not c.is_cosine], ids=str)
def test_low_temperatures_do_not_overflow(case, temperature, impl):
    for dtype, rounding in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
        z = pair(8, dtype=dtype)
        loss, expected = case.build(temperature, impl=impl)(*z), case.slow(*z, temperature)
        assert loss.item() == pytest.approx(expected.item(), rel=rounding)
        found, true = gradients(loss, *z), gradients(expected, *z)
        assert (found - true).norm() <= rounding * true.norm()


@pytest.mark.parametrize("impl", EXPLICIT)
@pytest.mark.parametrize("length", [0.1, 30])
@pytest.mark.parametrize("case", [c for c in CASES if c.name == "nt_xent"], ids=str)
def test_dot_products_of_any_size_do_not_overflow(case, length, impl):
    # Of norms of 30, similarities of up to 900 nats: their own rounding is 3e-5 in float32.
    for dtype, rounding in ((torch.float32, 2e-4), (torch.float64, 1e-12)):
        rows = [length * F.normalize(row.detach(), dim=1) for row in pair(8, dtype=dtype)]
        z = tuple(row.requires_grad_() for row in rows)
        loss = case.build(1.0, impl=impl, normalize=False)(*z)
        expected = case.slow(*z, 1.0, normalize=False)
        assert loss.item() == pytest.approx(expected.item(), rel=rounding)
        found, true = gradients(loss, *z), gradients(expected, *z)
        assert (found - true).norm() <= rounding * true.norm()


@pytest.mark.parametrize("impl", EXPLICIT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision_is_computed_in_single(case, dtype, impl):
    z = pair(8, dtype=dtype)
    loss = case.build(impl=impl)(*z)
    assert loss.dtype == torch.float32
    # Against the formula on the rounded rows: nothing more is lost.
    assert loss.item() == pytest.approx(case.slow(*z).item(), rel=1e-5)
    assert all(g.dtype == dtype for g in torch.autograd.grad(loss, z))


@pytest.mark.parametrize("num_images", [300, 700])  # one and two blocks a view
def test_blocked_in_single_precision_is_as_exact_as_the_reference(num_images):
    z = pair(num_images, 64)
    truth = gradients(NTXent(impl="reference")(*z), *z)
    error = {}
    for impl in EXPLICIT:
        single = tuple(row.detach().float().requires_grad_() for row in z)
        found = gradients(NTXent(impl=impl)(*single), *single)
        error[impl] = ((found - truth).norm() / truth.norm()).item()
    assert error["blocked"] <= 2 * error["reference"] + 1e-7, error
