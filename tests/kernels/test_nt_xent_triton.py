"""NT-Xent's Triton kernels, interpreted or on a GPU, against float64 and the dense matrix."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fastclr.kernels import nt_xent as kernels
from fastclr.kernels.nt_xent import TILINGS, Tiling, forward, gradient, merge_rankings, prepare
from tests.device import DEVICE, on_device  # noqa: F401

assert kernels.unavailable(DEVICE) is None, kernels.unavailable(DEVICE)

HALF, SINGLE = torch.float16, torch.float32
ERROR = {SINGLE: 1e-6, HALF: 2e-3}  # of the gradient; half precision also rounds W
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on NaN


class Result(NamedTuple):
    """What the kernels or the oracle make of all rows."""

    lse: torch.Tensor
    gradient: torch.Tensor
    ranking: torch.Tensor


class World:
    """Rows of several ranks, and which of them are positives and views."""

    def __init__(self, images_R, dim, temperature=0.2, dtype=SINGLE, seed=0, noise=0.7):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        self.images_R, self.temperature, rows = images_R, temperature, []
        for images in images_R:
            content, *noises = torch.randn(3, images, dim, generator=generator).double()
            rows.append(torch.cat([content + noise * n for n in noises]))
        self.set_rows(torch.nn.functional.normalize(torch.cat(rows)), dtype)

    def set_rows(self, unit_MD, dtype=SINGLE):
        self.unit_MD = unit_MD
        self.keys_MD = prepare(unit_MD.float() / self.temperature**0.5, dtype)

    @property
    def spans(self):
        ends = [2 * sum(self.images_R[: r + 1]) for r in range(len(self.images_R))]
        return [slice(e - 2 * i, e) for e, i in zip(ends, self.images_R, strict=True)]

    @property
    def positive_M(self):
        places = torch.arange(len(self.keys_MD))
        return torch.cat([places[s].roll((s.stop - s.start) // 2) for s in self.spans])

    @property
    def view_M(self):
        views = [torch.arange(2).repeat_interleave(images) for images in self.images_R]
        return torch.cat(views).to(torch.int8)

    def bound(self, online):
        return None if online else torch.tensor(1 / self.temperature)


def oracle(world: World, rows_MD: torch.Tensor | None = None) -> Result:
    """Write it out densely in float64, on the rounded rows unless others are given."""
    rows_MD = (world.keys_MD if rows_MD is None else rows_MD).double().requires_grad_()
    s_MM = (rows_MD @ rows_MD.T).masked_fill(torch.eye(len(rows_MD)).bool(), -torch.inf)
    lse_M = s_MM.logsumexp(1)
    places = torch.arange(len(rows_MD))
    (lse_M - s_MM[places, world.positive_M]).sum().backward()
    s_MM, view_M = s_MM.detach(), world.view_M
    candidates_MM = s_MM.masked_fill(view_M[:, None] == view_M, -torch.inf)
    mean_M = (candidates_MM.softmax(1) * s_MM.nan_to_num(neginf=0)).sum(1)
    best_M = candidates_MM.scatter(1, world.positive_M[:, None], -torch.inf).amax(1)
    ranking_M3 = torch.stack([candidates_MM.logsumexp(1), mean_M, best_M], 1)
    return Result(lse_M.detach(), rows_MD.grad, ranking_M3)


def run(world: World, online: bool) -> Result:
    """Run the kernels as the ranks would."""
    bound, keys_MD = world.bound(online), world.keys_MD
    parts = [forward(keys_MD[s], keys_MD, s.start, bound, world.view_M) for s in world.spans]
    stat_M = torch.cat([stat for stat, _ in parts])
    plain = [forward(keys_MD[s], keys_MD, s.start, bound)[0] for s in world.spans]
    torch.testing.assert_close(torch.cat(plain), stat_M, rtol=1e-5, atol=1e-5, equal_nan=True)
    gradients = [
        gradient(keys_MD[s], stat_M[s], keys_MD, stat_M, s.start, bound) for s in world.spans
    ]
    lse_M = stat_M if online else stat_M.log() + bound
    return Result(lse_M, torch.cat(gradients), torch.cat([ranking for _, ranking in parts]))


def relative(found: torch.Tensor, truth: torch.Tensor, terms: float = 0.0) -> float:
    """Return the error relative to the truth and the terms whose difference it may be."""
    return ((found - truth).norm() / (truth.norm() + terms)).item()


def check(found: Result, truth: Result, world: World) -> None:
    """Compare to the last digits that float32 has, of the terms where they cancel.

    Tensor cores cut what an addition shifts out, where a CPU rounds: seen at 512 columns.
    """
    largest, unit = 1 / world.temperature, 1 if DEVICE.type == "cpu" else 3
    close = {"rtol": unit * 1e-6, "atol": unit * (3e-7 * largest + 1e-6), "check_dtype": False}
    torch.testing.assert_close(found.lse, truth.lse, **close)
    torch.testing.assert_close(found.ranking, truth.ranking, **close)
    error = relative(found.gradient, truth.gradient, world.keys_MD.float().norm().item())
    assert error <= ERROR[world.keys_MD.dtype] + 2e-7 * largest


worlds = st.builds(
    World,
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.integers(2, 40),
    st.floats(0.025, 2),
    st.sampled_from([SINGLE, HALF]),
    st.integers(0, 10**6),
    st.sampled_from([0.01, 0.7, 10]),
)
# Not shrunk: that can take minutes, and the worlds are small.
quick = settings(max_examples=25, deadline=None, phases=[Phase.reuse, Phase.generate])


@quick
@given(world=worlds, online=st.booleans())
def test_all_is_that_of_the_formula_on_any_ranks(world, online):
    check(run(world, online), oracle(world), world)


@quick
@given(
    worlds,
    st.floats(0.002, 0.025),
)
def test_low_temperatures_need_no_bound(world, temperature):
    world.temperature = temperature
    world.set_rows(world.unit_MD, world.keys_MD.dtype)
    check(run(world, online=True), oracle(world), world)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("temperature", [0.5, 0.1])
@pytest.mark.parametrize("num_rows", [10, 16, 32, 64])  # fewer can cancel; see the properties
def test_gradients_are_exact_to_what_was_promised(num_rows, temperature, dtype, online):
    world = World([num_rows // 2], 32, temperature, dtype, noise=2)
    found = run(world, online).gradient
    assert relative(found, oracle(world).gradient) <= ERROR[dtype]
    exact = oracle(world, world.unit_MD / temperature**0.5).gradient
    assert relative(found[:, :32], exact) <= ERROR[dtype]


@pytest.mark.parametrize("online", [False, True])
def test_the_2_of_the_positive_is_subtracted_before_the_rounding(online):
    # Pairs have converged: W_ip is almost 2, and rounded to float16 first it would be noise.
    world = World([48], 16, 0.07, HALF, noise=0.02)
    assert relative(run(world, online).gradient, oracle(world).gradient) <= 4e-3


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("dim", TILINGS["forward"])
def test_every_tiling_of_the_table(dim, online):
    assert TILINGS["forward"].keys() == TILINGS["ranking"].keys() == TILINGS["gradient"].keys()
    world = World([135, 5], dim, dtype=HALF)  # more rows than a tile has, and no multiple
    check(run(world, online), oracle(world), world)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("rows, keys, chip", [(16, 16, 1), (16, 64, 3), (64, 16, 40), (32, 32, 5)])
def test_tiles_and_splits_do_not_matter(monkeypatch, rows, keys, chip, online):
    world = World([33, 4], 16)
    for name in TILINGS:
        monkeypatch.setitem(TILINGS, name, {16: Tiling(rows, keys, 4, 2)})
    monkeypatch.setattr(kernels, "_FULL_CHIP", chip)
    check(run(world, online), oracle(world), world)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 10**7),
    st.integers(0, 10**8),
    st.sampled_from([*TILINGS]),
    st.sampled_from([16, 128, 512]),
)
def test_splits_cover_every_key_once(images, others, name, dim):
    rows_ND, keys_MD = (
        torch.empty(n, dim, device="meta") for n in (2 * images, 2 * images + others)
    )
    (row_tiles, splits), (_, num_keys, _, chunk), options = kernels._plan(
        TILINGS[name], rows_ND, keys_MD, 0
    )
    assert (splits - 1) * chunk < num_keys <= splits * chunk
    assert chunk % options["KEYS"] == 0
    assert row_tiles * options["ROWS"] >= 2 * images
    assert splits == 1 or row_tiles * splits <= 128


@pytest.mark.parametrize("online", [False, True])
def test_keys_in_parts_add_up(online):
    """As in a ring: the keys of other ranks hold no anchor and no positive."""
    world = World([5, 9, 2], 12)
    keys_MD, bound, truth = world.keys_MD, world.bound(online), oracle(world)
    merge = (lambda a, b: torch.logaddexp(a, b)) if online else torch.add
    stats, rankings = [], []
    for own in world.spans:
        stat, parts = None, []
        for s in world.spans:
            first = 0 if s == own else -1
            part, ranking = forward(keys_MD[own], keys_MD[s], first, bound, world.view_M[s])
            stat = part if stat is None else merge(stat, part)
            parts.append(ranking)
        stats.append(stat)
        rankings.append(merge_rankings(torch.stack(parts)))
    stat_M = torch.cat(stats)
    gradients = [
        sum(
            gradient(keys_MD[own], stat_M[own], keys_MD[s], stat_M[s], 0 if s == own else -1, bound)
            for s in world.spans
        )
        for own in world.spans
    ]
    lse_M = stat_M if online else stat_M.log() + bound
    check(Result(lse_M, torch.cat(gradients), torch.cat(rankings)), truth, world)


@pytest.mark.parametrize("online", [False, True])
def test_without_candidates_the_ranking_says_so(online):
    world = World([4], 8)
    view_0 = world.keys_MD[:4]
    _, ranking = forward(world.keys_MD, view_0, -1, world.bound(online), world.view_M[:4])
    assert ranking[:4].tolist() == [[-math.inf, 0, -math.inf]] * 4
    assert ranking[4:].isfinite().all()
    _, ranking = forward(*[World([1], 8).keys_MD] * 2, 0, world.bound(online), world.view_M[3:5])
    assert ranking[:, 2].tolist() == [-math.inf] * 2, "the positive alone has no rival"
    torch.testing.assert_close(ranking[:, 0], ranking[:, 1])


@pytest.mark.parametrize("online", [False, True])
def test_a_rank_may_have_no_image(online):
    world = World([4], 8)
    bound, keys_MD, nothing = world.bound(online), world.keys_MD, world.keys_MD[:0]
    stat, ranking = forward(keys_MD, nothing, -1, bound, world.view_M[:0])
    assert stat.tolist() == [-math.inf if online else 0] * 8
    assert ranking.tolist() == [[-math.inf, 0, -math.inf]] * 8
    assert gradient(keys_MD, stat + 1, nothing, stat[:0], -1, bound).eq(0).all()
    stat, ranking = forward(nothing, keys_MD, -1, bound, world.view_M)
    assert stat.shape == (0,) and ranking.shape == (0, 3)
    assert gradient(nothing, stat, keys_MD, torch.ones(8), -1, bound).shape == (0, 16)


@quick
@given(worlds, st.booleans(), st.data())
def test_pairs_may_be_permuted_and_views_swapped(world, online, data):
    found = run(world, online)
    orders, swapped = [], data.draw(st.booleans())
    for s, images in zip(world.spans, world.images_R, strict=True):
        order = torch.tensor(data.draw(st.permutations(range(images)))) + s.start
        orders += [order + images, order] if swapped else [order, order + images]
    order_M = torch.cat(orders)
    world.keys_MD = world.keys_MD[order_M]
    check(run(world, online), Result(*(tensor[order_M] for tensor in found)), world)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("images, temperature", [(1, 0.2), (7, 0.025), (40, 1.0)])
def test_collapse_costs_the_logarithm_of_the_candidates(images, temperature, online):
    world = World([images], 8, temperature)
    world.set_rows(torch.nn.functional.normalize(torch.ones(2 * images, 8)))
    loss_M = run(world, online).lse - 1 / temperature
    assert loss_M.tolist() == pytest.approx([math.log(2 * images - 1)] * 2 * images, abs=1e-5)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("others", [[], [20]])
def test_an_anchor_opposite_to_all_at_the_lowest_bounded_temperature(
    monkeypatch, others, dtype, online
):
    # Z = exp(-80): it is a normal number, and so must be everything made of 1/Z, and what lies
    # behind the last key, exp(0) / Z, must not count. Tiles so small that others hold the anchor.
    for name in TILINGS:
        monkeypatch.setitem(TILINGS, name, {16: Tiling(16, 16, 4, 2)})
    world = World([1, *others], 16, 0.025, dtype)
    unit_MD = -torch.eye(16)[:1].repeat(2 * sum(world.images_R), 1)
    unit_MD[0] *= -1
    world.set_rows(unit_MD, dtype)
    check(run(world, online), oracle(world), world)


@pytest.mark.parametrize("online", [False, True])
def test_a_part_of_a_huge_batch_keeps_its_bits(online):
    # 30 million keys elsewhere: W is about 1e-7, below what float16 holds without a scale.
    world = World([30], 16, dtype=HALF)
    rows, keys, bound = world.keys_MD[:20], world.keys_MD[20:], world.bound(online)
    z_N, z_M = torch.rand(20) * 1e7 + 1e7, torch.rand(40) * 1e7 + 1e7
    s_NM = rows.double() @ keys.double().T - 1 / world.temperature
    truth = (s_NM.exp() * (1 / z_N.double()[:, None] + 1 / z_M.double())) @ keys.double()
    stat_N, stat_M = (z.log() + 1 / world.temperature if online else z for z in (z_N, z_M))
    assert relative(gradient(rows, stat_N, keys, stat_M, -1, bound), truth) <= ERROR[HALF]


@pytest.mark.parametrize("online", [False, True])
def test_duplicates_and_zero_rows(online):
    world = World([6], 8, 0.1)
    unit_MD = world.unit_MD.clone()
    unit_MD[1], unit_MD[7], unit_MD[2], unit_MD[4] = unit_MD[0], unit_MD[6], 0, 0
    world.set_rows(unit_MD)
    check(run(world, online), oracle(world), world)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_nan_is_never_hidden(dtype, online):
    world = World([40], 16, dtype=dtype)
    world.keys_MD[33, 3] = math.nan
    found = run(world, online)
    for tensor in (found.lse, found.gradient):
        assert tensor.isnan().all(), "every anchor has it among its keys"
    other_view = world.view_M == 1
    assert found.ranking[other_view].isnan().all()


@pytest.mark.parametrize("online", [False, True])
def test_infinity_is_never_hidden(online):
    world = World([8], 16)
    world.keys_MD[5] = math.inf
    found = run(world, online)
    assert not found.lse[5].isfinite() and not found.gradient[5].isfinite().any()


@pytest.mark.parametrize("online", [False, True])
def test_twice_is_bitwise_the_same(online):
    world = World([150], 32, dtype=HALF)
    for first, second in zip(run(world, online), run(world, online), strict=True):
        assert torch.equal(first, second)


def test_rows_are_prepared():
    rows_ND = torch.randn(6, 100, dtype=torch.bfloat16).T[:20]
    prepared = prepare(rows_ND)
    assert prepared.shape == (20, 16) and prepared.is_contiguous() and prepared.dtype == HALF
    assert torch.equal(prepared[:, :6], rows_ND.half()) and prepared[:, 6:].eq(0).all()
    assert [prepare(torch.zeros(2, d)).shape[1] for d in (1, 16, 17, 512)] == [16, 16, 32, 512]
    with pytest.raises(ValueError, match="513 columns and the kernels hold 512"):
        prepare(torch.zeros(2, 513))
    with pytest.raises(ValueError, match=r"not torch\.bfloat16"):
        prepare(torch.zeros(2, 4), torch.bfloat16)
