"""How well each anchor finds its positive, read off the tiles while a loss passes over them."""

from __future__ import annotations

import torch

from fastclr.kernels.tiles import Tile


def threshold(positive: torch.Tensor) -> torch.Tensor:
    """Return what a similarity must be below to be less than the positive's, rounding or not.

    The same rows, twice in a batch, have similarities that differ by the order of summation.
    """
    return positive - 16 * torch.finfo(torch.float32).eps * positive.abs()


class Ranking:
    """Accuracy and entropy of the search for the positive, as in the authors' code.

    Each anchor of view 0 ranks the keys of view 1, of all ranks (model.py: ``logits_ab``): G
    candidates, the positive among them, so chance is 1 / G and the largest entropy ln G.

    Args:
        rows_ND: Anchors, of which the first half are of view 0.
    """

    def __init__(self, rows_ND: torch.Tensor) -> None:
        num_images = len(rows_ND) // 2
        self._log_sum_B = rows_ND.new_full((num_images,), float("-inf"))
        self._mean_B = rows_ND.new_zeros(num_images)
        self._best_other_B = rows_ND.new_full((num_images,), float("-inf"))

    def add(self, tile: Tile) -> None:
        """Take note of a tile that is not overwritten yet."""
        if tile.same_view or not tile.in_view_0:
            return
        s = tile.s_block
        log_sum_I = s.logsumexp(1)
        mean_I = (s * (s - log_sum_I[:, None]).exp()).sum(1)
        others = s.clone().fill_diagonal_(float("-inf")) if tile.diagonal else s
        self.merge(log_sum_I, mean_I, others.amax(1), tile.rows)

    def merge(
        self,
        log_sum_I: torch.Tensor,
        mean_I: torch.Tensor,
        best_other_I: torch.Tensor,
        rows: slice = slice(None),
    ) -> None:
        """Add some candidates of some anchors.

        Args:
            log_sum_I: Logarithm of the sum of exp(s) over the candidates.
            mean_I: Their mean s under softmax(s).
            best_other_I: Their largest s, the positive left out.
            rows: Which anchors.
        """
        before = self._log_sum_B[rows]
        both = torch.logaddexp(before, log_sum_I)
        old, new = (before - both).exp(), (log_sum_I - both).exp()
        self._mean_B[rows] = old * self._mean_B[rows] + new * mean_I
        self._log_sum_B[rows] = both
        self._best_other_B[rows] = torch.maximum(self._best_other_B[rows], best_other_I)

    def result(self, positive_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums over the anchors of view 0 of being right, and of the entropy in nats.

        Args:
            positive_N: Similarity of each anchor to its positive. A tie, to within rounding, is a
                miss: a collapsed model finds nothing.
        """
        positive_B = positive_N[: len(self._best_other_B)]
        right_B = self._best_other_B < threshold(positive_B)
        return right_B.sum(), (self._log_sum_B - self._mean_B).sum()
