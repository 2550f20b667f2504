"""One pass over the keys of all ranks for a loss, another for its gradient: two torch operators.

As operators, with fake kernels, they are opaque to autograd's graph, torch.compile and autocast.
What each anchor's rank must tell the others so that every rank can finish its rows' gradients alone
(Z of NT-Xent, say) is gathered in the forward: the backward has no collective, except for a ring,
where the keys go round again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from fastclr import collectives
from fastclr.kernels.blocked_pairs import positives
from fastclr.kernels.ranking import Ranking
from fastclr.kernels.tiles import Keys
from fastclr.losses.kernels import KERNELS, Terms


@torch.library.custom_op("fastclr::contrast", mutates_args=())
def contrast(
    rows_ND: torch.Tensor,
    bound: torch.Tensor,
    loss: str,
    other_view: bool,
    bounded: bool,
    margin: float,
    images_R: list[int],
    own: int,
    group: str,
    ring: bool,
    ranked: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum a loss over this rank's anchors.

    Args:
        rows_ND: Anchors, view-major, whose dot products are the similarities in nats.
        bound: 0-d; none of them exceeds it, if ``bounded``.
        loss: Key of :data:`fastclr.losses.kernels.KERNELS`.
        other_view: Whether negatives are of the other view only.
        bounded: Whether similarities are small enough to be exponentiated as they are.
        margin: Of the triplet loss.
        images_R: Images of each rank.
        own: This rank.
        group: Name of the process group; "" without torch.distributed.
        ring: Pass the keys round instead of gathering them.
        ranked: Whether to compute the ranking too.

    Returns:
        The sum; statistics (3,): anchors of view 0 that find their positive, their summed entropy,
        and anchors without semi-hard negative; all keys, where they are needed again; what ranks
        share about their rows.
    """
    with torch.autocast(rows_ND.device.type, enabled=False):
        kernel = KERNELS[loss](Terms(bound, bounded, other_view, margin, sum(images_R)))
        counts, process_group = [2 * b for b in images_R], _group(group)
        wire_ND, kept_MD = kernel.prepare(rows_ND), rows_ND.new_empty(0, 0)
        ranking = Ranking(rows_ND) if ranked else None
        if ring:
            parts = _ring([wire_ND], images_R, own, group)
        else:
            keys_MD = collectives.all_gather(wire_ND, counts, process_group)
            parts = iter([Keys(keys_MD, images_R, own)])
            kept_MD = keys_MD if len(images_R) > 1 else kept_MD
        found = (kernel.partial(wire_ND, keys, ranking) for keys in parts)
        positive_N = positives(wire_ND.to(rows_ND.dtype))
        done = kernel.finish(positive_N, functools.reduce(kernel.merge, found))
        zero = torch.zeros((), device=rows_ND.device)
        right, entropy = ranking.result(positive_N) if ranking else (zero, zero)
        fallbacks = zero if done.fallbacks is None else done.fallbacks
        shared = done.shared_NK
        if not ring and kernel.shared_width:
            shared = collectives.all_gather(shared, counts, process_group)
        statistics_3 = torch.stack([s.float() for s in (right, entropy, fallbacks)])
        return done.loss_N.sum(), statistics_3, kept_MD, shared


@torch.library.custom_op("fastclr::contrast_gradient", mutates_args=())
def contrast_gradient(
    rows_ND: torch.Tensor,
    bound: torch.Tensor,
    keys_MD: torch.Tensor,
    shared_MK: torch.Tensor,
    loss: str,
    other_view: bool,
    bounded: bool,
    margin: float,
    images_R: list[int],
    own: int,
    group: str,
    ring: bool,
) -> torch.Tensor:
    """Return each row's gradient of the sum of all ranks' losses, (N, D).

    Args:
        rows_ND: As for :func:`contrast`.
        bound: As for :func:`contrast`.
        keys_MD: Third result of :func:`contrast`.
        shared_MK: Its fourth.
        loss: As for :func:`contrast`, like all that follow.
        other_view: Likewise.
        bounded: Likewise.
        margin: Likewise.
        images_R: Likewise.
        own: Likewise.
        group: Likewise.
        ring: Likewise.
    """
    with torch.autocast(rows_ND.device.type, enabled=False):
        kernel = KERNELS[loss](Terms(bound, bounded, other_view, margin, sum(images_R)))
        wire_ND = kernel.prepare(rows_ND)
        start = 2 * sum(images_R[:own])
        shared_NK = shared_MK
        if ring:
            parts = _ring([wire_ND, shared_MK], images_R, own, group)
        else:
            keys_MD = keys_MD if len(images_R) > 1 else wire_ND
            shared_NK = (
                shared_MK[start : start + len(rows_ND)] if kernel.shared_width else shared_MK
            )
            parts = iter([Keys(keys_MD, images_R, own, shared_MK=shared_MK)])
        gradient_ND = torch.zeros_like(wire_ND, dtype=rows_ND.dtype)
        for keys in parts:
            kernel.add_gradient(gradient_ND, wire_ND, shared_NK, keys, start)
        return gradient_ND[:, : rows_ND.shape[1]].contiguous()


@contrast.register_fake
def _(rows_ND, bound, loss, other_view, bounded, margin, images_R, own, group, ring, ranked):
    kernel, total, num_ranks = KERNELS[loss], 2 * sum(images_R), len(images_R)
    kept = (0, 0) if ring or num_ranks == 1 else (total, kernel.wire_width(rows_ND.shape[1]))
    known = rows_ND.shape[0] if ring or not kernel.shared_width else total
    return (
        rows_ND.new_empty(()),
        rows_ND.new_empty(3, dtype=torch.float32),
        rows_ND.new_empty(kept, dtype=kernel.wire_dtype if kept[0] else None),
        rows_ND.new_empty(known, kernel.shared_width, dtype=kernel.shared_dtype),
    )


@contrast_gradient.register_fake
def _(rows_ND, *_):
    return torch.empty_like(rows_ND, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    rows_ND, bound, *settings, _ranked = inputs
    ctx.save_for_backward(rows_ND, bound, *output[2:])
    ctx.settings = settings


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    gradient_ND = contrast_gradient(*ctx.saved_tensors, *ctx.settings)
    return gradient_ND * grad, *[None] * (len(ctx.settings) + 2)


contrast.register_autograd(_backward, setup_context=_setup)


def _group(name: str) -> dist.ProcessGroup | None:
    """Return the process group of a name."""
    # What torch's own functional collectives use to pass a group through an operator.
    return c10d._resolve_process_group(name) if name else None  # pyright: ignore


def _ring(
    tensors: Sequence[torch.Tensor], images_R: Sequence[int], own: int, group: str
) -> Iterator[Keys]:
    """Yield the keys of one rank after the other, with what it shares about them."""
    counts = [2 * images for images in images_R]
    for source, (rows, *shared) in collectives.ring(tensors, counts, _group(group)):
        here, start = 0 if source == own else None, sum(counts[:source])
        yield Keys(rows, [images_R[source]], here, start, *shared)
