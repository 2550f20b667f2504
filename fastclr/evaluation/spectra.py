"""Singular spectra of layers and head weights, and the numbers that stand beside pictures."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits
from torch import nn

from fastclr.evaluation import collapse

_BLOCK = 2**15  # rows at a time, in float64

Array: TypeAlias = npt.NDArray[np.float64]


class Numbers(NamedTuple):
    """What a picture of a layer shows, in numbers.

    Attributes:
        silhouette: How much nearer images are to their own class than to the next one, by cosine
            distance, -1..1 (Rousseeuw 1987); NaN where classes are fewer than 2 or all of one
            image.
        effective_rank: :func:`effective_rank` of the covariance, 1..min(X, F); 0 if it is zero.
        rankme: :func:`.collapse.effective_rank` of the features, whose mean is not taken away
            (Garrido et al. 2023).
        alignment: :func:`.collapse.alignment` of two views, 0..4.
        uniformity: :func:`.collapse.uniformity` of one view, -8..0, the mean of both.
    """

    silhouette: float
    effective_rank: float
    rankme: float
    alignment: float
    uniformity: float


def covariance_spectrum(h_XF: npt.NDArray[np.floating]) -> Array:
    """Return the singular values of the covariance of features, falling; float64 (F,).

    They are the variances along the principal axes. Source: Jing et al. 2022, "Understanding
    dimensional collapse in contrastive self-supervised learning", section 4.

    Args:
        h_XF: Finite features; a block is in memory at a time.
    """
    mean_F = h_XF.mean(0, dtype=np.float64)
    covariance_FF = np.zeros((h_XF.shape[1],) * 2)
    for start in range(0, len(h_XF), _BLOCK):
        centred_NF = h_XF[start : start + _BLOCK] - mean_F
        covariance_FF += centred_NF.T @ centred_NF
    with threadpool_limits(1, user_api="blas"):  # LAPACK's threads wait for each other
        return np.linalg.eigvalsh(covariance_FF / len(h_XF))[::-1].clip(min=0)


def weight_spectra(head: nn.Module) -> dict[str, Array]:
    """Return the singular values of every linear layer of a head, falling, by its name."""
    return {
        name: torch.linalg.svdvals(module.weight.detach().cpu().double()).numpy()
        for name, module in head.named_modules()
        if isinstance(module, nn.Linear)
    }


def effective_rank(spectrum_K: Array) -> float:
    """Return exp of the entropy of singular values divided by their sum; 0 for zeros.

    Source: Roy & Vetterli 2007, "The effective rank".
    """
    if not spectrum_K.any():
        return 0.0
    share_K = spectrum_K[spectrum_K > 0] / spectrum_K.sum()
    return float(np.exp(-(share_K * np.log(share_K)).sum()))


def numbers(
    h_XF: npt.NDArray[np.floating], label_X: npt.NDArray[np.int64], views_NF: torch.Tensor
) -> Numbers:
    """Return all numbers of a layer; O(X^2 F), for a few thousand images.

    Args:
        h_XF: Features of labelled images.
        label_X: Their labels.
        views_NF: Features of other rows, two views of N/2 images: row i + N/2 is of row i's.
    """
    halves = views_NF.tensor_split(2)
    num_classes = len(np.unique(label_X))
    has_silhouette = 2 <= num_classes < len(label_X)
    return Numbers(
        silhouette=float(silhouette_score(h_XF, label_X, metric="cosine"))
        if has_silhouette
        else float("nan"),
        effective_rank=effective_rank(covariance_spectrum(h_XF)),
        rankme=collapse.effective_rank(torch.from_numpy(np.array(h_XF))),
        alignment=collapse.alignment(views_NF),
        uniformity=sum(collapse.uniformity(view) for view in halves) / 2,
    )
