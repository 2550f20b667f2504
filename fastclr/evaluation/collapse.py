"""Monitors of collapse: how much of their space representations and projections still use."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits

_BLOCK = 1024  # rows compared with all others at a time


class Monitors(NamedTuple):
    """Monitors of N rows of representations h and projections z, of N/2 images in two views.

    Attributes:
        h_effective_rank: :func:`effective_rank` of h, 0..min(N, F).
        z_effective_rank: The same of z, 0..min(N, D).
        h_std: :func:`unit_std` of h, 0..1.
        z_std: The same of z, 0..1.
        alignment: :func:`alignment` of z, 0..4.
        uniformity: :func:`uniformity` of z, -8..0, the mean over both views as in the authors'
            code: rows of one view are independent of each other.
    """

    h_effective_rank: float
    z_effective_rank: float
    h_std: float
    z_std: float
    alignment: float
    uniformity: float


def monitors(h_NF: torch.Tensor, z_ND: torch.Tensor) -> Monitors:
    """Return all monitors of view-major rows: the positive of row i is row i + N/2.

    Quick for about 1,000 rows, which say enough: O(N^2 (F + D)), and as much memory as N^2.

    Args:
        h_NF: Representations, floating point, on any device.
        z_ND: Projections of the same images.

    Returns:
        Finite numbers for finite rows, also where all are equal, zero, or missing; NaN in those
        that rest on rows which are not finite.

    Raises:
        ValueError: If N is odd and not 1.
    """
    views = z_ND.tensor_split(2)
    return Monitors(
        h_effective_rank=effective_rank(h_NF),
        z_effective_rank=effective_rank(z_ND),
        h_std=unit_std(h_NF),
        z_std=unit_std(z_ND),
        alignment=alignment(z_ND),
        uniformity=sum(uniformity(view) for view in views) / len(views),
    )


def _monitor(compute: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], float]:
    """Compute a monitor in float64; NaN where a row is not finite, 0 where there is no row."""

    @functools.wraps(compute)
    @torch.no_grad()
    def monitor(rows_ND: torch.Tensor) -> float:
        if not rows_ND.isfinite().all():
            return math.nan  # a decomposition would raise, or never end
        return compute(rows_ND.double()).item() if len(rows_ND) else 0.0

    return monitor


@_monitor
def unit_std(rows_ND: torch.Tensor) -> torch.Tensor:
    """Return sqrt(D) times the standard deviation of rows of length 1, averaged over dimensions.

    1 where they are spread evenly over the sphere; 0 where all point one way, as does a single row.
    A row of zeros stays one. Source: Chen & He 2021, "Exploring Simple Siamese Representation
    Learning", section 4.1.
    """
    return _unit(rows_ND).std(0, correction=0).mean() * rows_ND.shape[1] ** 0.5


@_monitor
def effective_rank(rows_ND: torch.Tensor) -> torch.Tensor:
    """Return exp of the entropy of the singular values divided by their sum.

    Between 1 (all rows along one line, or a single row) and min(N, D); 0 for zeros. The mean is not
    taken away. Sources: Roy & Vetterli 2007, "The effective rank"; as a monitor of representations
    Garrido et al. 2023, "RankMe".
    """
    tall = len(rows_ND) > rows_ND.shape[1]
    gram_KK = rows_ND.T @ rows_ND if tall else rows_ND @ rows_ND.T
    # Seven times quicker than a decomposition of the rows, and exact to 1e-7 of the largest: as
    # exact as float32 rows are. What lies below is their rounding. On one thread: beside a
    # training, LAPACK's threads wait for each other most of the time.
    with threadpool_limits(1, user_api="blas"):
        square_K = torch.from_numpy(np.linalg.eigvalsh(gram_KK.cpu().numpy()))
    singular_K = square_K.clamp(min=0).sqrt()
    singular_K = singular_K * (singular_K > 1e-7 * singular_K.max())
    if not singular_K.any():
        return singular_K.new_zeros(())
    return torch.special.entr(singular_K / singular_K.sum()).sum().exp()


@_monitor
def alignment(z_ND: torch.Tensor) -> torch.Tensor:
    """Return the mean squared distance of positives, rows i and i + N/2 scaled to length 1.

    Between 0 (views of an image are one) and 4; 2 for directions that know nothing of each other,
    0 for a single row. Source: Wang & Isola 2020, "Understanding Contrastive Representation
    Learning through Alignment and Uniformity", equation 1 of section 4.1 with alpha = 2.

    Raises:
        ValueError: If N is odd and not 1.
    """
    if len(z_ND) % 2 and len(z_ND) > 1:
        raise ValueError(f"{len(z_ND)} rows are not two views of each image: give both views.")
    unit_ND = _unit(z_ND)
    return (unit_ND - unit_ND.roll(len(z_ND) // 2, 0)).square().sum(1).mean()


@_monitor
def uniformity(rows_ND: torch.Tensor) -> torch.Tensor:
    """Return log of the mean of exp(-2 d^2) over all pairs of rows scaled to length 1.

    Between -8 and 0, where all rows are alike or there is only one; about -4 for an even spread
    over a sphere of many dimensions. Memory is linear in N. Source: Wang & Isola 2020, section 4.1,
    with t = 2.
    """
    num_rows = len(rows_ND)
    unit_ND, total = _unit(rows_ND), rows_ND.new_zeros(())
    if num_rows == 1:
        return total
    for start in range(0, num_rows, _BLOCK):
        distance_BN = torch.cdist(unit_ND[start : start + _BLOCK], unit_ND[start:])
        total += distance_BN.square().mul(-2).exp().triu(1).sum()
    return (total / (num_rows * (num_rows - 1) / 2)).log()


def _unit(rows_ND: torch.Tensor) -> torch.Tensor:
    """Scale rows to length 1; those shorter than 1e-12 stay about 0."""
    return F.normalize(rows_ND, dim=1)
