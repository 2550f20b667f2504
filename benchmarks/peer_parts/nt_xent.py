"""NT-Xent of this and of other libraries, behind one signature: loss(z0_ND, z1_ND), a mean."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from fastclr.losses import nt_xent

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Implementation(NamedTuple):
    """One way to compute NT-Xent.

    Attributes:
        package: Distribution that it comes in.
        module: What must be imported for it.
        build: Returns the loss at a temperature.
        keeps_matrix: Whether memory grows with the square of N, or faster.
    """

    package: str
    module: str
    build: Callable[[float], Loss]
    keeps_matrix: bool


def _fastclr(impl: Literal["reference", "blocked", "triton"]) -> Callable[[float], Loss]:
    return lambda temperature: functools.partial(nt_xent, temperature=temperature, impl=impl)


def _lightly(temperature: float) -> Loss:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=temperature)


def _metric_learning(temperature: float) -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss

    loss = NTXentLoss(temperature=temperature)

    def of_labels(z0_ND: torch.Tensor, z1_ND: torch.Tensor) -> torch.Tensor:
        images_N = torch.arange(len(z0_ND), device=z0_ND.device)
        return loss(torch.cat([z0_ND, z1_ND]), images_N.repeat(2))

    return of_labels


def _inf_cl(temperature: float) -> Loss:
    from inf_cl.flash import FlashProb

    def of_all_pairs(z0_ND: torch.Tensor, z1_ND: torch.Tensor) -> torch.Tensor:
        rows_MD = F.normalize(torch.cat([z0_ND, z1_ND]), dim=1) * temperature**-0.5
        heads_MHC = rows_MD.unflatten(1, (-1, min(256, rows_MD.shape[1])))
        log_sum_M = FlashProb.apply(heads_MHC, heads_MHC)
        # It is made for two modalities and sums over the anchor itself too: taken out again.
        log_sum_M = log_sum_M + torch.log1p(-torch.exp(1 / temperature - log_sum_M))
        return (log_sum_M - (rows_MD * rows_MD.roll(len(z0_ND), 0)).sum(1)).mean()

    return of_all_pairs


IMPLEMENTATIONS = {
    "reference": Implementation("fastclr", "fastclr.losses", _fastclr("reference"), True),
    "blocked": Implementation("fastclr", "fastclr.losses", _fastclr("blocked"), False),
    "triton": Implementation("fastclr", "fastclr.losses", _fastclr("triton"), False),
    "lightly": Implementation("lightly", "lightly.loss", _lightly, True),
    "metric-learning": Implementation(
        "pytorch-metric-learning", "pytorch_metric_learning.losses", _metric_learning, True
    ),
    "inf-cl": Implementation("inf-cl", "inf_cl", _inf_cl, False),
}
