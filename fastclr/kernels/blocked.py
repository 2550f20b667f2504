"""NT-Xent tile by tile, never the matrix: O(M D) memory on any device.

Anchors and keys are the same rows v (unit rows / sqrt(temperature)), so the similarities
s_ik = v_i.v_k are symmetric. With Z_i = sum over k != i of exp(s_ik) and p(i) the positive of i,

    loss_i = ln Z_i - s_ip
    dL/dv  = (W v - 2 v_p) / M,   W_ik = exp(s_ik) (1/Z_i + 1/Z_k)

so one more pass over the tiles gives the whole gradient, row by row, from Z alone. Unit rows bound
the similarities: no running maximum is needed while exp(+-1/temperature) is in range. Elsewhere the
logarithm of Z is kept instead, at the price of a second exponential.
"""

from __future__ import annotations

import torch

from fastclr.kernels.ranking import Ranking
from fastclr.kernels.tiles import Keys, tiles

# Above these, exp(1/t) times a billion rows and exp(-1/t) are normal numbers.
LOWEST_TEMPERATURE = {torch.float32: 1 / 64, torch.float64: 1 / 600}


def nt_xent_sums(
    rows_ND: torch.Tensor,
    keys: Keys,
    *,
    bounded: bool,
    other_view: bool,
    ranking: Ranking | None = None,
) -> torch.Tensor:
    """Return each anchor's Z over these keys, or its logarithm where similarities are unbounded.

    Args:
        rows_ND: Anchors, float32 or float64, view-major.
        keys: Rows to compare them with.
        bounded: Whether no similarity exceeds 1 / :data:`LOWEST_TEMPERATURE`.
        other_view: Leave out the keys of the anchor's own view.
        ranking: Takes note of the same tiles.
    """
    sum_N = rows_ND.new_full((len(rows_ND),), 0 if bounded else float("-inf"))
    for tile in tiles(rows_ND, keys, symmetric=True, other_view=other_view):
        if ranking:
            ranking.add(tile)
        s = tile.s_block
        if tile.diagonal and tile.same_view:
            s.fill_diagonal_(float("-inf"))
        sides = [(tile.rows, 1)] + [(tile.columns, 0)] * tile.mirrored
        if bounded:
            s.exp_()
            for side, dim in sides:
                sum_N[side] += s.sum(dim)
        else:
            for side, dim in sides:
                sum_N[side] = torch.logaddexp(sum_N[side], s.logsumexp(dim))
    return sum_N


def nt_xent_gradient(
    gradient_ND: torch.Tensor,
    rows_ND: torch.Tensor,
    sum_N: torch.Tensor,
    keys: Keys,
    *,
    bounded: bool,
    other_view: bool,
) -> None:
    """Add W v, and -2 v_p where the keys are ours; see the module's docstring.

    Args:
        gradient_ND: What is added to.
        rows_ND: Anchors, as for :func:`nt_xent_sums`.
        sum_N: Z of the anchors over all keys of the world, from :func:`nt_xent_sums`.
        keys: Rows, with their Z, (M, 1), in ``shared_MK``.
        bounded: As for :func:`nt_xent_sums`.
        other_view: As for :func:`nt_xent_sums`.
    """
    assert keys.shared_MK is not None
    z_N, z_M = sum_N, keys.shared_MK[:, 0]
    if bounded:
        z_N, z_M = 1 / z_N, 1 / z_M
    if keys.own is not None:
        gradient_ND.sub_(rows_ND.roll(len(rows_ND) // 2, 0), alpha=2)
    buffer = torch.empty(0, dtype=rows_ND.dtype, device=rows_ND.device)
    for tile in tiles(rows_ND, keys, symmetric=True, other_view=other_view):
        w, a_I1, b_K = tile.s_block, z_N[tile.rows, None], z_M[tile.columns]
        if tile.diagonal and tile.same_view:
            w.fill_diagonal_(float("-inf"))
        if buffer.numel() < w.numel():
            buffer = torch.empty_like(w).flatten()
        other = buffer[: w.numel()].view_as(w)
        if bounded:
            w.exp_().mul_(torch.add(a_I1, b_K, out=other))
        else:
            torch.sub(w, b_K, out=other)
            w.sub_(a_I1).exp_().add_(other.exp_())
        gradient_ND[tile.rows].addmm_(w, keys.rows_MD[tile.columns])
        if tile.mirrored:
            gradient_ND[tile.columns].addmm_(w.T, rows_ND[tile.rows])
