"""What all ranks decide together, so that none goes on alone: to stop, or not to take a step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fastclr.world import World


class NonFiniteLoss(FloatingPointError):
    """The loss is NaN or infinite on some ranks.

    Attributes:
        ranks: Which.
    """

    def __init__(self, ranks: list[int]) -> None:
        super().__init__(f"the loss of rank {', '.join(map(str, ranks))} is not finite")
        self.ranks = ranks


class StopVote:
    """Whether any rank wants to stop; every rank asks at the same place.

    Args:
        world: Which rank of how many.
        device: Of the default process group. Beside NCCL the votes go over gloo: the host waits for
            the other hosts, and for no device.
    """

    def __init__(self, world: World, device: torch.device) -> None:
        self._num_ranks = world.num_ranks
        self._group: Any = None
        if world.num_ranks > 1 and device.type == "cuda":
            self._group = dist.new_group(backend="gloo")

    def any(self, vote: bool) -> bool:
        """Return whether any rank voted yes."""
        if self._num_ranks == 1:
            return vote
        votes = torch.tensor([float(vote)])
        dist.all_reduce(votes, group=self._group)
        return bool(votes.item())


class FiniteGuard:
    """Keeps a loss that is not finite, on any rank, out of the weights.

    Args:
        world: Which rank of how many.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._bad_R = torch.zeros(0)
        self._work: dist.Work | None = None

    def watch(self, loss: torch.Tensor) -> None:
        """Ask all ranks about their loss; waits for nothing."""
        bad_R = torch.zeros(self._world.num_ranks, device=loss.device)
        bad_R[self._world.rank] = ~loss.detach().isfinite()
        self._bad_R = bad_R
        if self._world.num_ranks > 1:
            self._work = dist.all_reduce(bad_R, async_op=True)

    def check(self) -> None:
        """Wait for the answer, which came with the forward pass.

        After ``backward`` this leaves no device idle: it still has the backward pass to do.

        Raises:
            NonFiniteLoss: On every rank, if a rank's loss is not finite.
        """
        if self._work is not None:
            self._work.wait()
            self._work = None
        if ranks := self._bad_R.nonzero().flatten().tolist():
            raise NonFiniteLoss(ranks)
