"""NT-Logistic, exact at any number of ranks (Chen et al. 2020, table 2)."""

from __future__ import annotations

import torch
from torch import nn
from typing_extensions import Unpack

from fastclr.kernels import reference
from fastclr.losses.contrastive import Options, Statistics, contrastive_loss


def nt_logistic(
    z0_BD: torch.Tensor,
    z1_BD: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 0.5,
    semi_hard: bool = False,
    **options: Unpack[Options],
) -> torch.Tensor:
    """Return the mean NT-Logistic loss of this rank's 2B anchors, in nats.

    For cosines s: softplus(-s_positive / t) + mean over negatives of softplus(s_negative / t). The
    paper writes one negative and leaves open how many are combined, and no code was published: we
    take the mean, so that pull and push weigh the same at any batch size.

    Args:
        z0_BD: Projections of view 0, any floating dtype; need not be normalised.
        z1_BD: Projections of view 1; row i is the positive of row i of ``z0_BD``.
        temperature: Divides the cosines; the paper tried 0.1 to 1.
        semi_hard: Instead of the mean, the nearest negative farther than the positive (section
            5.1); the farthest of all where none is.
        **options: See :class:`fastclr.losses.contrastive.Options`.

    Returns:
        Scalar; see :func:`fastclr.losses.nt_xent.nt_xent`, for errors too.
    """
    return contrastive_loss(
        z0_BD,
        z1_BD,
        "nt_logistic",
        reference.nt_logistic,
        temperature=temperature,
        semi_hard=semi_hard,
        **options,
    )


class NTLogistic(nn.Module):
    """:func:`nt_logistic` as a module.

    Args:
        temperature: Divides the cosines.
        semi_hard: Whether to mine.
        **options: Of :func:`nt_logistic`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.5,
        semi_hard: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        self.temperature, self.semi_hard, self.options = temperature, semi_hard, options

    def forward(
        self, z0_BD: torch.Tensor, z1_BD: torch.Tensor, statistics: Statistics | None = None
    ) -> torch.Tensor:
        """Return the mean loss of this rank's anchors; fill the statistics, if asked."""
        options: Options = {**self.options, "statistics": statistics}
        return nt_logistic(
            z0_BD, z1_BD, temperature=self.temperature, semi_hard=self.semi_hard, **options
        )
