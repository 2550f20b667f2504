"""What a representation may forget of an image: colour, direction, noise, all but edges; pure."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF

from pipelines.order import Int64, uniforms

NOISE_STD = 0.1  # of the range 0..1; the paper does not publish its own
_NOISE = 0x4E4F  # keeps the hash apart from those of samples and views

Distort = Callable[[torch.Tensor, Int64], torch.Tensor]


def _grayscale(images_NCHW: torch.Tensor, sample_ids: Int64) -> torch.Tensor:
    """Three equal channels of luminance, as the augmentation makes them."""
    return _bytes(TF.rgb_to_grayscale(images_NCHW / 255, num_output_channels=3))


def _noise(images_NCHW: torch.Tensor, sample_ids: Int64) -> torch.Tensor:
    """Add Gaussian noise of :data:`NOISE_STD`, independent for every value; a hash of the id."""
    noisy = []
    for image_CHW, sample_id in zip(images_NCHW, sample_ids.tolist(), strict=True):
        value = np.arange(image_CHW.numel())
        radius, angle = (uniforms(_NOISE, sample_id, k, value) for k in (0, 1))
        normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * math.pi * angle)  # Box & Muller 1958
        noisy.append(image_CHW / 255 + NOISE_STD * torch.from_numpy(normal).view_as(image_CHW))
    return _bytes(torch.stack(noisy)) if noisy else images_NCHW


def _sobel(images_NCHW: torch.Tensor, sample_ids: Int64) -> torch.Tensor:
    """Length of each channel's gradient by Sobel's filters, edges repeated; 1/4 of it, clipped."""
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
    filters = torch.stack([across, across.T]).unsqueeze(1)
    planes = F.pad(images_NCHW.flatten(0, 1).unsqueeze(1) / 255, (1, 1, 1, 1), mode="replicate")
    length = F.conv2d(planes, filters).square().sum(1).sqrt()
    return _bytes(length.view(images_NCHW.shape))


def _turn(quarters: int) -> Distort:
    """Turn anti-clockwise."""
    return lambda images_NCHW, _: torch.rot90(images_NCHW, quarters, (2, 3)).contiguous()


def _bytes(images_NCHW: torch.Tensor) -> torch.Tensor:
    """Round 0..1 to 8 bit."""
    return (images_NCHW * 255).round().clamp(0, 255).to(torch.uint8)


# name -> function of uint8 images (n, 3, H, W) and their ids (n,), which returns uint8 images of
# the same shape (sides change places in a quarter turn).
DISTORTIONS: dict[str, Distort] = {
    "original": lambda images_NCHW, _: images_NCHW,
    "grayscale": _grayscale,
    "rotated 90": _turn(1),
    "rotated 180": _turn(2),
    "rotated 270": _turn(3),
    "noise": _noise,
    "sobel": _sobel,
}
