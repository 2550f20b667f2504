"""Batched augmentation with torch and Kornia's functions, on CPU or CUDA.

Kornia's random classes draw one jitter order per batch and other laws than the paper; only its
functions are used, with the policy's numbers. Which rows take which step is known on the host, so
nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from kornia import color, enhance, filters

from pipelines.decode import Pixels
from pipelines.policy import SimCLRPolicy, ViewParams

CHUNK_PIXELS = 2**19  # on a CPU: their floats stay in the cores' caches, a fifth less time
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_STEPS: tuple[Step, ...] = (
    enhance.adjust_brightness_accumulative,
    enhance.adjust_contrast_with_mean_subtraction,
    enhance.adjust_saturation_with_gray_subtraction,
    lambda x, turns: _hue(x, turns),
    lambda x, shift: (x + shift[:, None, None, None]).clamp_(0, 1),
)
_GRAY = (0.299, 0.587, 0.114)


@torch.inference_mode()
def augment(
    images: Sequence[Pixels],
    params: ViewParams,
    policy: SimCLRPolicy,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> torch.Tensor:
    """Apply drawn numbers to images; the same pixels as the reference up to rounding.

    Args:
        images: n source images, uint8 (H, W, 3); those of one size are handled together.
        params: Numbers of n views.
        policy: Gives the size and the taps of the blur.
        device: Where the work is done and the result lies.

    Returns:
        uint8 (n, size, size, 3).
    """
    few = max(CHUNK_PIXELS // policy.size**2, 1) if device.type == "cpu" else len(images)
    chunks = [slice(first, first + few) for first in range(0, len(images), few)]
    return torch.cat([_augment(images[rows], params[rows], policy, device) for rows in chunks])


def _augment(
    images: Sequence[Pixels], params: ViewParams, policy: SimCLRPolicy, device: torch.device
) -> torch.Tensor:
    x_NCHW = torch.empty(len(images), 3, policy.size, policy.size, device=device)
    for rows in _rows_by_size(images):
        source_NHWC = np.stack([images[i] for i in rows])
        boxes_N4 = params.box_N4[rows]
        x_NCHW[torch.from_numpy(rows).to(device)] = _crop_resize(
            torch.from_numpy(source_NHWC).to(device), boxes_N4, policy.size
        )
    return _finish(_on_rows(x_NCHW, params.flip_N, lambda x, _: x.flip(-1)), params, policy)


@torch.inference_mode()
def finish(crop_NHWC: torch.Tensor, params: ViewParams, policy: SimCLRPolicy) -> torch.Tensor:
    """Do what comes after crop, resize and flip: jitter, grayscale and blur, where the crops lie.

    Args:
        crop_NHWC: uint8 (n, size, size, 3).
        params: Numbers of n views.
        policy: Gives the taps of the blur.

    Returns:
        uint8 (n, size, size, 3).
    """
    return _finish(crop_NHWC.permute(0, 3, 1, 2).float(), params, policy)


def _finish(x_NCHW: torch.Tensor, params: ViewParams, policy: SimCLRPolicy) -> torch.Tensor:
    """Colours and blur of levels as float, which are overwritten; see :func:`finish`."""
    x_NCHW = _round(_color(x_NCHW.div_(255), params))
    if policy.blur_taps > 1:
        sigma_N = _to(params.sigma_N, x_NCHW)
        x_NCHW = _on_rows(
            x_NCHW,
            params.blur_N,
            lambda x, i: _round(_blur(x, policy.blur_taps, sigma_N[i])),
        )
    return x_NCHW.mul_(255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _rows_by_size(images: Sequence[Pixels]) -> list[npt.NDArray[np.int64]]:
    """Group the images that can be stacked."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        rows.setdefault(image.shape, []).append(i)
    return [np.array(group) for group in rows.values()]


def _on_rows(
    x_NCHW: torch.Tensor,
    mask_N: npt.NDArray[np.bool_],
    step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Replace the masked rows, in place; ``step`` gets them and their indices."""
    rows = np.flatnonzero(mask_N)
    if len(rows):
        index = torch.from_numpy(rows).to(x_NCHW.device)
        x_NCHW[index] = step(x_NCHW[index], index)
    return x_NCHW


def _color(x_NCHW: torch.Tensor, params: ViewParams) -> torch.Tensor:
    """Jitter each image in its own order, then drop the colour where drawn; 0..1 in and out."""
    factors_N4 = _to(params.factors_N4, x_NCHW)
    for slot in range(4):
        for number, step in enumerate(_STEPS):
            x_NCHW = _on_rows(
                x_NCHW,
                params.jitter_N & (params.order_N4[:, slot] == number),
                lambda x, i, step=step, column=number % 4: step(x, factors_N4[i, column]),
            )
    weights = torch.tensor(_GRAY, device=x_NCHW.device)[:, None, None]
    return _on_rows(
        x_NCHW, params.gray_N, lambda x, _: (x * weights).sum(1, keepdim=True).expand_as(x)
    )


def _hue(x_NCHW: torch.Tensor, turns_N: torch.Tensor) -> torch.Tensor:
    """Turn the hue: Kornia's ``adjust_hue``, with another way back from HSV of half the time.

    A channel is the value less the chroma times a trapezoid of the hue. Kornia's way back chooses
    each channel among six by 15 selections.
    """
    hue_NHW, saturation_NHW, value_NHW = color.rgb_to_hsv(x_NCHW).unbind(1)
    sixths_NHW = hue_NHW.mul_(3 / math.pi).add_(6 * turns_N[:, None, None])
    chroma_NHW = saturation_NHW.mul_(value_NHW)
    out_NCHW = torch.empty_like(x_NCHW)
    for channel, offset in enumerate((5, 3, 1)):
        place = sixths_NHW + offset
        place -= (place / 6).floor_().mul_(6)
        share = torch.minimum(place, 4 - place).clamp_(0, 1)
        torch.sub(value_NHW, share.mul_(chroma_NHW), out=out_NCHW[:, channel])
    return out_NCHW


def _blur(x_NCHW: torch.Tensor, taps: int, sigma_N: torch.Tensor) -> torch.Tensor:
    """Blur each image with its own Gaussian, reflected at the border.

    As Kornia's ``gaussian_blur2d``, whose convolutions take five times as long on a CPU as a
    matrix product for each axis.
    """
    kernel_NT = filters.get_gaussian_kernel1d(taps, sigma_N[:, None])
    size = x_NCHW.shape[-1]
    near_ST = torch.arange(size)[:, None] + torch.arange(taps) - taps // 2
    near_ST = (size - 1 - (size - 1 - near_ST.abs()).abs()).to(x_NCHW.device)
    shape = (len(kernel_NT), size, taps)
    matrix_NSS = x_NCHW.new_zeros(len(kernel_NT), size, size).scatter_add_(
        2, near_ST.expand(shape), kernel_NT[:, None].expand(shape)
    )
    across = x_NCHW.flatten(1, 2) @ matrix_NSS.mT
    return matrix_NSS[:, None] @ across.view(x_NCHW.shape)


def _crop_resize(
    source_NHWC: torch.Tensor, boxes_N4: npt.NDArray[np.int32], size: int
) -> torch.Tensor:
    """Crop, then resize with Pillow's antialiased bicubic; float 0..255 (n, 3, size, size).

    Each axis is one small matrix per image, so that a batch of different boxes is two matrix
    products. Rounded after each pass, horizontal first, halves up, as in Pillow.
    """
    n, num_rows, num_columns, _ = source_NHWC.shape
    x_NHCW = source_NHWC.permute(0, 1, 3, 2).float()  # so that both products are plain ones
    top, left, height, width = boxes_N4.T
    across = _to(_bicubic(left, width, num_columns, size), x_NHCW)
    down = _to(_bicubic(top, height, num_rows, size), x_NHCW)
    x = x_NHCW.reshape(n, num_rows * 3, num_columns) @ across.mT
    x = x.add_(0.5).floor_().clamp_(0, 255).view(n, num_rows, 3 * size)
    x = (down @ x).add_(0.5).floor_().clamp_(0, 255)
    return x.view(n, size, 3, size).permute(0, 2, 1, 3)


def _bicubic(
    start: npt.NDArray[np.int32], length: npt.NDArray[np.int32], num_in: int, num_out: int
) -> npt.NDArray[np.float32]:
    """Weights (n, num_out, num_in) that resample [start, start + length) to num_out samples.

    Keys' cubic with a = -0.5, widened by the scale when it shrinks, cut at the crop's border and
    renormalised, as in Pillow.
    """
    start_N11, length_N11 = (x[:, None, None].astype(np.int64) for x in (start, length))
    scale = length_N11 / num_out
    widening = np.maximum(scale, 1)
    centre = (np.arange(num_out)[None, :, None] + 0.5) * scale
    first = np.maximum(centre - 2 * widening + 0.5, 0).astype(np.int64)
    last = np.minimum(centre + 2 * widening + 0.5, length_N11).astype(np.int64)
    # Of the sources only those near an output are computed: as many for each, inside the image.
    taps = (last - first).max()
    place = np.minimum(first, num_in - start_N11 - taps) + np.arange(taps)
    t = np.abs((place + 0.5 - centre) / widening)
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    weights = np.where(t < 1, near, np.where(t < 2, far, 0))
    weights = np.where((place >= first) & (place < last), weights, 0)
    weights /= weights.sum(-1, keepdims=True)
    out = np.zeros((len(start), num_out, num_in), np.float32)
    np.put_along_axis(out, place + start_N11, weights.astype(np.float32), -1)
    return out


def _to(values: npt.NDArray[np.float32], like: torch.Tensor) -> torch.Tensor:
    """Move host numbers beside a tensor."""
    return torch.from_numpy(values).to(like.device)


def _round(x_NCHW: torch.Tensor) -> torch.Tensor:
    """Round to 8 bit in place, staying in 0..1."""
    return x_NCHW.mul_(255).round_().clamp_(0, 255).div_(255)
