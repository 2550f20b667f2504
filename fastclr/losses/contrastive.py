"""What the contrastive losses share: options, checks, choice of an implementation, ranks."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any, Literal, TypedDict

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from fastclr import collectives
from fastclr.kernels import KernelUnavailable, blocked, reference
from fastclr.kernels.tiles import Keys
from fastclr.losses.passes import contrast

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "reference", "blocked", "triton")
TRITON_LOWEST_TEMPERATURE = 0.025
TRITON_LARGEST_DIM = 512

Statistics = dict[str, torch.Tensor]


class Options(TypedDict, total=False):
    """Keyword arguments that every contrastive loss takes.

    Attributes:
        negatives: ``both`` views of all other images, or those of the ``other_view`` than the
            anchor's (Chen et al. 2020, appendix B.10).
        group: Ranks that share the contrastive batch; None, the default, for all.
        equal_ranks: Promise that every rank gives equally many rows. Otherwise they tell each
            other first, in a small all-gather that the host waits for.
        impl: ``reference`` (dense, O(M^2) memory), ``blocked`` (O(M D) memory, any device),
            ``triton`` (NT-Xent on a GPU; rows rounded to half precision: about 0.1 % of the
            gradient), or ``auto``; see :func:`choose_implementation`. A choice never falls back.
        exchange: ``gather`` all rows on each rank (no collective in the backward), or pass them
            round in a ``ring``, forward and again backward, holding those of two ranks at a time.
        grad_reduction: What is done to gradients over ranks afterwards: ``mean`` (DDP, DeepSpeed)
            or ``sum``. The loss of a rank is scaled so that this gives the whole batch's.
        statistics: A dictionary to fill, in the same pass, with float32 scalars:
            ``contrastive_accuracy`` (how often view 0 finds its image among all views 1; chance is
            1 / G), ``contrastive_entropy`` (of the softmax over the same G candidates, nats), and
            with semi-hard mining ``no_semi_hard`` (the fraction of anchors without such a
            negative). Reduced over ranks like the loss, they are those of the whole batch.
    """

    negatives: Literal["both", "other_view"]
    group: ProcessGroup | None
    equal_ranks: bool
    impl: Literal["auto", "reference", "blocked", "triton"]
    exchange: Literal["gather", "ring"]
    grad_reduction: Literal["mean", "sum"]
    statistics: Statistics | None


Reference = Callable[..., torch.Tensor]


def contrastive_loss(
    z0_BD: torch.Tensor,
    z1_BD: torch.Tensor,
    loss: str,
    dense: Reference,
    *,
    temperature: float | torch.Tensor = 1.0,
    normalize: bool = True,
    margin: float = 0.0,
    semi_hard: bool = False,
    negatives: str = "both",
    group: ProcessGroup | None = None,
    equal_ranks: bool = False,
    impl: str = "auto",
    exchange: str = "gather",
    grad_reduction: str = "mean",
    statistics: Statistics | None = None,
) -> torch.Tensor:
    """Return this rank's part of a contrastive loss over the images of all ranks.

    Args:
        z0_BD: Projections of view 0, any floating dtype.
        z1_BD: Projections of view 1; row i is the positive of row i of ``z0_BD``.
        loss: First word of a key of ``KERNELS``.
        dense: Its reference.
        temperature: Divides the similarities; a tensor is learnable and not read by the host.
        normalize: Whether similarities are cosines rather than dot products.
        margin: Of the triplet loss.
        semi_hard: Whether to mine.
        negatives: See :class:`Options`, like all that follow.
        group: Likewise.
        equal_ranks: Likewise.
        impl: Likewise.
        exchange: Likewise.
        grad_reduction: Likewise.
        statistics: Likewise.
    """
    _check_rows(z0_BD, z1_BD, temperature)
    for name, value, known in (
        ("negatives", negatives, ("both", "other_view")),
        ("impl", impl, IMPLEMENTATIONS),
        ("exchange", exchange, ("gather", "ring")),
        ("grad_reduction", grad_reduction, ("mean", "sum")),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r} is unknown: choose from {', '.join(known)}.")
    images_R, own = _images(z0_BD, group, equal_ranks), collectives.rank(group)
    other_view, num_images = negatives == "other_view", sum(images_R)
    with torch.autocast(z0_BD.device.type, enabled=False):  # bf16 logits: 2 % off the gradient
        rows_ND = _rows(torch.cat([z0_BD, z1_BD]), temperature, normalize)
        if impl == "reference" and exchange == "ring":
            raise ValueError("impl 'reference' compares all rows at once: use exchange='gather'.")
        if impl == "auto":
            impl, reason = choose_implementation(rows_ND, loss, normalize, other_view)
            if not torch.compiler.is_compiling():
                _log_once(impl, reason)
        elif impl == "triton" and (
            reason := triton_hindrance(rows_ND, loss, normalize, other_view)
        ):
            raise KernelUnavailable(f"impl='triton' cannot: {reason}. Use impl='auto'.")
        # Sums of the anchors of all ranks, as if each rank's sum were the same share of the mean.
        share = (len(images_R) if grad_reduction == "mean" else 1) / num_images
        if impl == "reference":
            counts = [2 * b for b in images_R]
            keys = Keys(collectives.gather_rows(rows_ND, counts, group), images_R, own)
            extra = {"semi_hard": True} if semi_hard else {}
            total = dense(rows_ND, keys, other_view=other_view, **extra).sum()
            sums = _dense_statistics(rows_ND, keys, other_view) if statistics is not None else None
        else:
            bound = _bound(temperature, normalize, impl, rows_ND.dtype)
            name = loss + " semi_hard" * semi_hard + " triton" * (impl == "triton")
            total, sums, *_ = contrast(
                rows_ND,
                rows_ND.new_full((), bound or 0.0),
                name,
                other_view,
                bound is not None,
                margin,
                images_R,
                own,
                _group_name(group),
                exchange == "ring" and len(images_R) > 1,
                statistics is not None,
            )
    if statistics is not None and sums is not None:
        right, entropy, fallbacks = (sums.detach() * share).unbind()
        statistics.update(contrastive_accuracy=right, contrastive_entropy=entropy)
        if semi_hard:
            statistics["no_semi_hard"] = fallbacks / 2
    return total * (share / 2)


def _check_rows(
    z0_BD: torch.Tensor, z1_BD: torch.Tensor, temperature: float | torch.Tensor
) -> None:
    """Refuse what has no meaning, with the values."""
    if z0_BD.ndim != 2 or z0_BD.shape != z1_BD.shape or z0_BD.shape[1] == 0:
        raise ValueError(
            f"views are projected to {tuple(z0_BD.shape)} and {tuple(z1_BD.shape)}: row i of both "
            "must come from image i; give two tensors of one shape (B, D)."
        )
    if not z0_BD.is_floating_point() or not z1_BD.is_floating_point():
        raise ValueError(
            f"projections are {z0_BD.dtype} and {z1_BD.dtype}: give floating point numbers."
        )
    if isinstance(temperature, torch.Tensor):
        if temperature.ndim:
            raise ValueError(f"temperature has shape {tuple(temperature.shape)}: give a scalar.")
    elif not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it divides similarities; give > 0.")


def _images(z_BD: torch.Tensor, group: ProcessGroup | None, equal_ranks: bool) -> list[int]:
    """Return how many images each rank has."""
    if equal_ranks or collectives.num_ranks(group) == 1:
        images_R, dims = [z_BD.shape[0]] * collectives.num_ranks(group), [z_BD.shape[1]]
    else:
        images_R, dims = map(list, zip(*collectives.shapes(z_BD, group), strict=True))
    if len(set(dims)) > 1:
        raise ValueError(f"ranks project to {dims} dimensions: give every rank the same.")
    if sum(images_R) < 2:
        raise ValueError(
            f"the contrastive batch has {sum(images_R)} images over all ranks: without another "
            "image there is no negative to contrast with; give at least 2."
        )
    return images_R


def _rows(z_ND: torch.Tensor, temperature: float | torch.Tensor, normalize: bool) -> torch.Tensor:
    """Return rows whose dot products are similarities / temperature, float32 or float64."""
    z_ND = z_ND if z_ND.dtype == torch.float64 else z_ND.float()
    # Half of the temperature on either side keeps the similarities exactly symmetric.
    learned = isinstance(temperature, torch.Tensor)
    length = 1.0 if learned else temperature**-0.5
    # A dot product with infinity may be infinite: NaN, like that of cosines, is one thing to catch.
    poison_N1 = 0 if normalize else 0 * z_ND.detach().sum(1, keepdim=True)
    rows_ND = _Directions.apply(z_ND, length) if normalize else z_ND * length + poison_N1
    return rows_ND * temperature.to(rows_ND.dtype).rsqrt() if learned else rows_ND


class _Directions(torch.autograd.Function):
    """Rows of one length: half the memory of autograd through a norm and a division.

    A row of zeros stays one and gets no gradient (dividing by an eps would give it a huge one); a
    row that is not finite, or whose norm is not, becomes NaN.
    """

    @staticmethod
    def forward(ctx: Any, z_ND: torch.Tensor, length: float) -> torch.Tensor:
        norm_N1 = torch.linalg.vector_norm(z_ND, dim=1, keepdim=True)
        factor_N1 = torch.where(norm_N1 > 1e-12, length / norm_N1, 0.0) + 0 * norm_N1
        rows_ND = z_ND * factor_N1
        ctx.save_for_backward(rows_ND, factor_N1)
        ctx.length = length
        return rows_ND

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_ND: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        rows_ND, factor_N1 = ctx.saved_tensors
        along_N1 = (rows_ND * grad_ND).sum(1, keepdim=True) / ctx.length**2
        return torch.addcmul(grad_ND, rows_ND, along_N1, value=-1).mul_(factor_N1), None


def triton_hindrance(
    rows_ND: torch.Tensor, loss: str, normalize: bool, other_view: bool
) -> str | None:
    """Return why the Triton kernels cannot compute a loss; None if they can."""
    if loss != "nt_xent" or other_view:
        return "it computes NT-Xent with the negatives of both views only"
    if not normalize:
        return "half-precision rows cannot hold similarities without a bound"
    if rows_ND.dtype == torch.float64:
        return "float64 would be rounded to half precision"
    if rows_ND.shape[1] > TRITON_LARGEST_DIM:
        return f"projections have {rows_ND.shape[1]} dimensions, more than {TRITON_LARGEST_DIM}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from fastclr.kernels import nt_xent as triton_kernels

    return triton_kernels.unavailable(rows_ND.device)


def choose_implementation(
    rows_ND: torch.Tensor, loss: str, normalize: bool = True, other_view: bool = False
) -> tuple[str, str]:
    """Return what ``impl="auto"`` takes, and why.

    Args:
        rows_ND: Normalised rows: their device, dtype and width decide.
        loss: ``nt_xent``, ``nt_logistic`` or ``margin_triplet``.
        normalize: Whether similarities are cosines.
        other_view: Whether negatives are of the other view only.
    """
    if rows_ND.device.type == "cpu":  # where Triton could at most be interpreted
        return "blocked", "no matrix is kept, and this is a CPU"
    hindrance = triton_hindrance(rows_ND, loss, normalize, other_view)
    if hindrance is None:
        return "triton", "the device runs its kernels"
    return "blocked", f"triton cannot: {hindrance}"


@functools.cache
def _log_once(name: str, reason: str) -> None:
    logger.info("contrastive loss: %s, because %s", name, reason)


def _bound(
    temperature: float | torch.Tensor, normalize: bool, impl: str, dtype: torch.dtype
) -> float | None:
    """Return what no similarity exceeds; None if exponentials need a running maximum."""
    lowest = TRITON_LOWEST_TEMPERATURE if impl == "triton" else blocked.LOWEST_TEMPERATURE[dtype]
    if not normalize or isinstance(temperature, torch.Tensor) or temperature < lowest:
        return None
    return 1 / temperature


@torch.no_grad()
def _dense_statistics(rows_ND: torch.Tensor, keys: Keys, other_view: bool) -> torch.Tensor:
    """Return the sums that the other implementations find in passing."""
    right_B, entropy_B = reference.ranking(rows_ND, keys)
    fallback_N = reference.without_semi_hard(rows_ND, keys, other_view=other_view)
    return torch.stack([x.float().sum() for x in (right_B, entropy_B, fallback_N)])


def _group_name(group: ProcessGroup | None) -> str:
    """Return the name that an operator takes for a process group."""
    if collectives.num_ranks(group) == 1:
        return ""
    found = group or dist.group.WORLD
    assert found is not None
    return found.group_name
