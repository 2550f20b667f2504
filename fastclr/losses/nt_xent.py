"""NT-Xent, exact at any number of ranks (Chen et al. 2020, equation 1 and algorithm 1)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup

from fastclr.collectives import gather_rows, rank
from fastclr.kernels import blocked, reference

IMPLEMENTATIONS = ("auto", "reference", "blocked")


def _unit_rows(z_ND: torch.Tensor) -> torch.Tensor:
    """L2-normalise in float32 (float64 stays): half precision flushes the eps to 0."""
    return F.normalize(z_ND if z_ND.dtype == torch.float64 else z_ND.float(), dim=1)


def _check(z0_BD: torch.Tensor, z1_BD: torch.Tensor, temperature: float, impl: str) -> None:
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
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r} is unknown: choose from {', '.join(IMPLEMENTATIONS)}.")


def choose_implementation(dtype: torch.dtype, temperature: float) -> tuple[str, str]:
    """Return what ``impl="auto"`` takes, and why.

    Args:
        dtype: Of the normalised rows: float32, or float64 for float64 input.
        temperature: Divides the cosine similarities.
    """
    lowest = blocked.LOWEST_TEMPERATURE[dtype]
    if temperature < lowest:
        return "reference", f"temperature {temperature} is below blocked's {lowest} in {dtype}"
    return "blocked", "no matrix is kept, and the gradient needs no collective"


def nt_xent(
    z0_BD: torch.Tensor,
    z1_BD: torch.Tensor,
    *,
    temperature: float = 0.1,
    group: ProcessGroup | None = None,
    impl: str = "auto",
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
        impl: ``reference`` (dense, O(M^2) memory), ``blocked`` (O(M D) memory; the gradient is
            complete on each rank without a collective in the backward, given that all ranks scale
            their loss alike), or ``auto``, see :func:`choose_implementation`.

    Returns:
        Scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: On unequal or empty shapes, integer input, a temperature <= 0, or one below
            what ``blocked`` was explicitly asked for can hold.
    """
    _check(z0_BD, z1_BD, temperature, impl)
    with torch.autocast(z0_BD.device.type, enabled=False):  # bf16 logits: 2 % off the gradient
        u_ND = _unit_rows(torch.cat([z0_BD, z1_BD]))
        best, reason = choose_implementation(u_ND.dtype, temperature)
        if impl == "blocked" and best != "blocked":
            raise ValueError(f"{reason}: use impl='auto' or 'reference'.")
        if (best if impl == "auto" else impl) == "blocked":
            return _BlockedNTXent.apply(u_ND, temperature, group)
        # Rank-major keys [z0_0 z1_0 z0_1 z1_1 ...]: our own rows start at rank * 2B, not at 0.
        first = rank(group) * len(u_ND)
        return reference.nt_xent(u_ND, gather_rows(u_ND, group), first, temperature)


class _BlockedNTXent(torch.autograd.Function):
    """Loss and gradient of unit rows from :mod:`fastclr.kernels.blocked`."""

    @staticmethod
    def forward(
        ctx: Any, u_ND: torch.Tensor, temperature: float, group: ProcessGroup | None
    ) -> torch.Tensor:
        keys_MD = gather_rows(u_ND, group)
        first = rank(group) * len(u_ND)
        sum_N = blocked.row_sums(u_ND, keys_MD, first, temperature)
        # With Z of all ranks each computes its complete gradient: the backward has no collective.
        ctx.save_for_backward(u_ND, keys_MD, gather_rows(sum_N, group))
        ctx.first, ctx.temperature = first, temperature
        positive_N = (u_ND * u_ND.roll(len(u_ND) // 2, 0)).sum(1)
        return (sum_N.log() + (1 - positive_N) / temperature).mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        u_ND, keys_MD, sum_M = ctx.saved_tensors
        grad_ND = blocked.gradient(u_ND, keys_MD, ctx.first, ctx.temperature, sum_M)
        return grad_ND.mul_(grad_outputs[0] / (len(u_ND) * ctx.temperature)), None, None


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
        impl: Implementation.
    """

    def __init__(
        self, temperature: float = 0.1, group: ProcessGroup | None = None, impl: str = "auto"
    ) -> None:
        super().__init__()
        self.temperature, self.group, self.impl = temperature, group, impl

    def forward(self, z0_BD: torch.Tensor, z1_BD: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of this rank's anchors; see :func:`nt_xent`."""
        return nt_xent(z0_BD, z1_BD, temperature=self.temperature, group=self.group, impl=self.impl)
