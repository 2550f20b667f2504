"""Features of a data set: what the probes see."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn


class Features(NamedTuple):
    """Features of X images.

    Attributes:
        h_XF: float32.
        label_X: int64.
    """

    h_XF: npt.NDArray[np.float32]
    label_X: npt.NDArray[np.int64]


@torch.inference_mode()
def extract(
    encoder: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Features:
    """Run an encoder in evaluation mode (BatchNorm with running statistics) over a data set.

    Args:
        encoder: Maps float images (n, 3, H, W) in 0..1 to (n, F); left in evaluation mode.
        batches: uint8 images (n, 3, H, W) and int64 labels (n,).
        device: Where the encoder is.
    """
    encoder.eval()
    features, labels = [], []
    for images_NCHW, label_N in batches:
        h_NF = encoder(images_NCHW.to(device).float() / 255)
        features.append(h_NF.float().cpu().numpy())
        labels.append(label_N.numpy())
    return Features(np.concatenate(features), np.concatenate(labels))


class Pixels(nn.Module):
    """The encoder that encodes nothing: raw pixels as features."""

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Return (n, 3 * H * W)."""
        return images_NCHW.flatten(1)
