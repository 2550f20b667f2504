"""The blur gives the reference's pixels, and the same bits however it is called."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torchvision.transforms.v2.functional import gaussian_blur

from pipelines.blur_numba import blur
from pipelines.decode import Pixels
from pipelines.policy import SimCLRPolicy, ViewParams

Picture = Callable[..., Pixels]
Views = npt.NDArray[np.uint8]


def numbers(sigmas: list[float]) -> ViewParams:
    n = len(sigmas)
    policy = SimCLRPolicy(size=32)
    sizes_N2 = np.full((n, 2), 32, np.int32)
    params = policy.draw(seed=0, epoch=0, positions=np.arange(n), view=0, sizes_N2=sizes_N2)
    return replace(params, blur_N=np.ones(n, bool), sigma_N=np.array(sigmas, np.float32))


def run(views: Views, params: ViewParams, taps: int) -> Views:
    views = views.copy()
    blur(views, params, taps)
    return views


def expected(view: Pixels, sigma: float, taps: int) -> Pixels:
    x_CHW = torch.from_numpy(view).permute(2, 0, 1) / 255
    blurred = gaussian_blur(x_CHW, [taps] * 2, [sigma] * 2)
    return (blurred * 255).round().permute(1, 2, 0).to(torch.uint8).numpy()


SIGMAS = [0.1, 0.3, 0.5, 1.0, 1.4, 2.0, 5.0, 0.77]


@pytest.mark.parametrize(
    ("shape", "taps"),
    [((224, 224), 23), ((32, 32), 3), ((96, 96), 9), ((20, 6), 11), ((13, 50), 25), ((40, 41), 1)],
)
def test_views_equal_the_reference(picture: Picture, shape: tuple[int, int], taps: int) -> None:
    views = np.stack([picture(*shape, k) for k in range(len(SIGMAS))])
    views[3] = np.where(views[3] > 127, 255, 0)  # where the taps left out weigh most
    found = run(views, numbers(SIGMAS), taps)
    for view, blurred, sigma in zip(views, found, SIGMAS, strict=True):
        if taps == 1:
            assert np.array_equal(view, blurred)
            continue
        difference = np.abs(blurred.astype(int) - expected(view, sigma, taps))
        assert difference.max() <= 1 and difference.mean() < 0.01
        assert sigma < 0.3 or not np.array_equal(view, blurred)


def test_flat_views_stay_as_they_are() -> None:
    views = np.repeat(np.arange(256, dtype=np.uint8), 20 * 21 * 3).reshape(256, 20, 21, 3)
    sigmas = np.linspace(0.1, 3, 256).tolist()
    assert np.array_equal(run(views, numbers(sigmas), 19), views)


def test_only_the_chosen_are_blurred(picture: Picture) -> None:
    views = np.stack([picture(24, 24, k) for k in range(6)])
    chosen = np.array([True, False, True, True, False, False])
    params = replace(numbers([1.0] * 6), blur_N=chosen)
    found = run(views, params, 9)
    assert (found != views).any(axis=(1, 2, 3)).tolist() == chosen.tolist()


def test_channels_do_not_mix_and_borders_mirror() -> None:
    views = np.zeros((1, 21, 21, 3), np.uint8)
    views[0, 0, 0] = (255, 0, 0)
    (found,) = run(views, numbers([1.0]), 7)
    assert found[0, 0, 0] > 30 and not found[..., 1:].any()
    weights = np.exp(-0.5 * np.arange(-3, 4) ** 2.0)
    # Mirrored at the outermost pixel, which itself is not repeated.
    assert found[0, 0, 0] == round(255 * (weights[3] / weights.sum()) ** 2)


def test_each_view_has_its_bits_alone_in_a_batch_and_permuted(picture: Picture) -> None:
    views = np.stack([picture(50, 45, k) for k in range(len(SIGMAS))])
    params = numbers(SIGMAS)
    whole = run(views, params, 13)
    for i in range(len(views)):
        assert np.array_equal(run(views[i : i + 1], params[i : i + 1], 13)[0], whole[i])
    other = np.random.default_rng(0).permutation(len(views))
    assert np.array_equal(run(views[other], params[other], 13), whole[other])
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: run(views, params, 13), range(24)):
            assert np.array_equal(found, whole)


@pytest.mark.parametrize(
    ("views", "taps"),
    [
        (np.zeros((1, 20, 20, 3), np.float32), 3),
        (np.zeros((1, 3, 20, 20), np.uint8).transpose(0, 2, 3, 1), 3),
        (np.zeros((1, 20, 20, 4), np.uint8), 3),
        (np.zeros((1, 20, 20, 3), np.uint8), 41),
        (np.zeros((1, 20, 5, 3), np.uint8), 3),
        (np.zeros((2, 20, 20, 3), np.uint8), 3),
    ],
)
def test_what_does_not_fit_is_refused(views: Views, taps: int) -> None:
    with pytest.raises(ValueError, match=r"give uint8 NHWC|do not go together"):
        blur(views, numbers([1.0]), taps)
