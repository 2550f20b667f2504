"""What must hold of every contrastive loss, whatever the projections."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastclr.kernels import tiles
from fastclr.losses import nt_xent
from tests.losses.draws import batches, quick, temperatures
from tests.losses.formulas import CASES, EXPLICIT, MARGIN, gradients, pair

every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(scope="module", autouse=True)
def several_blocks_a_view() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "BLOCK", 3)
        yield


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def log1p_exp(x: float) -> float:
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


# By temperature and candidates: of rows that are all the same, and the most it can be.
COLLAPSE = {
    "nt_xent": lambda t, candidates: math.log(candidates),
    "nt_logistic": lambda t, candidates: log1p_exp(-1 / t) + log1p_exp(1 / t),
    "margin_triplet": lambda t, candidates: MARGIN,
}
MOST = {
    "nt_xent": lambda t, candidates: math.log(candidates) + 2 / t,
    "nt_logistic": lambda t, candidates: 2 * log1p_exp(1 / t),
    "margin_triplet": lambda t, candidates: 2 + MARGIN,
}


def candidates(case, num_images: int) -> int:
    return num_images if case.negatives == "other_view" else 2 * num_images - 1


@every_case
@quick
@given(z=batches, seed=st.integers(0, 99), exponent=st.floats(-4, 4))
def test_lengths_of_rows_do_not_matter(case, z, seed, exponent):
    scale = torch.rand(len(z[0]), 1, generator=torch.Generator().manual_seed(seed)).double()
    scale = (scale + 0.1) * 10**exponent
    assert_same(case.build()(z[0] * scale, z[1] * 3), case.build()(*z))


@every_case
@quick
@given(z=batches, temperature=temperatures)
def test_the_gradient_is_orthogonal_to_the_row(case, z, temperature):
    for row, grad in zip(z, torch.autograd.grad(case.build(temperature)(*z), z), strict=True):
        assert_same((row * grad).sum(1), torch.zeros(len(row), dtype=torch.float64))


@every_case
@quick
@given(z=batches, data=st.data())
def test_views_may_be_swapped_and_pairs_permuted(case, z, data):
    order = data.draw(st.permutations(range(len(z[0]))))
    loss, other = case.build()(*z), case.build()(z[1][order], z[0][order])
    assert_same(other, loss)
    assert_same(gradients(other, *z), gradients(loss, *z))


@pytest.mark.parametrize("case", [c for c in CASES if not c.semi_hard], ids=str)
def test_pairs_may_not_be_broken(case):
    z0, z1 = pair(6)
    assert case.build()(z0, z1.roll(1, 0)) > case.build()(z0, z1) + 0.1


@every_case
@quick
@given(num_images=st.integers(2, 20), temperature=temperatures)
def test_collapse_has_a_price_and_no_way_out(case, num_images, temperature):
    z = torch.ones(num_images, 4, dtype=torch.float64, requires_grad=True)
    loss = case.build(temperature)(z, z)
    expected = COLLAPSE[case.name](temperature, candidates(case, num_images))
    assert loss.item() == pytest.approx(expected, abs=1e-10)
    assert gradients(loss, z).abs().max() < 1e-12


@every_case
@quick
@given(z=batches, temperature=temperatures)
def test_bounds(case, z, temperature):
    loss = case.build(temperature)(*z).item()
    assert -1e-12 <= loss <= MOST[case.name](temperature, candidates(case, len(z[0]))) + 1e-9


@every_case
@pytest.mark.parametrize("impl", EXPLICIT)
def test_duplicates_are_negatives_like_any_other(case, impl):
    # A loader pads with images it has shown. Their positives tie, which is not "farther"; which of
    # two equal rows is mined is free, so the gradient is that of the images they were made from.
    for seed in range(20):
        images = pair(3, seed=seed)
        z = [torch.cat([z, z[:2]]) for z in images]
        loss, expected = case.build(impl=impl)(*z), case.slow(*z)
        assert_same(loss, expected)
        assert_same(gradients(loss, *images), gradients(expected, *images))


@every_case
@pytest.mark.parametrize("impl", EXPLICIT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_row_of_zeros_is_like_no_other_and_gets_no_gradient(case, impl, dtype):
    z0, z1 = pair(4, dtype=dtype)
    with torch.no_grad():
        z0[1] = 0
    loss = case.build(impl=impl)(z0, z1)
    torch.testing.assert_close(loss.double(), case.slow(z0, z1), rtol=1e-5, atol=1e-6)
    grad_0, grad_1 = torch.autograd.grad(loss, (z0, z1))
    assert grad_0[1].count_nonzero() == 0
    assert grad_0.isfinite().all() and grad_1.isfinite().all()


@every_case
@pytest.mark.parametrize("impl", EXPLICIT)
def test_rows_that_are_not_contiguous(case, impl):
    z0, z1 = pair(5, 4)
    strided = z0.detach().T.contiguous().T, torch.stack([z1, z1], 2)[..., 0]
    assert not any(z.is_contiguous() for z in strided)
    assert torch.equal(case.build(impl=impl)(*strided), case.build(impl=impl)(z0, z1))


@every_case
def test_a_view_without_gradient_is_a_constant(case):
    z0, z1 = pair(5)
    both = torch.autograd.grad(case.build()(z0, z1), (z0, z1))
    for i, fixed in enumerate(((z0, z1.detach()), (z0.detach(), z1))):
        assert torch.equal(gradients(case.build()(*fixed), fixed[i]), both[i].flatten())


@quick
@given(z=batches, seed=st.integers(0, 99))
def test_dot_products_do_not_change_by_a_rotation(z, seed):
    dim, generator = z[0].shape[1], torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator))[0]
    rotated = nt_xent(*(row @ rotation for row in z), temperature=1.0, normalize=False)
    assert_same(rotated, nt_xent(*z, temperature=1.0, normalize=False))
