"""NT-Xent in blocks of the similarity matrix, never the matrix: O(M D) memory on any device.

Anchors and keys are the same rows, so the matrix E_ik = exp((u_i.u_k - 1) / temperature) is
symmetric. With Z_i = sum over k != i of E_ik and p(i) the positive of i,

    loss_i = 1/temperature + ln Z_i - u_i.u_p(i) / temperature
    dL/du  = (W u - 2 u_p) / (M temperature),   W_ik = E_ik (1/Z_i + 1/Z_k)

so one more pass over the blocks gives the whole gradient, row by row, from Z alone. Unit rows have
the known maximum 1/temperature: no running maximum is needed (as long as exp(-2/temperature) is in
range), and where the anchors are all keys only the upper triangle is computed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK = 512

# exp(-2/t) stays a normal number above these; below, the reference takes over.
LOWEST_TEMPERATURE = {torch.float32: 0.025, torch.float64: 0.003}


def row_sums(
    u_ND: torch.Tensor, keys_MD: torch.Tensor, first: int, temperature: float
) -> torch.Tensor:
    """Return Z_N, the sums over all keys but the anchor itself; each in (0, M - 1].

    Args:
        u_ND: Anchors, unit rows, float32 or float64.
        keys_MD: All unit rows; rows first .. first + N are u_ND.
        first: Place of the anchors among the keys.
        temperature: At least :data:`LOWEST_TEMPERATURE` of the dtype.
    """
    sum_N = u_ND.new_zeros(len(u_ND))
    for rows, columns, e_block, mirrored in _blocks(u_ND, keys_MD, first, temperature):
        sum_N[rows] += e_block.sum(1)
        if mirrored:
            sum_N[columns] += e_block.sum(0)
    return sum_N


def gradient(
    u_ND: torch.Tensor,
    keys_MD: torch.Tensor,
    first: int,
    temperature: float,
    sum_M: torch.Tensor,
) -> torch.Tensor:
    """Return W u - 2 u_p for each anchor, (N, D); see the module's docstring.

    Args:
        u_ND: Anchors as for :func:`row_sums`, view-major.
        keys_MD: All unit rows.
        first: Place of the anchors among the keys.
        temperature: As for :func:`row_sums`.
        sum_M: Z of all keys, from :func:`row_sums` on every rank.
    """
    inverse_M = 1 / sum_M
    inverse_N = inverse_M[first : first + len(u_ND)]
    result_ND = u_ND.roll(len(u_ND) // 2, 0) * -2
    for rows, columns, w_block, mirrored in _blocks(u_ND, keys_MD, first, temperature):
        w_block *= inverse_N[rows, None] + inverse_M[columns]
        result_ND[rows].addmm_(w_block, keys_MD[columns])
        if mirrored:
            result_ND[columns].addmm_(w_block.T, u_ND[rows])
    return result_ND


def _blocks(
    u_ND: torch.Tensor, keys_MD: torch.Tensor, first: int, temperature: float
) -> Iterator[tuple[slice, slice, torch.Tensor, bool]]:
    """Yield (rows, columns, E of them, whether its mirror image counts too).

    The diagonal is 0. The block is the caller's to overwrite, until the next one is asked for.
    """
    num_rows, num_keys = len(u_ND), len(keys_MD)
    symmetric = num_rows == num_keys
    scale = 1 / temperature
    minus_one = u_ND.new_full((1, 1), -scale)
    for top in range(0, num_rows, BLOCK):
        rows = slice(top, min(top + BLOCK, num_rows))
        for left in range(top if symmetric else 0, num_keys, BLOCK):
            columns = slice(left, min(left + BLOCK, num_keys))
            e_block = torch.addmm(minus_one, u_ND[rows], keys_MD[columns].T, alpha=scale).exp_()
            offset = rows.start + first - columns.start  # of the anchors' own keys
            if -len(e_block) < offset < e_block.shape[1]:
                e_block.diagonal(offset).zero_()
            yield rows, columns, e_block, symmetric and left != top
