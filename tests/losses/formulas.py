"""Every contrastive loss written out, one term at a time, for the tests to judge it by."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from fastclr.losses import LOSSES

MARGIN = 0.4
EXPLICIT = ("reference", "blocked")


def log1p_exp(x):
    return torch.logaddexp(x, torch.zeros_like(x))


# The proof of each entry of LOSSES (Chen et al. 2020, equation 1 and table 2), for one anchor: an
# entry without one fails.
FORMULAS = {
    "nt_xent": lambda positive, negatives: (
        torch.stack([positive, *negatives]).logsumexp(0) - positive
    ),
    "nt_logistic": lambda positive, negatives: (
        log1p_exp(-positive) + sum(map(log1p_exp, negatives)) / len(negatives)
    ),
    "margin_triplet": lambda positive, negatives: (
        sum((s - positive + MARGIN).clamp(min=0) for s in negatives) / len(negatives)
    ),
}

Similarities = tuple[torch.Tensor, list[torch.Tensor]]  # to the positive and to the negatives


class Case(NamedTuple):
    """A loss as it can be asked for."""

    name: str
    semi_hard: bool = False
    negatives: str = "both"

    def __str__(self) -> str:
        return "-".join([self.name, *["semi_hard"] * self.semi_hard, self.negatives])

    @property
    def is_cosine(self) -> bool:
        """Whether there is no temperature."""
        return self.name == "margin_triplet"

    def build(self, temperature: float | torch.Tensor = 0.3, **options: Any) -> nn.Module:
        own = {"margin": MARGIN} if self.is_cosine else {"temperature": temperature}
        if self.name != "nt_xent":
            own["semi_hard"] = self.semi_hard
        return LOSSES[self.name](**own, negatives=self.negatives, **options)

    def slow(self, z0_BD, z1_BD, temperature=0.3, normalize=True) -> torch.Tensor:
        terms = []
        for positive, negatives in self.anchors(z0_BD, z1_BD, temperature, normalize):
            if self.semi_hard:
                farther = [s for s in negatives if s < positive]
                negatives = [max(farther) if farther else min(negatives)]
            terms.append(FORMULAS[self.name](positive, negatives))
        return torch.stack(terms).mean()

    def slow_statistics(self, z0_BD, z1_BD, temperature=0.3) -> dict[str, float]:
        search = self._replace(negatives="other_view").anchors(z0_BD, z1_BD, temperature)
        of_view_0 = list(itertools.islice(search, len(z0_BD)))
        right = [all(positive > s for s in others) for positive, others in of_view_0]
        p_BG = torch.stack([torch.stack([s, *others]).softmax(0) for s, others in of_view_0])
        found = {
            "contrastive_accuracy": sum(right) / len(right),
            "contrastive_entropy": -(p_BG * p_BG.log()).sum(1).mean().item(),
        }
        if self.semi_hard:
            anchors = list(self.anchors(z0_BD, z1_BD, temperature))
            none = [all(s >= positive for s in negatives) for positive, negatives in anchors]
            found["no_semi_hard"] = sum(none) / len(none)
        return found

    def anchors(self, z0_BD, z1_BD, temperature, normalize=True) -> Iterator[Similarities]:
        """Yield the similarities of one anchor after the other, in float64."""
        rows = [*z0_BD.double(), *z1_BD.double()]
        half = len(z0_BD)
        if normalize:
            rows = [row / max(row.norm(), 1e-12) for row in rows]
        for i, anchor in enumerate(rows):
            s = [anchor @ row / (1 if self.is_cosine else temperature) for row in rows]
            others = [k for k in range(len(rows)) if k % half != i % half]
            if self.negatives == "other_view":
                others = [k for k in others if k // half != i // half]
            yield s[(i + half) % len(rows)], [s[k] for k in others]


CASES = [
    Case(name, semi_hard, negatives)
    for name, semi_hard, negatives in itertools.product(
        LOSSES, (False, True), ("both", "other_view")
    )
    if not (name == "nt_xent" and semi_hard)
]


def pair(
    num_images: int, dim: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return projections of two views that are somewhat alike."""
    generator = torch.Generator().manual_seed(seed)
    content, *noise = torch.randn(3, num_images, dim, generator=generator, dtype=torch.float64)
    return tuple((content + 0.7 * n).to(dtype).requires_grad_() for n in noise)


def gradients(loss: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
    """Return the gradients as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, tensors)])


def ratio_and_cosine(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Compare length and direction of two vectors."""
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=0)
    return (found.norm() / expected.norm()).item(), cosine.item()
