"""NT-Xent, exact at any number of ranks (Chen et al. 2020, equation 1 and algorithm 1)."""

from __future__ import annotations

import torch
from torch import nn
from typing_extensions import Unpack

from fastclr.kernels import reference
from fastclr.losses.contrastive import Options, Statistics, contrastive_loss


def nt_xent(
    z0_BD: torch.Tensor,
    z1_BD: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 0.1,
    normalize: bool = True,
    **options: Unpack[Options],
) -> torch.Tensor:
    """Return the mean NT-Xent loss of this rank's 2B anchors, in nats.

    Every anchor sees the other rows of all ranks, with gradient. Averaged over ranks (what DDP and
    DeepSpeed do to gradients) loss and gradient equal those of one process that holds all images;
    ranks with fewer images, or none, count for less. The loss is the paper's mean over 2N rows; the
    authors' TF code returns the sum of two means, twice this.

    Args:
        z0_BD: Projections of view 0, any floating dtype; need not be normalised.
        z1_BD: Projections of view 1; row i is the positive of row i of ``z0_BD``.
        temperature: Divides the similarities. A scalar tensor gets its exact gradient, averaged
            over ranks like any parameter's; the host does not read it, so it is not checked.
        normalize: False takes dot products for cosines, the paper's "without l2 norm" (table 5).
        **options: See :class:`fastclr.losses.contrastive.Options`.

    Returns:
        Scalar, float32 (float64 for float64 input). An infinite projection gives NaN, in the loss
        and in the gradient; a row of zeros has similarity 0 to all and gets no gradient.

    Raises:
        ValueError: On unequal shapes, integer input, a temperature <= 0, or one image in the world.
        KernelUnavailable: If ``impl`` names what cannot run here.
    """
    return contrastive_loss(
        z0_BD,
        z1_BD,
        "nt_xent",
        reference.nt_xent,
        temperature=temperature,
        normalize=normalize,
        **options,
    )


class NTXent(nn.Module):
    """:func:`nt_xent` as a module.

    Args:
        temperature: Divides the similarities; an ``nn.Parameter`` is learned, if an optimizer is
            given it.
        normalize: Whether similarities are cosines.
        **options: Of :func:`nt_xent`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.1,
        normalize: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        self.temperature, self.normalize, self.options = temperature, normalize, options

    def forward(
        self, z0_BD: torch.Tensor, z1_BD: torch.Tensor, statistics: Statistics | None = None
    ) -> torch.Tensor:
        """Return the mean loss of this rank's anchors; fill the statistics, if asked."""
        options: Options = {**self.options, "statistics": statistics}
        return nt_xent(
            z0_BD, z1_BD, temperature=self.temperature, normalize=self.normalize, **options
        )
