"""LARS's sums and update, in torch and in interpreted Triton, against float64."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclr.kernels import KernelUnavailable, lars, lars_torch

lars.check(torch.ones(1))  # or TRITON_INTERPRET=1 was not set before Triton was imported

KERNELS = {"torch": lars_torch, "triton": lars}
SIZES = (1, 7, lars.CHUNK - 1, lars.CHUNK, 3 * lars.CHUNK + 5)
OPTIONS: dict[str, Any] = {"weight_decay": 0.05, "momentum": 0.9, "nesterov": False, "rate": 0.3}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on NaN
either = pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)


def tensors(sizes, scale=1.0, dtype=torch.float32, start=0, seed=0):
    """Return lists of weights, gradients and momenta: pieces of flat buffers, from ``start`` on."""
    generator = torch.Generator().manual_seed(seed)
    kinds = []
    for size in (1.0, 1e-2, 1e-3):
        flat = scale * size * torch.randn(sum(sizes) + start, generator=generator)
        kinds.append(list(flat.to(dtype)[start:].split(list(sizes))))
    return kinds


def expected_sums(w, g, weight_decay):
    """Sum in float64, the decayed gradient rounded as the tensors are."""
    pairs = [(a.double(), (b + weight_decay * a).double()) for a, b in zip(w, g, strict=True)]
    return torch.tensor([[a.square().sum(), d.square().sum()] for a, d in pairs]).double()


def expected_update(w, g, v, scale, rate, weight_decay, momentum, nesterov):
    """Write the rule out in float64."""
    steps = []
    for a, b, m, s in zip(w, g, v, scale, strict=True):
        a, d, m = a.double(), s * (b.double() + weight_decay * a.double()), m.double()
        m = momentum * m + d
        steps.append((a - rate * (d + momentum * m if nesterov else m), m))
    return map(list, zip(*steps, strict=True))


def distance(found, expected):
    """Largest distance of any tensor, relative to its largest element."""
    pairs = zip(found, expected, strict=True)
    return max(((f.double() - e).abs().max() / e.abs().max()).item() for f, e in pairs)


@either
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_sums_of_squares(kernels, weight_decay, start):
    w, g, _ = tensors(SIZES, start=start)
    found = kernels.sums_of_squares(w, g, weight_decay)
    expected = expected_sums(w, g, weight_decay)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@either
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_update(kernels, nesterov, start):
    w, g, v = tensors(SIZES, start=start)
    scale = torch.rand(len(SIZES), dtype=torch.float64)
    options = {**OPTIONS, "nesterov": nesterov}
    wanted_w, wanted_v = expected_update(w, g, v, scale, **options)
    before = [t.clone() for t in g]
    kernels.update(w, g, v, scale=scale, **options)
    assert distance(w, wanted_w) < 1e-6
    assert distance(v, wanted_v) < 1e-6
    assert all(map(torch.equal, g, before)), "gradients are the caller's"


@either
def test_one_scale_for_all(kernels):
    one, each = tensors(SIZES), tensors(SIZES)
    kernels.update(*one, scale=0.3, **OPTIONS)
    kernels.update(*each, scale=torch.full((len(SIZES),), 0.3, dtype=torch.float64), **OPTIONS)
    for found, expected in zip(chain(*one), chain(*each), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@either
def test_neighbours_in_a_buffer_stay(kernels):
    flats = [torch.randn(3 * lars.CHUNK) for _ in range(3)]
    before = [flat.clone() for flat in flats]
    pieces = [[flat[5 : lars.CHUNK + 9]] for flat in flats]
    kernels.update(*pieces, scale=torch.tensor([0.5], dtype=torch.float64), **OPTIONS)
    for flat, old in zip(flats, before, strict=True):
        assert torch.equal(flat[:5], old[:5])
        assert torch.equal(flat[lars.CHUNK + 9 :], old[lars.CHUNK + 9 :])
    assert not torch.equal(pieces[0][0], before[0][5 : lars.CHUNK + 9])


@either
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1.0, 1e22, 1e30])
def test_sums_do_not_leave_the_range(kernels, scale):
    w, g, _ = tensors((1000, 5000), scale)
    found = kernels.sums_of_squares(w, g, 0.05)
    torch.testing.assert_close(found, expected_sums(w, g, 0.05), rtol=1e-6, atol=0)


@either
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e-7, 1e-3, 1.0, 1e6])
def test_updates_keep_any_scale(kernels, scale):
    w, g, v = tensors((1000,))
    v = [torch.zeros_like(t) for t in v]
    scales = torch.tensor([scale], dtype=torch.float64)
    _, expected = expected_update(w, g, v, scales, **OPTIONS)
    kernels.update(w, g, v, scale=scales, **OPTIONS)
    assert distance(v, expected) < 1e-6


@either
def test_a_gradient_that_cancels_the_decay_is_not_lost(kernels):
    w, g, _ = tensors((lars.CHUNK + 3,))
    g = [-0.05 * w[0] + 1e-6 * g[0]]
    found = kernels.sums_of_squares(w, g, 0.05)
    exact = (g[0].double() + 0.05 * w[0].double()).square().sum()
    # What rounding of g + 0.05 w leaves; sums of squares of the parts would be all noise.
    torch.testing.assert_close(found[0, 1], exact, rtol=0.2, atol=0)


@either
def test_nan_and_infinity_come_out(kernels):
    w, g, v = tensors((100, 100, 100))
    g[0][3], g[1][3] = float("nan"), float("inf")
    sums = kernels.sums_of_squares(w, g, 0.05)
    assert sums[0, 1].isnan() and sums[1, 1].isinf() and sums[2].isfinite().all()
    scale = torch.tensor([float("nan"), 0.0, 1.0], dtype=torch.float64)
    kernels.update(w, g, v, scale=scale, **OPTIONS)
    assert w[0].isnan().all() and w[1][3].isnan() and w[2].isfinite().all()


@either
def test_repeatable_bit_by_bit(kernels):
    first, second = tensors(SIZES), tensors(SIZES)
    sums = [kernels.sums_of_squares(w, g, 0.05) for w, g, _ in (first, second)]
    assert torch.equal(*sums)
    for pieces in (first, second):
        kernels.update(*pieces, scale=sums[0][:, 0], **OPTIONS)
    assert all(map(torch.equal, chain(*first), chain(*second)))


@either
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(kernels, dtype):
    w, g, v = tensors((5000,), dtype=dtype)
    found = kernels.sums_of_squares(w, g, 0.05)
    wide = [[t.double() for t in kind] for kind in (w, g)]
    torch.testing.assert_close(found, expected_sums(*wide, 0.05), rtol=1e-5, atol=0)
    scale = torch.tensor([0.2], dtype=torch.float64)
    expected_w, _ = expected_update(w, g, v, scale, **OPTIONS)
    kernels.update(w, g, v, scale=scale, **OPTIONS)
    assert distance(w, expected_w) < torch.finfo(dtype).eps


@either
def test_empty_tensors(kernels):
    w, g, v = tensors((0, 3, 0))
    assert kernels.sums_of_squares(w, g, 0.1)[:, 0].ne(0).tolist() == [False, True, False]
    kernels.update(w, g, v, scale=torch.ones(3, dtype=torch.float64), **OPTIONS)
    empty = [torch.ones(0)]
    assert kernels.sums_of_squares(empty, empty, 0.1).tolist() == [[0, 0]]
    kernels.update(empty, empty, empty, scale=1.0, **OPTIONS)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 2 * lars.CHUNK + 9), min_size=1, max_size=5),
    st.integers(0, 5),
    st.integers(0, 1000),
)
def test_both_agree_on_any_sizes(sizes, start, seed):
    w, g, v = tensors(sizes, start=start, seed=seed)
    others = [[t.clone() for t in kind] for kind in (w, g, v)]
    before = [t.clone() for t in (*w, *v)]
    sums = lars.sums_of_squares(w, g, 0.05)
    # Relative to what was added up: g + 0.05 w may cancel.
    terms = [
        torch.stack([x.square().sum(), (y.abs() + 0.05 * x.abs()).square().sum()])
        for x, y in zip(w, g, strict=True)
    ]
    assert ((sums - lars_torch.sums_of_squares(w, g, 0.05)).abs() < 1e-6 * torch.stack(terms)).all()
    scale = sums[:, 0] / sums[:, 0].max()
    lars.update(w, g, v, scale=scale, **OPTIONS)
    lars_torch.update(*others, scale=scale, **OPTIONS)
    for found, expected, held in zip(w + v, others[0] + others[2], before, strict=True):
        assert (found - expected).abs().max() < 1e-6 * (held.abs().max() + expected.abs().max())


def test_long_sums_on_the_cpu_stay_exact():
    w, g, _ = tensors((3_000_001,))  # a single-precision sum over all of it is 1e-5 off
    norms = lars_torch.sums_of_squares(w, g, 0.05).sqrt()
    torch.testing.assert_close(norms, expected_sums(w, g, 0.05).sqrt(), rtol=1e-6, atol=0)


def test_triton_refuses_what_it_cannot_take():
    w = [torch.ones(3, dtype=torch.float64)]
    with pytest.raises(KernelUnavailable, match=r"weights in torch.float64.*impl='auto'"):
        lars.sums_of_squares(w, w, 0.1)


def test_plans_are_made_once():
    before = lars.cut.cache_info()
    w, g, _ = tensors((123, 4567))
    for _ in range(3):
        lars.sums_of_squares(w, g, 0.05)
    after = lars.cut.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 2)
