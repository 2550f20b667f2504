"""Margin triplet loss, exact at any number of ranks (Chen et al. 2020, table 2)."""

from __future__ import annotations

import functools

import torch
from torch import nn
from typing_extensions import Unpack

from fastclr.kernels import reference
from fastclr.losses.contrastive import Options, Statistics, contrastive_loss


def margin_triplet(
    z0_BD: torch.Tensor,
    z1_BD: torch.Tensor,
    *,
    margin: float = 0.8,
    semi_hard: bool = False,
    **options: Unpack[Options],
) -> torch.Tensor:
    """Return the mean margin triplet loss of this rank's 2B anchors.

    For cosines s: mean over negatives of max(s_negative - s_positive + margin, 0).

    Args:
        z0_BD: Projections of view 0, any floating dtype; need not be normalised.
        z1_BD: Projections of view 1; row i is the positive of row i of ``z0_BD``.
        margin: In cosine, >= 0; the paper tried 0, 0.4, 0.8 and 1.6.
        semi_hard: Instead of the mean, the nearest negative farther than the positive (section
            5.1; beyond the margin it costs nothing); the farthest of all where none is.
        **options: See :class:`fastclr.losses.contrastive.Options`.

    Returns:
        Scalar; see :func:`fastclr.losses.nt_xent.nt_xent`, for errors too.

    Raises:
        ValueError: If the margin is negative.
    """
    if not margin >= 0:
        raise ValueError(f"margin is {margin}: it is a difference of cosines; give >= 0.")
    return contrastive_loss(
        z0_BD,
        z1_BD,
        "margin_triplet",
        functools.partial(reference.margin_triplet, margin=margin),
        margin=margin,
        semi_hard=semi_hard,
        **options,
    )


class MarginTriplet(nn.Module):
    """:func:`margin_triplet` as a module.

    Args:
        margin: In cosine.
        semi_hard: Whether to mine.
        **options: Of :func:`margin_triplet`.
    """

    def __init__(
        self, margin: float = 0.8, semi_hard: bool = False, **options: Unpack[Options]
    ) -> None:
        super().__init__()
        self.margin, self.semi_hard, self.options = margin, semi_hard, options

    def forward(
        self, z0_BD: torch.Tensor, z1_BD: torch.Tensor, statistics: Statistics | None = None
    ) -> torch.Tensor:
        """Return the mean loss of this rank's anchors; fill the statistics, if asked."""
        options: Options = {**self.options, "statistics": statistics}
        return margin_triplet(z0_BD, z1_BD, margin=self.margin, semi_hard=self.semi_hard, **options)
