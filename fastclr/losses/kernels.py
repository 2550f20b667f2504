"""Each loss as its implementation computes it: partial sums over keys, then the gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F

from fastclr.kernels import blocked, blocked_pairs
from fastclr.kernels.ranking import Ranking
from fastclr.kernels.tiles import Keys


class Terms(NamedTuple):
    """What a loss is computed under.

    Attributes:
        bound: 0-d; none of the similarities exceeds it, if ``bounded``.
        bounded: Whether similarities are small enough to be exponentiated as they are.
        other_view: Whether negatives are of the other view only.
        margin: Of the triplet loss.
        num_images: Of all ranks.
    """

    bound: torch.Tensor
    bounded: bool
    other_view: bool
    margin: float
    num_images: int

    @property
    def num_negatives(self) -> int:
        """Of each anchor."""
        return self.num_images - 1 if self.other_view else 2 * self.num_images - 2


class Finished(NamedTuple):
    """A loss over all keys.

    Attributes:
        loss_N: Of each anchor.
        shared_NK: What other ranks must know about it for their rows' gradients.
        fallbacks: 0-d; anchors without a semi-hard negative.
    """

    loss_N: torch.Tensor
    shared_NK: torch.Tensor
    fallbacks: torch.Tensor | None = None


@dataclass(frozen=True)
class Kernel(ABC):
    """A loss in blocks; a subclass says which.

    Attributes:
        terms: What it is computed under.
        shared_width: Numbers that a rank shares about each of its rows.
        shared_dtype: Their type; None for that of the rows.
        wire_dtype: Type of rows as they are sent; None for as they are.
    """

    terms: Terms
    shared_width: ClassVar[int] = 0
    shared_dtype: ClassVar[torch.dtype | None] = None
    wire_dtype: ClassVar[torch.dtype | None] = None

    @staticmethod
    def wire_width(dim: int) -> int:
        """Return how wide rows are as they are sent."""
        return dim

    def prepare(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """Return the rows as they are compared and sent."""
        return rows_ND

    @abstractmethod
    def partial(self, rows_ND: torch.Tensor, keys: Keys, ranking: Ranking | None) -> torch.Tensor:
        """Return what the loss must know of some keys, (N, ...)."""

    def merge(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return what it must know of two sets of keys."""
        return a + b

    @abstractmethod
    def finish(self, positive_N: torch.Tensor, partial: torch.Tensor) -> Finished:
        """Return the loss, from the similarity of each anchor to its positive and all partials."""

    @abstractmethod
    def add_gradient(
        self,
        gradient_ND: torch.Tensor,
        rows_ND: torch.Tensor,
        shared_NK: torch.Tensor,
        keys: Keys,
        start: int,
    ) -> None:
        """Add each row's gradient of the sum of all anchors' losses, as far as these keys go."""


class NTXent(Kernel):
    """NT-Xent in blocks; shares Z, or its logarithm where similarities are not bounded."""

    shared_width = 1

    def partial(self, rows_ND: torch.Tensor, keys: Keys, ranking: Ranking | None) -> torch.Tensor:
        """Return Z over these keys."""
        terms = self.terms
        return blocked.nt_xent_sums(
            rows_ND, keys, bounded=terms.bounded, other_view=terms.other_view, ranking=ranking
        )

    def merge(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Add Z."""
        return a + b if self.terms.bounded else torch.logaddexp(a, b)

    def finish(self, positive_N: torch.Tensor, partial: torch.Tensor) -> Finished:
        """Return ln Z less the similarity of the positive."""
        log_sum_N = partial.log() if self.terms.bounded else partial
        return Finished(log_sum_N - positive_N, partial[:, None])

    def add_gradient(
        self,
        gradient_ND: torch.Tensor,
        rows_ND: torch.Tensor,
        shared_NK: torch.Tensor,
        keys: Keys,
        start: int,
    ) -> None:
        """Add W v."""
        terms = self.terms
        blocked.nt_xent_gradient(
            gradient_ND,
            rows_ND,
            shared_NK[:, 0],
            keys,
            bounded=terms.bounded,
            other_view=terms.other_view,
        )


class NTXentTriton(NTXent):
    """NT-Xent by the Triton kernels, on half-precision rows."""

    wire_dtype = torch.float16
    shared_dtype = torch.float32

    @staticmethod
    def wire_width(dim: int) -> int:
        """Return the power of two that tensor cores want."""
        return max(16, 1 << (dim - 1).bit_length())

    def prepare(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """Round to half precision; pad."""
        return _triton().prepare(rows_ND)

    @property
    def _bound(self) -> torch.Tensor | None:
        return self.terms.bound if self.terms.bounded else None

    def partial(self, rows_ND: torch.Tensor, keys: Keys, ranking: Ranking | None) -> torch.Tensor:
        """Return Z, relative to exp(bound), over these keys."""
        if not len(rows_ND):
            return rows_ND.new_zeros(0, dtype=torch.float32)
        first = -1 if keys.first is None else keys.first
        view_M = _views(keys) if ranking else None
        stat_N, rank_N3 = _triton().forward(rows_ND, keys.rows_MD, first, self._bound, view_M)
        if ranking:
            ranking.merge(*rank_N3[: len(rows_ND) // 2].unbind(1))
        return stat_N

    def finish(self, positive_N: torch.Tensor, partial: torch.Tensor) -> Finished:
        """Return ln Z less the similarity of the positive."""
        finished = super().finish(positive_N, partial)
        offset = self.terms.bound if self.terms.bounded else 0
        return finished._replace(loss_N=finished.loss_N + offset)

    def add_gradient(
        self,
        gradient_ND: torch.Tensor,
        rows_ND: torch.Tensor,
        shared_NK: torch.Tensor,
        keys: Keys,
        start: int,
    ) -> None:
        """Add W v."""
        assert keys.shared_MK is not None
        if not len(rows_ND):
            return
        first = -1 if keys.first is None else keys.first
        gradient_ND += _triton().gradient(
            rows_ND, shared_NK[:, 0], keys.rows_MD, keys.shared_MK[:, 0], first, self._bound
        )


class NTLogistic(Kernel):
    """NT-Logistic against the mean over all negatives; each pair's gradient is known by itself."""

    def partial(self, rows_ND: torch.Tensor, keys: Keys, ranking: Ranking | None) -> torch.Tensor:
        """Return the sum over the negatives."""
        return blocked_pairs.logistic_sums(
            rows_ND, keys, other_view=self.terms.other_view, ranking=ranking
        )

    def finish(self, positive_N: torch.Tensor, partial: torch.Tensor) -> Finished:
        """Return pull and mean push."""
        push_N = partial[:, 0] / self.terms.num_negatives
        return Finished(push_N - F.logsigmoid(positive_N), partial[:, :0])

    def add_gradient(
        self,
        gradient_ND: torch.Tensor,
        rows_ND: torch.Tensor,
        shared_NK: torch.Tensor,
        keys: Keys,
        start: int,
    ) -> None:
        """Add it in one more pass."""
        blocked_pairs.logistic_gradient(
            gradient_ND,
            rows_ND,
            keys,
            num_negatives=self.terms.num_negatives,
            other_view=self.terms.other_view,
        )


class MarginTriplet(Kernel):
    """Margin triplet against the mean over all negatives; shares thresholds and open hinges."""

    shared_width = 2

    def partial(self, rows_ND: torch.Tensor, keys: Keys, ranking: Ranking | None) -> torch.Tensor:
        """Return the sum of hinges and how many are open."""
        terms = self.terms
        return blocked_pairs.triplet_sums(
            rows_ND, keys, margin=terms.margin, other_view=terms.other_view, ranking=ranking
        )

    def finish(self, positive_N: torch.Tensor, partial: torch.Tensor) -> Finished:
        """Return the mean hinge."""
        shared_N2 = torch.stack([positive_N, partial[:, 1]], 1)
        return Finished(partial[:, 0] / self.terms.num_negatives, shared_N2)

    def add_gradient(
        self,
        gradient_ND: torch.Tensor,
        rows_ND: torch.Tensor,
        shared_NK: torch.Tensor,
        keys: Keys,
        start: int,
    ) -> None:
        """Add it in one more pass."""
        blocked_pairs.triplet_gradient(
            gradient_ND,
            rows_ND,
            shared_NK,
            keys,
            margin=self.terms.margin,
            num_negatives=self.terms.num_negatives,
            other_view=self.terms.other_view,
        )


class SemiHard(Kernel):
    """A loss against each anchor's one semi-hard negative; shares which, and the derivatives."""

    shared_width = 3
    shared_dtype = torch.float64  # the place of a row among a billion

    def partial(self, rows_ND: torch.Tensor, keys: Keys, ranking: Ranking | None) -> torch.Tensor:
        """Return the candidates."""
        return blocked_pairs.nearest_semi_hard(
            rows_ND, keys, other_view=self.terms.other_view, ranking=ranking
        )

    def merge(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Take the better."""
        return blocked_pairs.merge_semi_hard(a, b)

    @abstractmethod
    def terms_of(
        self, positive_N: torch.Tensor, negative_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the loss, and its derivatives by the negative's and the positive's similarity."""

    def finish(self, positive_N: torch.Tensor, partial: torch.Tensor) -> Finished:
        """Return the loss against the nearest farther one, or else against the farthest."""
        none_N = partial[:, 0].isneginf()
        chosen_N2 = torch.where(none_N[:, None], partial[:, 2:], partial[:, :2])
        loss_N, by_negative_N, by_positive_N = self.terms_of(positive_N.double(), chosen_N2[:, 0])
        shared_N3 = torch.stack([chosen_N2[:, 1], by_negative_N, by_positive_N], 1)
        return Finished(loss_N.to(positive_N.dtype), shared_N3, none_N.sum())

    def add_gradient(
        self,
        gradient_ND: torch.Tensor,
        rows_ND: torch.Tensor,
        shared_NK: torch.Tensor,
        keys: Keys,
        start: int,
    ) -> None:
        """Add it by index."""
        blocked_pairs.semi_hard_gradient(gradient_ND, rows_ND, shared_NK, keys, start)


class NTLogisticSemiHard(SemiHard):
    """NT-Logistic against one negative."""

    def terms_of(
        self, positive_N: torch.Tensor, negative_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return pull and push."""
        loss_N = -F.logsigmoid(positive_N) - F.logsigmoid(-negative_N)
        return loss_N, negative_N.sigmoid(), -(-positive_N).sigmoid()


class MarginTripletSemiHard(SemiHard):
    """Margin triplet against one negative."""

    def terms_of(
        self, positive_N: torch.Tensor, negative_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the hinge."""
        loss_N = F.relu(negative_N - positive_N + self.terms.margin)
        is_open_N = loss_N.sign()
        return loss_N, is_open_N, -is_open_N


KERNELS: dict[str, type[Kernel]] = {
    "nt_xent": NTXent,
    "nt_xent triton": NTXentTriton,
    "nt_logistic": NTLogistic,
    "nt_logistic semi_hard": NTLogisticSemiHard,
    "margin_triplet": MarginTriplet,
    "margin_triplet semi_hard": MarginTripletSemiHard,
}


def _triton() -> Any:
    """Import the Triton kernels: where they are not asked for, Triton need not exist."""
    from fastclr.kernels import nt_xent

    return nt_xent


def _views(keys: Keys) -> torch.Tensor:
    """Return the view of each key, int8 (M,)."""
    device = keys.rows_MD.device
    counts = torch.tensor([b for b in keys.images_R for _ in range(2)], device=device)
    views = torch.tensor([0, 1], dtype=torch.int8, device=device).repeat(len(keys.images_R))
    return views.repeat_interleave(counts, output_size=len(keys.rows_MD))
