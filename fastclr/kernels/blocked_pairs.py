"""NT-Logistic and margin triplet tile by tile: O(M D) memory on any device.

With p(i) the positive of anchor i and n its number of negatives (the same for all anchors),

    logistic_i = softplus(-s_ip) + mean over negatives k of softplus(s_ik)
    triplet_i  = mean over negatives k of max(s_ik - s_ip + margin, 0)

Semi-hard mining replaces the mean by one negative: the nearest of those farther than the positive,
or, where there is none, the farthest of all. Who chose which negative is shared between ranks, so
each row's gradient is complete on its own rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastclr.kernels.ranking import Ranking, threshold
from fastclr.kernels.tiles import Keys, Tile, tiles


def positives(rows_ND: torch.Tensor) -> torch.Tensor:
    """Return each anchor's similarity to its positive, (N,)."""
    return (rows_ND * rows_ND.roll(len(rows_ND) // 2, 0)).sum(1)


def logistic_sums(
    rows_ND: torch.Tensor, keys: Keys, *, other_view: bool, ranking: Ranking | None = None
) -> torch.Tensor:
    """Return each anchor's sum over the negatives among these keys of softplus(s), (N, 1)."""
    sum_N1 = rows_ND.new_zeros(len(rows_ND), 1)
    for tile in tiles(rows_ND, keys, other_view=other_view):
        if ranking:
            ranking.add(tile)
        # Less logsigmoid(-s), which is softplus(s); torch's softplus is cut off at 20.
        sum_N1[tile.rows] -= F.logsigmoid(_negatives(tile).neg_()).sum(1, keepdim=True)
    return sum_N1


def logistic_gradient(
    gradient_ND: torch.Tensor,
    rows_ND: torch.Tensor,
    keys: Keys,
    *,
    num_negatives: int,
    other_view: bool,
) -> None:
    """Add each row's gradient of the sum of all anchors' losses, as far as these keys go.

    Args:
        gradient_ND: What is added to.
        rows_ND: Anchors, view-major.
        keys: Rows to compare them with.
        num_negatives: Of each anchor, over the whole world.
        other_view: Leave out the keys of the anchor's own view.
    """
    for tile in tiles(rows_ND, keys, other_view=other_view):
        # Twice: a pair of negatives is a term of either's loss.
        g = _negatives(tile).sigmoid_()
        gradient_ND[tile.rows].addmm_(g, keys.rows_MD[tile.columns], alpha=2 / num_negatives)
    if keys.own is not None:
        pull_N1 = torch.sigmoid(-positives(rows_ND))[:, None]
        gradient_ND.sub_(2 * pull_N1 * rows_ND.roll(len(rows_ND) // 2, 0))


def triplet_sums(
    rows_ND: torch.Tensor,
    keys: Keys,
    *,
    margin: float,
    other_view: bool,
    ranking: Ranking | None = None,
) -> torch.Tensor:
    """Return each anchor's sum of hinges over these keys, and how many are open, (N, 2)."""
    threshold_N = positives(rows_ND) - margin
    sum_N2 = rows_ND.new_zeros(len(rows_ND), 2)
    for tile in tiles(rows_ND, keys, other_view=other_view):
        if ranking:
            ranking.add(tile)
        over = _negatives(tile).sub_(threshold_N[tile.rows, None]).relu_()
        sum_N2[tile.rows] += torch.stack([over.sum(1), over.sign().sum(1)], 1)
    return sum_N2


def triplet_gradient(
    gradient_ND: torch.Tensor,
    rows_ND: torch.Tensor,
    shared_N2: torch.Tensor,
    keys: Keys,
    *,
    margin: float,
    num_negatives: int,
    other_view: bool,
) -> None:
    """Add each row's gradient; see :func:`logistic_gradient`.

    Args:
        gradient_ND: What is added to.
        rows_ND: Anchors.
        shared_N2: Of each anchor: similarity to its positive, and open hinges over the world.
        keys: Rows, with the same two numbers in ``shared_MK``.
        margin: Of the hinge.
        num_negatives: Of each anchor, over the whole world.
        other_view: Leave out the keys of the anchor's own view.
    """
    assert keys.shared_MK is not None
    threshold_N, threshold_M = shared_N2[:, 0] - margin, keys.shared_MK[:, 0] - margin
    for tile in tiles(rows_ND, keys, other_view=other_view):
        s = _negatives(tile)
        g = (s > threshold_N[tile.rows, None]).to(s.dtype).add_(s > threshold_M[tile.columns])
        gradient_ND[tile.rows].addmm_(g, keys.rows_MD[tile.columns], alpha=1 / num_negatives)
    if keys.own is not None:
        half = len(rows_ND) // 2
        open_N1 = (shared_N2[:, 1] + shared_N2[:, 1].roll(half))[:, None]
        gradient_ND.sub_(open_N1 * rows_ND.roll(half, 0), alpha=1 / num_negatives)


def nearest_semi_hard(
    rows_ND: torch.Tensor, keys: Keys, *, other_view: bool, ranking: Ranking | None = None
) -> torch.Tensor:
    """Return the two candidates for each anchor's semi-hard negative among these keys.

    Returns:
        (N, 4) float64: the largest similarity below the positive's and its place in the world, the
        least similarity of all negatives and its place; -inf and +inf where there is none.
    """
    below_N = threshold(positives(rows_ND))
    none = torch.tensor([float("-inf"), 0, float("inf"), 0], dtype=torch.float64)
    best_N4 = none.to(rows_ND.device).repeat(len(rows_ND), 1)
    for tile in tiles(rows_ND, keys, other_view=other_view):
        if ranking:
            ranking.add(tile)
        s = _negatives(tile, float("inf"))
        farther = s.masked_fill(s >= below_N[tile.rows, None], float("-inf"))
        sides = [*farther.max(1), *s.min(1)]
        found_I4 = torch.stack([side.double() for side in sides], 1)
        found_I4[:, 1::2] += keys.start + tile.columns.start
        best_N4[tile.rows] = merge_semi_hard(best_N4[tile.rows], found_I4)
    return best_N4


def merge_semi_hard(a_N4: torch.Tensor, b_N4: torch.Tensor) -> torch.Tensor:
    """Return the better candidates of two sets of keys; of equals the first."""
    below_N1 = b_N4[:, :1] > a_N4[:, :1]
    least_N1 = b_N4[:, 2:3] < a_N4[:, 2:3]
    return torch.where(torch.cat([below_N1, below_N1, least_N1, least_N1], 1), b_N4, a_N4)


def semi_hard_gradient(
    gradient_ND: torch.Tensor,
    rows_ND: torch.Tensor,
    shared_N3: torch.Tensor,
    keys: Keys,
    start: int,
) -> None:
    """Add each row's gradient; see :func:`logistic_gradient`.

    Args:
        gradient_ND: What is added to.
        rows_ND: Anchors.
        shared_N3: Of each anchor, float64: the place of its negative in the world, and the
            derivatives of its loss by the similarity to that negative and to its positive.
        keys: Rows, with the same three numbers in ``shared_MK``.
        start: Place of the first anchor in the world.
    """
    assert keys.shared_MK is not None
    num_rows, dtype = len(rows_ND), rows_ND.dtype
    here_N = shared_N3[:, 0].long() - keys.start  # our anchors' negatives among these keys
    ours_I = ((here_N >= 0) & (here_N < len(keys.rows_MD))).nonzero()[:, 0]
    pull_I1 = shared_N3[ours_I, 1:2].to(dtype)
    gradient_ND.index_add_(0, ours_I, pull_I1 * keys.rows_MD[here_N[ours_I]])
    place_M = keys.shared_MK[:, 0].long() - start  # these keys' negatives among our anchors
    theirs_K = ((place_M >= 0) & (place_M < num_rows)).nonzero()[:, 0]
    pull_K1 = keys.shared_MK[theirs_K, 1:2].to(dtype)
    gradient_ND.index_add_(0, place_M[theirs_K], pull_K1 * keys.rows_MD[theirs_K])
    if keys.own is not None:
        pull_N1 = (shared_N3[:, 2] + shared_N3[:, 2].roll(num_rows // 2)).to(dtype)[:, None]
        gradient_ND.add_(pull_N1 * rows_ND.roll(num_rows // 2, 0))


def _negatives(tile: Tile, other: float = float("-inf")) -> torch.Tensor:
    """Return the similarities, those to anchors themselves and positives replaced by another."""
    return tile.s_block.fill_diagonal_(other) if tile.diagonal else tile.s_block
