"""Distortions: pure functions of pixels and ids, and what their names say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats

from pipelines.distortions import DISTORTIONS, NOISE_STD

IDS = np.array([4, 0, 17])


@pytest.fixture(scope="module")
def images(picture: Any) -> torch.Tensor:
    """Three images; channels-last in memory, as an evaluation reads them."""
    stack = np.stack([picture(12, 16, k) for k in range(3)])
    return torch.from_numpy(stack).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", DISTORTIONS)
def test_they_are_pure(images: torch.Tensor, name: str) -> None:
    before = images.clone()
    torch.manual_seed(1)
    first = DISTORTIONS[name](images, IDS)
    torch.manual_seed(2)
    assert torch.equal(DISTORTIONS[name](images, IDS), first)
    assert first.dtype == torch.uint8 and torch.equal(images, before)
    # Each image alone, in any company.
    for k in (2, 0):
        assert torch.equal(DISTORTIONS[name](images[k : k + 1], IDS[k : k + 1])[0], first[k])
    sides = (16, 12) if name in ("rotated 90", "rotated 270") else (12, 16)
    assert first.shape == (3, 3, *sides)
    assert torch.equal(first, images) == (name == "original")


def test_grayscale_is_pillows(images: torch.Tensor) -> None:
    found = DISTORTIONS["grayscale"](images, IDS)
    for image_CHW, gray_CHW in zip(images, found, strict=True):
        wanted = Image.fromarray(image_CHW.permute(1, 2, 0).numpy()).convert("L")
        for channel in gray_CHW:
            assert np.abs(channel.numpy().astype(int) - np.asarray(wanted)).max() <= 1


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_turns_are_pillows(images: torch.Tensor, quarters: int) -> None:
    found = DISTORTIONS[f"rotated {90 * quarters}"](images, IDS)
    for image_CHW, turned_CHW in zip(images, found, strict=True):
        image = Image.fromarray(image_CHW.permute(1, 2, 0).numpy())
        wanted = np.asarray(image.rotate(90 * quarters, expand=True))
        np.testing.assert_array_equal(turned_CHW.permute(1, 2, 0).numpy(), wanted)


def test_sobel_is_scipys(images: torch.Tensor) -> None:
    found = DISTORTIONS["sobel"](images, IDS)
    for image_CHW, edges_CHW in zip(images.numpy().astype(float), found.numpy(), strict=True):
        for channel, edges in zip(image_CHW, edges_CHW, strict=True):
            across, down = (ndimage.sobel(channel, axis, mode="nearest") for axis in (0, 1))
            wanted = np.clip(np.hypot(across, down) / 4, 0, 255)
            assert np.abs(edges - wanted).max() <= 0.51


def test_noise_is_gaussian_and_of_the_id() -> None:
    gray = torch.full((2, 3, 60, 60), 128, dtype=torch.uint8)
    found = DISTORTIONS["noise"](gray, np.array([0, 1])).double() - 128
    for noise_CHW in found:
        assert abs(noise_CHW.mean()) < 1.5
        assert abs(noise_CHW.std() - 255 * NOISE_STD) < 1
        assert stats.kstest(noise_CHW.flatten().numpy() / (255 * NOISE_STD), "norm").pvalue > 0.001
    assert abs(np.corrcoef(found.flatten(1).numpy())[0, 1]) < 0.05
    channels = np.corrcoef(found[0].flatten(1).numpy())
    assert np.abs(channels - np.eye(3)).max() < 0.08
    swapped = DISTORTIONS["noise"](gray, np.array([1, 0])).double() - 128
    assert torch.equal(swapped.flip(0), found)


def test_nothing_is_distorted_to_nothing() -> None:
    for distort in DISTORTIONS.values():
        assert len(distort(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), np.zeros(0, np.int64))) == 0
