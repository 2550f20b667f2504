"""The specification: dense, slow, obvious, differentiable, in any floating dtype.

Losses are given per anchor, of rows v_ND whose dot products are the similarities s in nats (unit
rows / sqrt(temperature)); the rows are among the keys, laid out as in :mod:`fastclr.kernels.tiles`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastclr.kernels.ranking import threshold
from fastclr.kernels.tiles import Keys


def nt_xent(rows_ND: torch.Tensor, keys: Keys, *, other_view: bool = False) -> torch.Tensor:
    """Return NT-Xent (Chen et al. 2020, equation 1): ln sum over k != i of exp(s_ik) - s_ip.

    Args:
        rows_ND: Anchors, view-major: the positive of row i is row (i + N/2) mod N.
        keys: Rows that every anchor is compared with, the anchors among them.
        other_view: Leave out the keys of the anchor's own view (their appendix B.10).
    """
    s_NM = rows_ND @ keys.rows_MD.T
    # Masked before the exponential: subtracting exp(s_ii) afterwards cancels.
    positive_NM, negative_NM = pairs(rows_ND, keys, other_view=other_view)
    s_NM = s_NM.masked_fill(~(positive_NM | negative_NM), float("-inf"))
    return F.cross_entropy(s_NM, positive_NM.int().argmax(1), reduction="none")


def nt_logistic(
    rows_ND: torch.Tensor, keys: Keys, *, semi_hard: bool = False, other_view: bool = False
) -> torch.Tensor:
    """Return NT-Logistic (their table 2): softplus(-s_ip) + mean over negatives of softplus(s_ik).

    With ``semi_hard``, of one negative (as the table writes it): :func:`semi_hard_negatives`.
    """
    s_NM = rows_ND @ keys.rows_MD.T
    positive_NM, negative_NM = pairs(rows_ND, keys, other_view=other_view)
    if semi_hard:
        negative_NM = semi_hard_negatives(s_NM, positive_NM, negative_NM)
    # torch's softplus is cut off at 20, its logsigmoid nowhere.
    pull_N = -F.logsigmoid(s_NM[positive_NM])
    return pull_N - (F.logsigmoid(-s_NM) * negative_NM).sum(1) / negative_NM.sum(1)


def margin_triplet(
    rows_ND: torch.Tensor,
    keys: Keys,
    *,
    margin: float,
    semi_hard: bool = False,
    other_view: bool = False,
) -> torch.Tensor:
    """Return the margin triplet loss (their table 2): max(s_ik - s_ip + margin, 0), likewise."""
    s_NM = rows_ND @ keys.rows_MD.T
    positive_NM, negative_NM = pairs(rows_ND, keys, other_view=other_view)
    if semi_hard:
        negative_NM = semi_hard_negatives(s_NM, positive_NM, negative_NM)
    hinge_NM = F.relu(s_NM - s_NM[positive_NM][:, None] + margin)
    return (hinge_NM * negative_NM).sum(1) / negative_NM.sum(1)


def pairs(
    rows_ND: torch.Tensor, keys: Keys, *, other_view: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which keys are each anchor's positive and its negatives, two bool (N, M)."""
    assert keys.first is not None
    num_rows, device = len(rows_ND), rows_ND.device
    place_N = torch.arange(num_rows, device=device) + keys.first
    place_M = torch.arange(len(keys.rows_MD), device=device)
    positive_NM = place_N.roll(num_rows // 2)[:, None] == place_M
    negative_NM = ~positive_NM & (place_N[:, None] != place_M)
    if other_view:
        view_M = torch.cat([torch.arange(2 * b, device=device) >= b for b in keys.images_R])
        negative_NM &= view_M[place_N, None] != view_M
    return positive_NM, negative_NM


def semi_hard_negatives(
    s_NM: torch.Tensor, positive_NM: torch.Tensor, negative_NM: torch.Tensor
) -> torch.Tensor:
    """Return each anchor's one negative, bool (N, M): the nearest farther than its positive.

    A tie, to within rounding, is not farther. Where none is, the farthest of all: the one that
    violates least (as in FaceNet's TensorFlow implementation; Chen et al. leave it open).
    """
    farther_NM = negative_NM & (s_NM < threshold(s_NM[positive_NM])[:, None])
    nearest_N = s_NM.masked_fill(~farther_NM, float("-inf")).argmax(1)
    farthest_N = s_NM.masked_fill(~negative_NM, float("inf")).argmin(1)
    chosen_N = torch.where(farther_NM.any(1), nearest_N, farthest_N)
    return F.one_hot(chosen_N, s_NM.shape[1]).bool()


def ranking(rows_ND: torch.Tensor, keys: Keys) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether each anchor of view 0 finds its positive, and the entropy of its search.

    The candidates are the keys of view 1, as in the authors' code (model.py: ``logits_ab``): G of
    them, so chance is 1 / G and the largest entropy ln G.
    """
    s_NM = rows_ND @ keys.rows_MD.T
    positive_NM, negative_NM = pairs(rows_ND, keys, other_view=True)
    s_BM = s_NM.masked_fill(~(positive_NM | negative_NM), float("-inf"))[: len(rows_ND) // 2]
    positive_BM = positive_NM[: len(s_BM)]
    best_other_B = s_BM.masked_fill(positive_BM, float("-inf")).amax(1)
    entropy_B = torch.special.entr(s_BM.softmax(1)).sum(1)
    return best_other_B < threshold(s_BM[positive_BM]), entropy_B


def without_semi_hard(rows_ND: torch.Tensor, keys: Keys, *, other_view: bool) -> torch.Tensor:
    """Return which anchors have no negative farther than their positive, bool (N,)."""
    s_NM = rows_ND @ keys.rows_MD.T
    positive_NM, negative_NM = pairs(rows_ND, keys, other_view=other_view)
    return ~(negative_NM & (s_NM < threshold(s_NM[positive_NM])[:, None])).any(1)


def lars_step(
    w: torch.Tensor,
    g: torch.Tensor,
    v: torch.Tensor,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float = 1e-3,
    adapt: bool = True,
    denominator: str = "decayed_gradient",
    rate_inside_momentum: bool = True,
    clip: bool = False,
    nesterov: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and momentum of one layer after a step of LARS, in any of its forms.

    By default that of google-research/simclr, ``lars_optimizer.py``; ``sum_of_norms`` with the rate
    outside is equation 6 of You et al. 2017, and ``clip`` what apex's LARC adds.
    """
    w_norm, g_norm = w.norm(), g.norm()
    g = g + weight_decay * w
    ratio = torch.ones_like(w_norm)
    divisor = g.norm() if denominator == "decayed_gradient" else g_norm + weight_decay * w_norm
    zero = g.norm() == 0 if denominator == "decayed_gradient" else g_norm == 0
    if adapt and not zero and w_norm != 0:
        ratio = trust_coefficient * w_norm / divisor
        if clip:
            ratio = torch.clamp(ratio / lr, max=1)
    inside, outside = (lr, 1.0) if rate_inside_momentum else (1.0, lr)
    step = inside * ratio * g
    v = momentum * v + step
    return w - outside * (step + momentum * v if nesterov else v), v
