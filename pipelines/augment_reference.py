"""The oracle: PIL and torchvision functionals, one image after another. Slow and obvious."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image

from pipelines.decode import Pixels
from pipelines.policy import SimCLRPolicy, ViewParams


def _add(x_CHW: torch.Tensor, shift: float) -> torch.Tensor:
    return (x_CHW + shift).clamp(0, 1)


_STEPS = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue, _add)


def augment(
    images: Sequence[Pixels],
    params: ViewParams,
    policy: SimCLRPolicy,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> torch.Tensor:
    """Apply drawn numbers to images; what the policy's docstring means, step by step.

    Args:
        images: n source images, uint8 (H, W, 3) of any sizes.
        params: Numbers of n views.
        policy: Gives the size and the taps of the blur.
        device: Where the result goes; the work is done on the CPU.

    Returns:
        uint8 (n, size, size, 3).
    """
    views = [_augment(image, params, i, policy) for i, image in enumerate(images)]
    return torch.stack(views).to(device)


def _augment(image: Pixels, params: ViewParams, i: int, policy: SimCLRPolicy) -> torch.Tensor:
    """Make view i."""
    top, left, height, width = params.box_N4[i]
    crop = Image.fromarray(image[top : top + height, left : left + width])
    # Two calls: Pillow 13 takes the other pass first where the height shrinks much more.
    across = crop.resize((policy.size, height), Image.Resampling.BICUBIC)
    resized = across.resize((policy.size, policy.size), Image.Resampling.BICUBIC)
    x_CHW = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
    if params.flip_N[i]:
        x_CHW = TF.horizontal_flip(x_CHW)
    if params.jitter_N[i]:
        for step in params.order_N4[i]:
            x_CHW = _STEPS[step](x_CHW, float(params.factors_N4[i, step % 4]))
    if params.gray_N[i]:
        x_CHW = TF.rgb_to_grayscale(x_CHW, num_output_channels=3)
    x_CHW = _round(x_CHW)
    if params.blur_N[i] and policy.blur_taps > 1:
        sigma = float(params.sigma_N[i])
        x_CHW = _round(TF.gaussian_blur(x_CHW, [policy.blur_taps] * 2, [sigma, sigma]))
    return (x_CHW * 255).round().to(torch.uint8).permute(1, 2, 0)


def _round(x_CHW: torch.Tensor) -> torch.Tensor:
    """Round to 8 bit, staying in 0..1."""
    return (x_CHW * 255).round().clamp(0, 255) / 255
