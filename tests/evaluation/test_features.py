"""Features: all images, in order, in evaluation mode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastclr.evaluation.features import Pixels, extract


def batches(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of random images with labels that count."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(sum(sizes)).split(sizes)
    shape = (3, 4, 4)
    return [
        (torch.randint(0, 256, (len(y), *shape), dtype=torch.uint8, generator=generator), y)
        for y in labels
    ]


def test_pixels_are_the_images_over_255():
    parts = batches(4, 4, 3)
    h_XF, label_X = extract(Pixels(), parts)
    images = torch.cat([images for images, _ in parts])
    assert (h_XF.shape, h_XF.dtype) == ((11, 48), np.float32)
    np.testing.assert_allclose(h_XF, images.flatten(1).numpy() / 255, rtol=1e-6)
    assert label_X.dtype == np.int64
    np.testing.assert_array_equal(label_X, np.arange(11))


def test_the_encoder_is_in_evaluation_mode_and_unchanged():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout(), nn.Flatten())
    encoder(torch.rand(8, 3, 4, 4))  # running statistics that are not the first ones
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    once, batched = extract(encoder, batches(9)), extract(encoder, batches(9))
    np.testing.assert_array_equal(once.h_XF, batched.h_XF)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert not encoder.training


def test_features_do_not_depend_on_the_batches():
    encoder = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 6))
    images, labels = batches(9)[0]
    parts = list(zip(images.split(2), labels.split(2), strict=True))
    np.testing.assert_allclose(
        extract(encoder, [(images, labels)]).h_XF, extract(encoder, parts).h_XF, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_features_are_single_precision(dtype):
    class Cast(Pixels):
        def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
            return super().forward(images_NCHW).to(dtype)

    assert extract(Cast(), batches(2)).h_XF.dtype == np.float32
