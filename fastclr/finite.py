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
        self._bad_R = torch.zeros(0)  # on the host
        self._is_known: torch.cuda.Event | None = None

    def watch(self, loss: torch.Tensor) -> None:
        """Ask all ranks about their loss; on an accelerator the host waits for nothing."""
        bad_R = torch.zeros(self._world.num_ranks, device=loss.device)
        bad_R[self._world.rank] = ~loss.detach().isfinite()
        if self._world.num_ranks > 1:
            dist.all_reduce(bad_R)
        self._bad_R = bad_R
        if loss.is_cuda:
            # Told by an event before the backward pass: a plain read would wait for that too.
            host_R = torch.empty(bad_R.shape, pin_memory=True)
            self._bad_R = host_R.copy_(bad_R, non_blocking=True)
            self._is_known = torch.cuda.Event()
            self._is_known.record()

    def check(self) -> None:
        """Wait for the answer, which comes with the forward pass.

        Called after ``backward`` this leaves no device idle: it still has that to do.

        Raises:
            NonFiniteLoss: On every rank, if a rank's loss is not finite.
        """
        if self._is_known is not None:
            self._is_known.synchronize()
        if ranks := self._bad_R.nonzero().flatten().tolist():
            raise NonFiniteLoss(ranks)
