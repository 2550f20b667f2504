"""Collectives with exact gradients, over ranks that need not hold equally many rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


def num_ranks(group: dist.ProcessGroup | None = None) -> int:
    """Return the size of the group; 1 where torch.distributed is not in use."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Return this process's rank in the group; 0 where torch.distributed is not in use."""
    return dist.get_rank(group) if num_ranks(group) > 1 else 0


def host_group(group: dist.ProcessGroup | None = None) -> dist.ProcessGroup | None:
    """Return a group of the same ranks whose collectives wait for hosts, and for no device."""
    return group if dist.get_backend(group) == "gloo" else gloo_twin(group)


@functools.cache
def gloo_twin(group: dist.ProcessGroup | None) -> Any:
    """Make a gloo group of the same ranks, once; its ranks call this together."""
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)


def shapes(rows_ND: torch.Tensor, group: dist.ProcessGroup | None = None) -> list[list[int]]:
    """Return (N, D) of every rank; a small all-gather over the hosts."""
    if num_ranks(group) == 1:
        return [list(rows_ND.shape)]
    shape = torch.tensor([*rows_ND.shape])
    gathered = shape.new_empty(num_ranks(group), 2)
    dist.all_gather(list(gathered), shape, group=host_group(group))
    return gathered.tolist()


def any_rank(flag: bool) -> bool:
    """Return whether any rank's flag is true; every rank calls this at the same place."""
    if num_ranks() == 1:
        return flag
    flags = torch.tensor([float(flag)])
    dist.all_reduce(flags, group=host_group())
    return bool(flags.item())


@contextmanager
def together() -> Iterator[None]:
    """Wait for all ranks; if one fails, all do, and say why. Every rank enters it.

    Raises:
        Exception: What this rank failed with, or the like of what the first other one did, which
            it names.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # the others wait for this rank, whatever it is
        error = caught
    if num_ranks() > 1:
        said: list[Any] = [None] * num_ranks()
        dist.all_gather_object(said, error and (type(error), str(error)), group=host_group())
        if error is None and any(said):
            failed, (kind, text) = next((r, s) for r, s in enumerate(said) if s)
            other: Exception = kind.__new__(kind)  # its own arguments are not known here
            other.args = (f"rank {failed}: {text}",)
            raise other
    if error is not None:
        raise error


def from_first(value: Any) -> Any:
    """Return rank 0's value on every rank; every rank calls this."""
    if num_ranks() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=host_group())
    return values[0]


def from_all(value: Any) -> list[Any]:
    """Return every rank's value on every rank; every rank calls this."""
    values: list[Any] = [value] * num_ranks()
    if len(values) > 1:
        dist.all_gather_object(values, value, group=host_group())
    return values


def all_gather(
    rows_ND: torch.Tensor, num_rows_R: Sequence[int], group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Stack the rows of all ranks in rank order, without gradient.

    Args:
        rows_ND: This rank's rows.
        num_rows_R: How many rows each rank has; unequal ones are padded on the wire.
        group: Process group; None for all ranks.
    """
    if len(num_rows_R) == 1:
        return rows_ND
    most = max(num_rows_R)
    padding = rows_ND.new_zeros(most - len(rows_ND), *rows_ND.shape[1:])
    mine = torch.cat([rows_ND, padding]) if len(padding) else rows_ND.contiguous()
    gathered = rows_ND.new_empty(len(num_rows_R), most, *rows_ND.shape[1:])
    dist.all_gather(list(gathered), mine, group=group)
    if min(num_rows_R) == most:
        return gathered.flatten(0, 1)
    return torch.cat([rows[:count] for rows, count in zip(gathered, num_rows_R, strict=True)])


class _GatherRows(torch.autograd.Function):
    """All-gather along rows; backward sums every rank's gradient for our rows."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: torch.Tensor,
        num_rows_R: Sequence[int],
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        ctx.num_rows_R, ctx.group = num_rows_R, group
        return all_gather(rows_ND, num_rows_R, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # Each rank's loss reaches our rows; the sum over ranks is the column term that losses
        # which gather without gradient leave out.
        # A copy: autograd may hand the incoming tensor to other operations too.
        grad_MD = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad_MD, group=ctx.group)
        return grad_MD.split(list(ctx.num_rows_R))[dist.get_rank(ctx.group)], None, None


def gather_rows(
    rows_ND: torch.Tensor,
    num_rows_R: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Stack the rows of all ranks in rank order, with gradient.

    Args:
        rows_ND: This rank's rows, floating point.
        num_rows_R: How many rows each rank has; None for as many as this one.
        group: Process group; None for all ranks.

    Returns:
        (M, D). Its backward adds up the gradients of all ranks, so that averaging the parameter
        gradients over ranks gives the gradient of the mean loss.
    """
    if num_ranks(group) == 1:
        return rows_ND
    counts = num_rows_R if num_rows_R is not None else [len(rows_ND)] * num_ranks(group)
    return _GatherRows.apply(rows_ND, counts, group)


def ring(
    tensors: Sequence[torch.Tensor],
    num_rows_R: Sequence[int],
    group: dist.ProcessGroup | None = None,
) -> Iterator[tuple[int, Sequence[torch.Tensor]]]:
    """Yield (rank, its tensors) for every rank, ours first, holding those of two at a time.

    Each rank passes on what it got; the next ones travel while the receiver works on these.

    Args:
        tensors: This rank's tensors, each of as many rows as ``num_rows_R`` says.
        num_rows_R: How many rows each rank has.
        group: Process group; None for all ranks.
    """
    size, own = num_ranks(group), rank(group)
    held = [tensor.contiguous() for tensor in tensors]
    for step in range(size):
        source = (own - step) % size
        requests: list[dist.Work] = []
        arriving: list[torch.Tensor] = []
        if step < size - 1:
            coming = num_rows_R[(source - 1) % size]
            arriving = [t.new_empty(coming, *t.shape[1:]) for t in held]
            right, left = (_global_rank((own + i) % size, group) for i in (1, -1))
            # Empty messages are not sent: both sides know the counts.
            moves = [dist.P2POp(dist.isend, t, right, group) for t in held if t.numel()]
            moves += [dist.P2POp(dist.irecv, t, left, group) for t in arriving if t.numel()]
            requests = dist.batch_isend_irecv(moves) if moves else []
        yield source, held
        for request in requests:
            request.wait()
        held = arriving


def _global_rank(group_rank: int, group: dist.ProcessGroup | None) -> int:
    return group_rank if group is None else dist.get_global_rank(group, group_rank)
