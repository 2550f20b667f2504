"""NT-Xent, exact at any number of ranks (Chen et al. 2020, equation 1 and algorithm 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup

from fastclr.collectives import gather_rows, rank


def _unit_rows(z_ND: torch.Tensor) -> torch.Tensor:
    """L2-normalise in float32 (float64 stays): half precision flushes the eps to 0."""
    return F.normalize(z_ND if z_ND.dtype == torch.float64 else z_ND.float(), dim=1)


def _check(z0_BD: torch.Tensor, z1_BD: torch.Tensor, temperature: float) -> None:
    """Refuse what has no meaning, with the values."""
    if z0_BD.ndim != 2 or z0_BD.shape != z1_BD.shape or 0 in z0_BD.shape:
        raise ValueError(
            f"views are projected to {tuple(z0_BD.shape)} and {tuple(z1_BD.shape)}: row i of both "
            "must come from image i; give two tensors of one shape (B, D), B >= 1."
        )
    if not z0_BD.is_floating_point():
        raise ValueError(f"projections are {z0_BD.dtype}: give floating point.")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it divides similarities; give > 0.")


def nt_xent(
    z0_BD: torch.Tensor,
    z1_BD: torch.Tensor,
    *,
    temperature: float = 0.1,
    group: ProcessGroup | None = None,
) -> torch.Tensor:
    """Return the mean NT-Xent loss of this rank's 2B anchors, in nats.

    Every anchor sees the 2BR - 1 other rows of all R ranks, with gradient. Averaged over ranks
    (what DDP and DeepSpeed do to gradients) loss and gradient equal those of one process that
    holds all images. The loss is the paper's mean over 2N rows; the authors' TF code returns the
    sum of two means, twice this.

    Args:
        z0_BD: Projections of view 0, any floating dtype; need not be normalised.
        z1_BD: Projections of view 1; row i is the positive of row i of ``z0_BD``.
        temperature: Divides the cosine similarities.
        group: Ranks that share the contrastive batch; None for all. Every rank gives the same B.

    Returns:
        Scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: On unequal or empty shapes, integer input, or a temperature <= 0.
    """
    _check(z0_BD, z1_BD, temperature)
    with torch.autocast(z0_BD.device.type, enabled=False):  # bf16 logits: 2 % off the gradient
        u_ND = _unit_rows(torch.cat([z0_BD, z1_BD]))
        keys_MD = gather_rows(u_ND, group)
        num_rows = u_ND.shape[0]
        # Rank-major keys [z0_0 z1_0 z0_1 z1_1 ...]: our own rows start at rank * 2B, not at 0.
        self_N = torch.arange(num_rows, device=u_ND.device) + rank(group) * num_rows
        positive_N = self_N.roll(num_rows // 2)
        logits_NM = u_ND @ keys_MD.T / temperature
        # Masked before the exponential: subtracting exp(1/temperature) afterwards cancels.
        logits_NM = logits_NM.scatter(1, self_N[:, None], float("-inf"))
        return F.cross_entropy(logits_NM, positive_N)


@torch.no_grad()
def contrastive_accuracy(
    z0_BD: torch.Tensor, z1_BD: torch.Tensor, group: ProcessGroup | None = None
) -> torch.Tensor:
    """Return how often view 0 finds its image among the views 1 of the whole batch, 0..1.

    As in the authors' code: B * R candidates, the other views 0 left out; chance is 1 / (B * R).

    Args:
        z0_BD: Projections of view 0.
        z1_BD: Projections of view 1.
        group: Ranks that share the contrastive batch; None for all.

    Returns:
        Scalar float32: the mean over this rank's images.
    """
    u0_BD, u1_BD = _unit_rows(z0_BD), _unit_rows(z1_BD)
    keys_GD = gather_rows(u1_BD, group)
    own_B = torch.arange(len(u0_BD), device=u0_BD.device) + rank(group) * len(u0_BD)
    return (u0_BD @ keys_GD.T).argmax(1).eq(own_B).float().mean()


class NTXent(nn.Module):
    """:func:`nt_xent` as a module.

    Args:
        temperature: Divides the cosine similarities.
        group: Ranks that share the contrastive batch; None for all.
    """

    def __init__(self, temperature: float = 0.1, group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.temperature = temperature
        self.group = group

    def forward(self, z0_BD: torch.Tensor, z1_BD: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of this rank's anchors; see :func:`nt_xent`."""
        return nt_xent(z0_BD, z1_BD, temperature=self.temperature, group=self.group)
