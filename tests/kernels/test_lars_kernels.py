"""LARS's sums and update, in torch, numba and Triton, against float64."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclr.kernels import KernelUnavailable, lars, lars_numba, lars_torch
from tests.device import DEVICE, on_device  # noqa: F401

lars.check(torch.ones(1, device=DEVICE))  # or Triton was imported before its interpreter was chosen

KERNELS = {"torch": lars_torch, "numba": lars_numba, "triton": lars}
if DEVICE.type == "cuda":
    del KERNELS["numba"]
SIZES = (1, 7, lars.CHUNK - 1, lars.CHUNK, 3 * lars.CHUNK + 5, lars_numba.BLOCK + 1)
OPTIONS: dict[str, Any] = {"weight_decay": 0.05, "momentum": 0.9, "nesterov": False, "rate": 0.3}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on NaN
each = pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)


def tensors(sizes, scale=1.0, dtype=torch.float32, start=0, seed=0):
    """Return lists of weights, gradients and momenta: pieces of flat buffers, from ``start`` on."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    kinds = []
    for size in (1.0, 1e-2, 1e-3):
        flat = scale * size * torch.randn(sum(sizes) + start, generator=generator)
        kinds.append(list(flat.to(dtype)[start:].split(list(sizes))))
    return kinds


def expected_sums(w, g, weight_decay):
    """Sum in float64."""
    sums = []
    for a, b in zip(w, g, strict=True):
        d = b.double() + weight_decay * a.double()
        sums.append(torch.stack([a.double().square().sum(), d.square().sum()]))
    return torch.stack(sums)


def expected_update(w, g, v, scale, rate, weight_decay, momentum, nesterov):
    """Write the rule out in float64."""
    steps = []
    for a, b, m, s in zip(w, g, v, scale, strict=True):
        a, d, m = a.double(), s * (b.double() + weight_decay * a.double()), m.double()
        m = momentum * m + d
        steps.append((a - rate * (d + momentum * m if nesterov else m), m))
    return map(list, zip(*steps, strict=True))


def check_update(kernels, w, g, v, scale, **options):
    """Update, and compare each element with float64, in roundings of the terms it is made of."""
    expected = expected_update(w, g, v, scale, **options)
    positive = [[t.abs() for t in kind] for kind in (w, g, v)]
    terms = expected_update(*positive, scale.abs(), **{**options, "rate": -options["rate"]})
    kernels.update(w, g, v, scale=scale, **options)
    info = torch.finfo(w[0].dtype)
    eps = min(info.eps, torch.finfo(torch.float32).eps)  # halves are computed in single precision
    truncates = kernels is lars and w[0].dtype == torch.bfloat16  # Triton's interpreter does
    last = info.eps if truncates else info.eps / 2
    for kind, wanted, sizes in zip((w, v), expected, terms, strict=True):
        for found, exact, size in zip(kind, wanted, sizes, strict=True):
            bound = last * exact.abs().clamp(min=info.tiny) + 4 * eps * size
            assert ((found.double() - exact).abs() <= bound).all()


@each
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_sums_of_squares(kernels, weight_decay, start):
    w, g, _ = tensors(SIZES, start=start)
    found = kernels.sums_of_squares(w, g, weight_decay)
    expected = expected_sums(w, g, weight_decay)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@each
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_update(kernels, nesterov, start):
    w, g, v = tensors(SIZES, start=start)
    before = [t.clone() for t in g]
    scale = torch.linspace(0, 1, len(SIZES), dtype=torch.float64)
    check_update(kernels, w, g, v, scale, **{**OPTIONS, "nesterov": nesterov})
    assert all(map(torch.equal, g, before)), "gradients are the caller's"


@each
@pytest.mark.parametrize("option", ["momentum", "weight_decay"])
def test_update_without(kernels, option):
    w, g, v = tensors(SIZES)
    scale = torch.ones(len(SIZES), dtype=torch.float64)
    check_update(kernels, w, g, v, scale, **{**OPTIONS, option: 0.0})


@each
@pytest.mark.parametrize("nesterov", [False, True])
def test_one_scale_for_all(kernels, nesterov):
    options = {**OPTIONS, "nesterov": nesterov}
    one, many = tensors(SIZES), tensors(SIZES)
    kernels.update(*one, scale=0.3, **options)
    kernels.update(*many, scale=torch.full((len(SIZES),), 0.3, dtype=torch.float64), **options)
    for found, expected in zip(chain(*one), chain(*many), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@each
def test_neighbours_in_a_buffer_stay(kernels):
    flats = [torch.randn(3 * lars.CHUNK) for _ in range(3)]
    before = [flat.clone() for flat in flats]
    pieces = [[flat[5 : lars.CHUNK + 9]] for flat in flats]
    kernels.update(*pieces, scale=torch.tensor([0.5], dtype=torch.float64), **OPTIONS)
    for flat, old in zip(flats, before, strict=True):
        assert torch.equal(flat[:5], old[:5])
        assert torch.equal(flat[lars.CHUNK + 9 :], old[lars.CHUNK + 9 :])
    assert not torch.equal(pieces[0][0], before[0][5 : lars.CHUNK + 9])


@each
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1.0, 1e22, 1e30])
def test_sums_do_not_leave_the_range(kernels, scale):
    w, g, _ = tensors((1000, 5000), scale)
    found = kernels.sums_of_squares(w, g, 0.05)
    torch.testing.assert_close(found, expected_sums(w, g, 0.05), rtol=1e-6, atol=0)


@each
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e-7, 1e-3, 1.0, 1e6])
def test_updates_keep_any_scale(kernels, scale):
    w, g, v = tensors((1000,))
    v = [torch.zeros_like(t) for t in v]
    check_update(kernels, w, g, v, torch.tensor([scale], dtype=torch.float64), **OPTIONS)


@each
def test_a_gradient_that_cancels_the_decay_is_not_lost(kernels):
    w, g, _ = tensors((lars.CHUNK + 3,))
    g = [-0.05 * w[0] + 1e-6 * g[0]]
    found = kernels.sums_of_squares(w, g, 0.05)
    exact = (g[0].double() + 0.05 * w[0].double()).square().sum()
    # What rounding of g + 0.05 w leaves; sums of squares of the parts would be all noise.
    torch.testing.assert_close(found[0, 1], exact, rtol=0.2, atol=0)


@each
def test_nan_and_infinity_come_out(kernels):
    w, g, v = tensors((100, 100, 100))
    g[0][3], g[1][3] = float("nan"), float("inf")
    sums = kernels.sums_of_squares(w, g, 0.05)
    assert sums[0, 1].isnan() and sums[1, 1].isinf() and sums[2].isfinite().all()
    scale = torch.tensor([float("nan"), 0.0, 1.0], dtype=torch.float64)
    kernels.update(w, g, v, scale=scale, **OPTIONS)
    assert w[0].isnan().all() and w[1][3].isnan() and w[2].isfinite().all()


@each
def test_repeatable_bit_by_bit(kernels):
    first, second = tensors(SIZES), tensors(SIZES)
    sums = [kernels.sums_of_squares(w, g, 0.05) for w, g, _ in (first, second)]
    assert torch.equal(*sums)
    for pieces in (first, second):
        kernels.update(*pieces, scale=sums[0][:, 0], **OPTIONS)
    assert all(map(torch.equal, chain(*first), chain(*second)))


@pytest.mark.parametrize("kernels", [lars_torch, lars], ids=["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nesterov", [False, True])
def test_half_precision_is_computed_in_single(kernels, dtype, nesterov):
    w, g, v = tensors((5000,), dtype=dtype)
    found = kernels.sums_of_squares(w, g, 0.05)
    torch.testing.assert_close(found, expected_sums(w, g, 0.05), rtol=1e-6, atol=0)
    scale = torch.tensor([0.2], dtype=torch.float64)
    check_update(kernels, w, g, v, scale, **{**OPTIONS, "nesterov": nesterov})


@pytest.mark.parametrize("kernels", [lars_torch, lars_numba], ids=["torch", "numba"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_double_precision(kernels, nesterov):
    w, g, v = tensors(SIZES, dtype=torch.float64)
    found = kernels.sums_of_squares(w, g, 0.05)
    torch.testing.assert_close(found, expected_sums(w, g, 0.05), rtol=1e-13, atol=0)
    scale = torch.linspace(0, 1, len(SIZES), dtype=torch.float64)
    check_update(kernels, w, g, v, scale, **{**OPTIONS, "nesterov": nesterov})


@each
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


@pytest.mark.parametrize("kernels", [lars_torch, lars_numba], ids=["torch", "numba"])
def test_long_sums_are_exact(kernels):
    w, g, _ = tensors((3_000_001,))  # a single-precision sum over all of it is 1e-5 off
    found = kernels.sums_of_squares(w, g, 0.0625)
    # torch rounds the decayed gradient, which errs to both sides alike; numba does not.
    rtol = 1e-12 if kernels is lars_numba else 1e-9
    torch.testing.assert_close(found, expected_sums(w, g, 0.0625), rtol=rtol, atol=0)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 2 * lars_numba.BLOCK + 9), min_size=1, max_size=8),
    start=st.integers(0, 20),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    weight_decay=st.sampled_from([0.0, 0.05]),
    momentum=st.sampled_from([0.0, 0.9]),
    nesterov=st.booleans(),
)
def test_numba_follows_the_rule(sizes, start, seed, dtype, weight_decay, momentum, nesterov):
    w, g, v = tensors(sizes, dtype=dtype, start=start, seed=seed)
    found = lars_numba.sums_of_squares(w, g, weight_decay)
    expected = expected_sums(w, g, weight_decay)
    size = expected_sums([t.abs() for t in w], [t.abs() for t in g], weight_decay)
    # In single precision the decay itself is rounded.
    eps = torch.finfo(dtype).eps if dtype == torch.float32 else 1e-14
    assert ((found - expected).abs() <= eps * size).all()
    scale = expected[:, 0] / expected[:, 0].max().clamp(min=1e-9)
    options = {"weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
    check_update(lars_numba, w, g, v, scale, rate=0.3, **options)


@pytest.mark.parametrize("kind", [{"dtype": torch.bfloat16}, {"device": "meta"}])
def test_numba_refuses_what_it_cannot_take(kind):
    w = [torch.ones(3, **kind)]
    with pytest.raises(KernelUnavailable, match=r"weights in torch\.\w+ on \w+: .*impl='auto'"):
        lars_numba.sums_of_squares(w, w, 0.1)
    with pytest.raises(KernelUnavailable, match="impl='auto'"):
        lars_numba.update(w, w, w, scale=1.0, **OPTIONS)


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
