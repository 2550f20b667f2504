"""A loss that is not finite on one rank stops the update of all."""

from __future__ import annotations

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
