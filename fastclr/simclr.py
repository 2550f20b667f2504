"""The SimCLR model: encoder f, then projection head g."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from fastclr import encoders, heads
from fastclr.batch_norm import without_batch_norm
from fastclr.config import Config


class Output(NamedTuple):
    """What the model returns for N = views * B rows, view-major.

    Attributes:
        h_NF: Representations; what is kept.
        z_ND: Projections; what the loss sees.
    """

    h_NF: torch.Tensor
    z_ND: torch.Tensor


class SimCLR(nn.Module):
    """Encoder and projection head over both views at once.

    Both views go through the encoder as one batch: BatchNorm then sees them together, as in the
    authors' code.

    Args:
        encoder: Maps images (N, 3, H, W) in 0..1 to h (N, F).
        head: Maps h to z (N, D).
    """

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection_head = head

    @classmethod
    def from_config(cls, config: Config) -> SimCLR:
        """Build the model with weights that are a function of ``config.seed`` alone."""
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            encoder = encoders.from_config(config.encoder)
            model = cls(encoder, heads.from_config(config.head, encoder.feature_dim))
        if config.batch_norm == "none":
            without_batch_norm(model)
        return model

    def forward(self, views_VBCHW: torch.Tensor) -> Output:
        """Project uint8 views; 0..255 becomes 0..1 and nothing else, as in the authors' code."""
        images_NCHW = views_VBCHW.flatten(0, 1)
        dtype = next(self.parameters()).dtype
        h_NF = self.encoder(images_NCHW.to(dtype) / 255)
        return Output(h_NF, self.projection_head(h_NF))
