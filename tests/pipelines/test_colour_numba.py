"""The colour kernel gives the reference's pixels, and the same bits however it is called."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from pipelines.augment_reference import augment as reference
from pipelines.colour_numba import TILE, colour
from pipelines.decode import Pixels
from pipelines.policy import SimCLRPolicy, ViewParams

Picture = Callable[..., Pixels]
Images = npt.NDArray[np.uint8]


def whole_crops(n: int, side: int, seed: int = 0) -> ViewParams:
    """Drawn numbers without crop, flip and blur; some views with jitter, some gray."""
    policy = SimCLRPolicy(
        size=side,
        crop_scale=(1, 1),
        crop_ratio=(1, 1),
        flip_prob=0,
        blur_prob=0,
        grayscale_prob=0.4,
    )
    sizes_N2 = np.full((n, 2), side, np.int32)
    params = policy.draw(seed=seed, epoch=0, positions=np.arange(n), view=0, sizes_N2=sizes_N2)
    assert 0 < params.jitter_N.sum() < n and 0 < params.gray_N.sum() < n
    return params


def expected(images: Images, params: ViewParams) -> Images:
    return reference(list(images), params, SimCLRPolicy(size=images.shape[1])).numpy()


def run(images: Images, params: ViewParams) -> Images:
    out = np.full_like(images, 77)
    colour(images, params, out)
    return out


@pytest.fixture(params=[8, 32, 75])
def images(request: pytest.FixtureRequest, picture: Picture) -> Images:
    """Images of less than a tile, of one, and of several with a rest."""
    side = request.param
    assert TILE > 8 * 8 and TILE == 32 * 32 and 75 * 75 % TILE == 505
    return np.stack([picture(side, side, k) for k in range(24)])


def test_views_equal_the_reference(images: Images) -> None:
    params = whole_crops(len(images), images.shape[1])
    difference = np.abs(run(images, params).astype(int) - expected(images, params))
    assert difference.mean() < 2e-4 and difference.max() <= 2


def test_every_order_equals_the_reference(picture: Picture) -> None:
    from pipelines.policy import _ORDERS

    images = np.stack([picture(16, 16, k) for k in range(24)])
    params = replace(
        whole_crops(24, 16),
        order_N4=_ORDERS,
        jitter_N=np.ones(24, bool),
        factors_N4=np.tile(np.float32([1.7, 0.5, 1.6, -0.15]), (24, 1)),
    )
    found = run(images, params)
    difference = np.abs(found.astype(int) - expected(images, params))
    assert difference.mean() < 1e-3 and difference.max() <= 2
    other = run(images, replace(params, order_N4=_ORDERS[::-1].copy()))
    assert np.abs(found.astype(int) - other).mean() > 1, "the order has no influence"


STEPS = {
    "none": (1, 1, 1, 0),
    "brightness": (1.75, 1, 1, 0),
    "darkness": (0, 1, 1, 0),
    "contrast": (1, 0.5, 1, 0),
    "no contrast": (1, 0, 1, 0),
    "saturation": (1, 1, 1.5, 0),
    "no saturation": (1, 1, 0, 0),
    "hue": (1, 1, 1, 0.1),
    "half a turn": (1, 1, 1, -0.5),
}


@pytest.mark.parametrize("step", STEPS)
def test_every_colour_by_each_step(step: str) -> None:
    """All corners, edges and grays of the cube among 32,768 colours."""
    levels = np.append(np.arange(0, 248, 8), 255)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).astype(np.uint8)
    images = cube.reshape(1, 128, 256, 3)
    images = np.concatenate([images[:, :, :128], images[:, :, 128:]])
    no = np.zeros(2, bool)
    params = replace(
        whole_crops(2 + 22, 128)[:2],
        jitter_N=~no,
        gray_N=no,
        factors_N4=np.float32([STEPS[step]] * 2),
    )
    found = run(images, params)
    difference = np.abs(found.astype(int) - expected(images, params))
    assert difference.max() <= 1 and difference.mean() < 1e-3
    if step == "none":
        assert np.array_equal(found, images)


def test_additive_brightness_is_the_references(images: Images) -> None:
    n = len(images)
    shift = np.linspace(-0.9, 0.9, n, dtype=np.float32)
    params = replace(
        whole_crops(n, images.shape[1]),
        jitter_N=np.ones(n, bool),
        gray_N=np.zeros(n, bool),
        order_N4=np.uint8([[1, 2, 4, 3]] * n),
        factors_N4=np.stack([shift, *np.float32([[1] * n, [1] * n, [0] * n])], 1),
    )
    found = run(images, params)
    added = (np.float32(images) / np.float32(255) + shift[:, None, None, None]).clip(0, 1)
    assert np.abs(found - np.rint(added * np.float32(255))).max() <= 1
    assert (np.abs(found.astype(int) - expected(images, params)) <= 1).all()


def test_flat_images_stay_flat() -> None:
    images = np.repeat(np.arange(0, 256, dtype=np.uint8)[::11, None, None, None], 20 * 20 * 3)
    images = images.reshape(24, 20, 20, 3)
    found = run(images, whole_crops(24, 20))
    assert (found == found[:, :1, :1, :1]).all()


def test_each_image_has_its_bits_alone_in_a_batch_and_permuted(images: Images) -> None:
    params = whole_crops(len(images), images.shape[1])
    whole = run(images, params)
    assert np.array_equal(whole, run(images, params))
    for i in range(len(images)):
        assert np.array_equal(run(images[i : i + 1], params[i : i + 1])[0], whole[i])
    other = np.random.default_rng(0).permutation(len(images))
    assert np.array_equal(run(images[other], params[other]), whole[other])


def test_many_threads_at_once_change_nothing(images: Images) -> None:
    params = whole_crops(len(images), images.shape[1])
    whole = run(images, params)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: run(images, params), range(40)):
            assert np.array_equal(found, whole)


def test_in_place(images: Images) -> None:
    params = whole_crops(len(images), images.shape[1])
    whole = run(images, params)
    colour(images, params, images)
    assert np.array_equal(images, whole)


def test_the_crops_stay_as_they_are_and_may_be_read_only(images: Images) -> None:
    kept = images.copy()
    images.flags.writeable = False
    run(images, whole_crops(len(images), images.shape[1]))
    assert np.array_equal(images, kept)


def test_no_images() -> None:
    empty = np.empty((0, 8, 8, 3), np.uint8)
    assert run(empty, whole_crops(24, 8)[:0]).shape == (0, 8, 8, 3)


@pytest.mark.parametrize(
    ("crops", "out"),
    [
        (np.zeros((24, 8, 8, 3), np.float32), np.zeros((24, 8, 8, 3), np.uint8)),
        (np.zeros((24, 8, 8, 3), np.uint8), np.zeros((24, 8, 9, 3), np.uint8)),
        (np.zeros((24, 3, 8, 8), np.uint8).transpose(0, 2, 3, 1), np.zeros((24, 8, 8, 3), "u1")),
        (np.zeros((23, 8, 8, 3), np.uint8), np.zeros((23, 8, 8, 3), np.uint8)),
        (np.zeros((24, 8, 8, 4), np.uint8), np.zeros((24, 8, 8, 4), np.uint8)),
    ],
)
def test_what_does_not_fit_is_refused(crops: Images, out: Images) -> None:
    with pytest.raises(ValueError, match=r"give uint8 NHWC|do not belong together"):
        colour(crops, whole_crops(24, 8), out)
