"""Collectives with exact gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _GatherRows(torch.autograd.Function):
    """All-gather along rows; backward sums every rank's gradient for our rows."""

    @staticmethod
    def forward(ctx: Any, rows_ND: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        num_ranks = dist.get_world_size(group)
        gathered = rows_ND.new_empty(num_ranks * rows_ND.shape[0], *rows_ND.shape[1:])
        dist.all_gather(list(gathered.chunk(num_ranks)), rows_ND.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Each rank's loss reaches our rows; the sum over ranks is the column term that losses
        # which gather without gradient leave out.
        # A copy: autograd may hand the incoming tensor to other operations too.
        grad_MD = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad_MD, group=ctx.group)
        num_ranks = dist.get_world_size(ctx.group)
        return grad_MD.chunk(num_ranks)[dist.get_rank(ctx.group)], None


def num_ranks(group: dist.ProcessGroup | None = None) -> int:
    """Return the size of the group; 1 where torch.distributed is not in use."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Return this process's rank in the group; 0 where torch.distributed is not in use."""
    return dist.get_rank(group) if num_ranks(group) > 1 else 0


def gather_rows(rows_ND: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Stack the rows of all ranks in rank order, with gradient.

    Args:
        rows_ND: This rank's rows, floating point; the same shape on every rank.
        group: Process group; None for all ranks.

    Returns:
        (num_ranks * N, D). Its backward adds up the gradients of all ranks, so that averaging the
        parameter gradients over ranks gives the gradient of the mean loss.
    """
    return rows_ND if num_ranks(group) == 1 else _GatherRows.apply(rows_ND, group)
