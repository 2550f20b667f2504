"""The policy's numbers: their laws, their fixed slots, boxes inside images."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastclr.config import ConfigError
from pipelines.policy import ADDITION, BRIGHTNESS, HUE, SimCLRPolicy, ViewParams

N = 20_000


def draw(policy: SimCLRPolicy, n: int, size: tuple[int, int], **where: int) -> ViewParams:
    at = {"seed": 0, "epoch": 0, "view": 0, **where}
    return policy.draw(**at, positions=np.arange(n), sizes_N2=np.array([size] * n, np.int32))


def equal(a: ViewParams, b: ViewParams) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


@pytest.fixture(scope="module")
def drawn() -> ViewParams:
    return draw(SimCLRPolicy(), N, (1000, 1000), seed=11, view=1)


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    """Range, mean and variance of U(low, high), to five standard errors."""
    u = (values.astype(np.float64) - low) / (high - low)
    assert u.min() >= -1e-6 and u.max() <= 1 + 1e-6
    assert abs(u.mean() - 0.5) < 5 / np.sqrt(12 * len(u))
    assert abs(12 * u.var() - 1) < 5 * np.sqrt(0.8 / len(u))


@pytest.mark.parametrize(
    ("name", "probability"), [("flip_N", 0.5), ("jitter_N", 0.8), ("gray_N", 0.2), ("blur_N", 0.5)]
)
def test_probabilities(drawn: ViewParams, name: str, probability: float) -> None:
    error = np.sqrt(probability * (1 - probability) / N)
    assert abs(getattr(drawn, name).mean() - probability) < 5 * error


def test_decisions_are_independent(drawn: ViewParams) -> None:
    decisions = np.stack([drawn.flip_N, drawn.jitter_N, drawn.gray_N, drawn.blur_N])
    assert abs(np.corrcoef(decisions) - np.eye(4)).max() < 5 / np.sqrt(N)


def test_colour_factors_and_sigma_are_uniform(drawn: ViewParams) -> None:
    for k, (low, high) in enumerate([(0.2, 1.8)] * 3 + [(-0.2, 0.2)]):
        assert_uniform(drawn.factors_N4[:, k], low, high)
    assert_uniform(drawn.sigma_N, 0.1, 2.0)


def test_all_24_orders_are_equally_likely(drawn: ViewParams) -> None:
    assert (np.sort(drawn.order_N4, 1) == np.arange(4)).all()
    counts = np.unique(drawn.order_N4, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - N / 24) ** 2 / (N / 24)).sum() < 23 + 5 * np.sqrt(2 * 23)


def test_crop_area_ratio_and_place() -> None:
    # Areas of at most a half always fit at the first try, so that the laws are not conditioned.
    policy = SimCLRPolicy(crop_scale=(0.08, 0.5))
    top, left, height, width = draw(policy, N, (2000, 2000)).box_N4.T.astype(np.float64)
    # Sides are whole pixels: a share of 1e-3 of the smallest side.
    assert_uniform(np.clip(height * width / 4e6, 0.08, 0.5), 0.08, 0.5)
    assert_uniform(
        np.clip(np.log(width / height), *np.log([3 / 4, 4 / 3])), *np.log([3 / 4, 4 / 3])
    )
    assert_uniform((top + 0.5) / (2000 - height + 1), 0, 1)
    assert_uniform((left + 0.5) / (2000 - width + 1), 0, 1)


def test_crops_follow_torchvision() -> None:
    """Compare the moments with torchvision's own draws on an image where tries do fail."""
    import torch
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    blank = torch.empty(1, 60, 200)
    theirs = np.array(
        [RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    )
    ours = draw(SimCLRPolicy(), 4000, (60, 200)).box_N4
    error = np.sqrt((ours.var(0) + theirs.var(0)) / 4000)
    assert (abs(ours.mean(0) - theirs.mean(0)) < 5 * error).all()
    assert (abs(ours.std(0) / theirs.std(0) - 1) < 0.1).all()


@given(
    sizes=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=8),
    seed=st.integers(0, 2**63 - 1),
    low=st.floats(0.01, 1),
    ratio=st.floats(0.1, 1),
)
def test_boxes_lie_inside_any_image(
    sizes: list[tuple[int, int]], seed: int, low: float, ratio: float
) -> None:
    sizes_N2 = np.array([*sizes, (1, 1), (1, 5000), (5000, 1)], np.int32)
    policy = SimCLRPolicy(crop_scale=(low, 1.0), crop_ratio=(ratio, 1 / ratio))
    params = policy.draw(
        seed=seed, epoch=0, positions=np.arange(len(sizes_N2)), view=0, sizes_N2=sizes_N2
    )
    box = params.box_N4
    assert (box >= [0, 0, 1, 1]).all()
    assert (box[:, :2] + box[:, 2:] <= sizes_N2).all()


def test_after_ten_tries_the_largest_central_crop() -> None:
    # Nothing of these areas and ratios fits into a line, so that every draw falls back.
    wide = draw(SimCLRPolicy(crop_scale=(0.9, 1.0)), 50, (30, 300))
    assert (wide.box_N4 == [0, 130, 30, 40]).all()
    tall = draw(SimCLRPolicy(crop_scale=(0.9, 1.0)), 50, (300, 30))
    assert (tall.box_N4 == [130, 0, 40, 30]).all()


@given(
    position=st.integers(0, 2**40),
    others=st.lists(st.integers(0, 2**40), max_size=6),
    view=st.integers(0, 1),
)
def test_a_view_depends_on_its_position_alone(position: int, others: list[int], view: int) -> None:
    positions = np.array([*others, position, *others[::-1]])
    sizes = np.array([[30 + p % 50, 20 + p % 70] for p in positions.tolist()], np.int32)
    at = {"seed": 4, "epoch": 2, "view": view}
    batch = SimCLRPolicy().draw(**at, positions=positions, sizes_N2=sizes)
    place = slice(len(others), len(others) + 1)
    alone = SimCLRPolicy().draw(**at, positions=positions[place], sizes_N2=sizes[place])
    assert equal(batch[place], alone)
    shuffled = np.random.default_rng(0).permutation(len(positions))
    again = SimCLRPolicy().draw(**at, positions=positions[shuffled], sizes_N2=sizes[shuffled])
    assert equal(again, batch[shuffled])


@pytest.mark.parametrize("where", [{"seed": 1}, {"epoch": 1}, {"view": 1}])
def test_seed_epoch_and_view_change_every_number(where: dict[str, int]) -> None:
    a = draw(SimCLRPolicy(), 500, (200, 200))
    b = draw(SimCLRPolicy(), 500, (200, 200), **where)
    for f in fields(a):
        x, y = (getattr(p, f.name).astype(np.float64).ravel() for p in (a, b))
        assert not np.array_equal(x, y), f.name
    assert abs(np.corrcoef(a.sigma_N, b.sigma_N)[0, 1]) < 5 / np.sqrt(500)


def test_switching_an_operation_off_changes_no_other_number() -> None:
    a = draw(SimCLRPolicy(), 200, (90, 70))
    b = draw(SimCLRPolicy(blur_prob=0, flip_prob=0, color_strength=0.5), 200, (90, 70))
    for name in ("box_N4", "jitter_N", "order_N4", "gray_N", "sigma_N"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert not b.blur_N.any() and not b.flip_N.any()


def test_probabilities_0_and_1_are_never_and_always() -> None:
    off, on = ({f"{k}_prob": p for k in ("flip", "jitter", "grayscale", "blur")} for p in (0, 1))
    for settings, expected in ((off, False), (on, True)):
        params = draw(SimCLRPolicy(**settings), 1000, (9, 9))
        for name in ("flip_N", "jitter_N", "gray_N", "blur_N"):
            assert (getattr(params, name) == expected).all()


def test_colour_strength() -> None:
    none = draw(SimCLRPolicy(color_strength=0), 100, (9, 9)).factors_N4
    assert (none == [1, 1, 1, 0]).all()
    most = draw(SimCLRPolicy(color_strength=2.5), N, (9, 9)).factors_N4
    assert most[:, :HUE].min() >= 0 and abs(most[:, HUE]).max() <= 0.5
    assert_uniform(most[:, 0], 0, 3)  # torchvision cuts 1 - 2 at 0


def test_additive_brightness_changes_its_own_numbers_alone() -> None:
    a = draw(SimCLRPolicy(color_strength=0.5), N, (90, 70))
    b = draw(SimCLRPolicy(color_strength=0.5, brightness="additive"), N, (90, 70))
    assert_uniform(b.factors_N4[:, 0], -0.4, 0.4)
    np.testing.assert_allclose(a.factors_N4[:, 0], 1 + b.factors_N4[:, 0], atol=1e-6)
    assert np.array_equal(a.factors_N4[:, 1:], b.factors_N4[:, 1:])
    assert np.array_equal(a.order_N4, np.where(b.order_N4 == ADDITION, BRIGHTNESS, b.order_N4))
    assert (b.order_N4 != BRIGHTNESS).all() and b.order_N4.dtype == np.uint8
    for f in fields(a):
        if f.name not in ("factors_N4", "order_N4"):
            assert np.array_equal(getattr(a, f.name), getattr(b, f.name)), f.name


def test_images_can_share_a_sigma() -> None:
    a, b = (draw(SimCLRPolicy(blur_sigma_images=n), 64, (90, 70)) for n in (1, 16))
    for f in fields(a):
        if f.name != "sigma_N":
            assert np.array_equal(getattr(a, f.name), getattr(b, f.name)), f.name
    assert len(np.unique(a.sigma_N)) == 64
    assert (b.sigma_N.reshape(4, 16) == b.sigma_N[::16, None]).all()
    assert len(np.unique(b.sigma_N)) == 4
    assert np.array_equal(b.sigma_N[::16], a.sigma_N[:4])


def test_golden_numbers() -> None:
    """Old runs repeat only while these stay; a new operation appends its slots."""
    params = SimCLRPolicy().draw(
        seed=3,
        epoch=2,
        positions=np.array([0, 5]),
        view=1,
        sizes_N2=np.array([[224, 300], [32, 20]], np.int32),
    )
    assert params.box_N4.tolist() == [[18, 39, 197, 169], [7, 0, 16, 16]]
    assert params.order_N4.tolist() == [[1, 0, 3, 2], [3, 0, 2, 1]]
    assert params.flip_N.tolist() == [False, False]
    assert params.jitter_N.tolist() == [False, False]
    assert params.gray_N.tolist() == [False, True]
    assert params.blur_N.tolist() == [True, True]
    np.testing.assert_allclose(
        params.factors_N4,
        [
            [0.88265014, 0.97349072, 1.04763818, 0.16065876],
            [0.92634344, 0.36774635, 1.28004360, 0.13596664],
        ],
        rtol=1e-6,
    )
    np.testing.assert_allclose(params.sigma_N, [0.20691873, 1.11406612], rtol=1e-6)


def test_types(drawn: ViewParams) -> None:
    types = {
        f.name: (getattr(drawn, f.name).dtype, getattr(drawn, f.name).shape) for f in fields(drawn)
    }
    assert types == {
        "box_N4": (np.int32, (N, 4)),
        "flip_N": (np.bool_, (N,)),
        "jitter_N": (np.bool_, (N,)),
        "factors_N4": (np.float32, (N, 4)),
        "order_N4": (np.uint8, (N, 4)),
        "gray_N": (np.bool_, (N,)),
        "blur_N": (np.bool_, (N,)),
        "sigma_N": (np.float32, (N,)),
    }
    assert len(drawn) == N


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flip_prob", -0.1),
        ("jitter_prob", 1.1),
        ("grayscale_prob", float("nan")),
        ("blur_prob", 2),
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.5, 0.2)),
        ("crop_scale", (0.5, 1.5)),
        ("crop_ratio", (-1.0, 1.0)),
        ("crop_ratio", (2.0, 1.0)),
        ("blur_sigma", (0.0, 1.0)),
        ("size", 7),
        ("color_strength", 2.6),
        ("color_strength", -0.1),
        ("brightness", "subtractive"),
        ("blur_sigma_images", 0),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"views.{name} "):
        SimCLRPolicy(**{name: value})


def test_matrices_cannot_add_brightness() -> None:
    with pytest.raises(ConfigError, match=r"views\.brightness is additive and .* affine"):
        SimCLRPolicy(brightness="additive", colour_model="affine")


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        SimCLRPolicy(size=1, blur_prob=3, color_strength=9)
    assert len(str(caught.value).splitlines()) == 3
