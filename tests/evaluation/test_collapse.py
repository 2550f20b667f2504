"""Monitors of collapse against loops, and where there is nothing to measure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

from fastclr.evaluation import collapse
from fastclr.evaluation.collapse import (
    Monitors,
    alignment,
    effective_rank,
    monitors,
    uniformity,
    unit_std,
)

MONITORS = (unit_std, effective_rank, alignment, uniformity)


def rows(num_rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return rows that point more one way than another."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, width, generator=generator) + 0.5


def unit(rows_ND: torch.Tensor) -> np.ndarray:
    """Return the rows divided by their lengths, float64."""
    found = rows_ND.double().numpy()
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@settings(max_examples=25, deadline=None)
@given(
    half=st.integers(1, 20),
    width=st.integers(1, 30),
    seed=st.integers(0, 99),
    block=st.sampled_from([1, 3, 8, 1024]),
)
def test_they_are_their_formulas(half, width, seed, block):
    x = rows(2 * half, width, seed)
    u = unit(x)
    pairs = [(i, j) for i in range(2 * half) for j in range(i)]
    gauss = [math.exp(-2 * ((u[i] - u[j]) ** 2).sum()) for i, j in pairs]
    singular = np.linalg.svd(x.double().numpy(), compute_uv=False)
    p = singular / singular.sum()
    expected = {
        unit_std: math.sqrt(width) * np.mean([u[:, d].std() for d in range(width)]),
        effective_rank: math.exp(-sum(q * math.log(q) for q in p if q > 0)),
        alignment: np.mean([((u[i] - u[i + half]) ** 2).sum() for i in range(half)]),
        uniformity: math.log(np.mean(gauss)),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collapse, "_BLOCK", block)
        found = {monitor: monitor(x) for monitor in MONITORS}
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_an_even_spread_over_the_sphere():
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert unit_std(x) == pytest.approx(1, abs=0.01)
    assert effective_rank(x) == pytest.approx(64, rel=0.01)
    assert alignment(x) == pytest.approx(2, abs=0.02)
    assert uniformity(x) == pytest.approx(-4, abs=0.15)


def test_the_effective_rank_counts_directions():
    directions = torch.linalg.qr(rows(9, 9)).Q
    for rank in (1, 2, 5, 9):
        assert effective_rank(directions[:rank]) == pytest.approx(rank)
    weak = directions * torch.tensor([1.0] * 3 + [1e-4] * 6)[:, None]
    assert effective_rank(weak) == pytest.approx(3, rel=0.01)


@pytest.mark.parametrize("weakest", [1e-2, 1e-4, 1e-6])
def test_weak_directions_count_by_their_singular_values(weakest):
    singular = np.geomspace(1, weakest, 40)
    p = singular / singular.sum()
    left, right = (torch.linalg.qr(rows(n, 40, n).double()).Q for n in (90, 60))
    for x in (
        left * torch.from_numpy(singular) @ right.T,
        right * torch.from_numpy(singular) @ left.T,
    ):
        assert effective_rank(x) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)


@pytest.mark.parametrize("size", [(300, 200), (200, 300)])
def test_rounding_counts_for_nothing(size):
    thin, wide = (rows(n, 3, n).double() for n in size)
    expected = effective_rank(torch.linalg.qr(thin).R @ torch.linalg.qr(wide).R.T)
    assert effective_rank(thin @ wide.T) == pytest.approx(expected, rel=1e-9)


def test_the_length_of_rows_matters_to_the_effective_rank_alone():
    x = rows(12, 6)
    longer = x * torch.linspace(0.01, 90, 12)[:, None]
    for monitor in (unit_std, alignment, uniformity):
        assert monitor(longer) == pytest.approx(monitor(x))
    assert effective_rank(longer) < 0.95 * effective_rank(x)
    assert effective_rank(x * 1e-6) == pytest.approx(effective_rank(x))


def test_positives_are_half_the_rows_apart():
    views = rows(10, 8)
    assert alignment(torch.cat([views, views])) == 0
    assert alignment(torch.cat([views, -views])) == pytest.approx(4)
    assert alignment(views.repeat_interleave(2, 0)) > 0.1


def test_all_of_them_at_once():
    h, z = rows(14, 9), rows(14, 5, 1)
    found = monitors(h, z)
    assert found == Monitors(
        h_effective_rank=effective_rank(h),
        z_effective_rank=effective_rank(z),
        h_std=unit_std(h),
        z_std=unit_std(z),
        alignment=alignment(z),
        uniformity=(uniformity(z[:7]) + uniformity(z[7:])) / 2,
    )
    assert all(type(value) is float for value in found)


@pytest.mark.parametrize(
    ("x", "std", "rank", "aligned", "uniform"),
    [
        (torch.ones(8, 5), 0, 1, 0, 0),
        (torch.zeros(8, 5), 0, 0, 0, 0),
        (rows(1, 5), 0, 1, 0, 0),
        (torch.zeros(0, 5), 0, 0, 0, 0),
        (torch.ones(8, 5) * torch.tensor([1.0, -1.0] * 4)[:, None], 1, 1, 0, None),
    ],
    ids=["all equal", "zeros", "one row", "no row", "two ends of a line"],
)
def test_what_has_no_spread_has_a_value(x, std, rank, aligned, uniform):
    assert unit_std(x) == pytest.approx(std, abs=1e-6)
    assert effective_rank(x) == pytest.approx(rank, abs=1e-6)
    assert alignment(x) == pytest.approx(aligned, abs=1e-6)
    if uniform is not None:
        assert uniformity(x) == pytest.approx(uniform, abs=1e-6)
    found = monitors(x, x)
    assert (found.h_effective_rank, found.z_std) == pytest.approx((rank, std), abs=1e-6)
    assert all(map(math.isfinite, found))


def test_a_row_of_zeros_among_others_does_no_harm():
    x = rows(6, 4)
    x[2] = 0
    assert all(math.isfinite(monitor(x)) for monitor in MONITORS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("num_rows", [1, 6])
def test_what_is_not_finite_gives_nan(value, num_rows):
    x = rows(num_rows, 4)
    broken = x.clone()
    broken[0, 1] = value
    assert all(math.isnan(monitor(broken)) for monitor in MONITORS)
    found = monitors(broken, x)
    assert [math.isnan(number) for number in found] == [True, False, True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype_will_do(dtype):
    x = rows(10, 6)
    for monitor in MONITORS:
        assert monitor(x.to(dtype)) == pytest.approx(monitor(x), rel=0.05)


def test_rows_may_carry_gradients_and_stay_as_they_are():
    x = rows(6, 4).requires_grad_()
    before = x.detach().clone()
    monitors(x, x)
    assert torch.equal(x, before)
    assert x.grad is None


def test_half_a_pair_is_refused():
    for compute in (alignment, lambda x: monitors(x, x)):
        with pytest.raises(ValueError, match="7 rows are not two views"):
            compute(rows(7, 4))


@pytest.mark.parametrize("size", [(9, 4), (4, 9)])
def test_the_smaller_matrix_is_decomposed_on_one_thread(monkeypatch, size):
    threads, shapes, eigvalsh = set(), [], np.linalg.eigvalsh

    def noted(x):
        threads.update(p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas")
        shapes.append(x.shape)
        return eigvalsh(x)

    monkeypatch.setattr(np.linalg, "eigvalsh", noted)
    with threadpool_limits(2, user_api="blas"):
        effective_rank(rows(*size))
    assert threads == {1}
    assert shapes == [(4, 4)]


def test_uniformity_needs_memory_for_a_block_only(monkeypatch):
    sizes, cdist = [], torch.cdist
    monkeypatch.setattr(collapse, "_BLOCK", 16)
    monkeypatch.setattr(torch, "cdist", lambda a, b: sizes.append(len(a) * len(b)) or cdist(a, b))
    uniformity(rows(100, 4))
    assert max(sizes) == 16 * 100
    assert len(sizes) == 7
