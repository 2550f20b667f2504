"""Weighted nearest neighbours (Wu et al. 2018): no training, no rate to tune."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from fastclr.config import ConfigError
from fastclr.evaluation.features import Features, check_pair

NEIGHBOURS, TEMPERATURE = 20, 0.07
NEIGHBOURS_GRID, TEMPERATURE_GRID = (1, 5, 10, 20, 50, 100, 200), (0.02, 0.05, 0.07, 0.1, 0.2, 1.0)
PROTOCOL = (
    f"Vote of the {NEIGHBOURS} nearest training images by cosine similarity of un-augmented "
    f"features, weighted by exp(similarity / {TEMPERATURE}). Accuracy on the whole test set."
)

_QUERIES, _KEYS, _FIRST_KEYS = 1024, 8192, 1024  # rows of a block

Found = Iterator[tuple[torch.Tensor, torch.Tensor]]


def knn_accuracy(
    train: Features,
    test: Features,
    *,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    impl: str = "torch",
    block: int = _QUERIES,
) -> float:
    """Return the top-1 test accuracy, 0..1, of the weighted vote; see :func:`knn_scores`."""
    scores = knn_scores(
        train, test, neighbours=(neighbours,), temperatures=(temperature,), impl=impl, block=block
    )
    return scores[neighbours, temperature]


@torch.inference_mode()
def knn_scores(
    train: Features,
    test: Features,
    *,
    neighbours: Sequence[int] = NEIGHBOURS_GRID,
    temperatures: Sequence[float] = TEMPERATURE_GRID,
    impl: str = "torch",
    device: torch.device = torch.device("cpu"),  # noqa: B008
    block: int = _QUERIES,
) -> dict[tuple[int, float], float]:
    """Return the top-1 test accuracy, 0..1, for every (neighbours, temperature), in one pass.

    A test image's neighbours are the training images of highest cosine similarity; of equals the
    first. They vote for their labels with weight exp(similarity / temperature); of classes with
    equal votes the first wins. ``torch`` streams blocks of training rows, which may lie in a file,
    past blocks of test rows: beside the features it needs about 200 MB whatever their number.

    Args:
        train: Labelled features, finite.
        test: Labelled features of the same width.
        neighbours: How many vote, 1 or more; all if there are fewer.
        temperatures: Divide the similarities in the weights, > 0.
        impl: Key of :data:`IMPLEMENTATIONS`.
        device: Where ``torch`` compares.
        block: Test rows handled at a time.

    Raises:
        ConfigError: If the sets differ in width, labels are missing, a setting makes no sense, or
            the implementation is unknown or not installed.
        FloatingPointError: If a feature is not finite.
    """
    check_pair(train, test)
    _check_settings(neighbours, temperatures, impl)
    most = min(max(neighbours), len(train.label_X))
    key_label_X = torch.from_numpy(np.array(train.label_X))
    num_classes = int(max(train.label_X.max(), test.label_X.max())) + 1
    right = dict.fromkeys([(k, t) for k in neighbours for t in temperatures], 0)
    start = 0
    for similarity_NK, nearest_NK in IMPLEMENTATIONS[impl](train, test, most, block, device):
        truth_N = torch.from_numpy(np.array(test.label_X[start : start + len(nearest_NK)]))
        start += len(nearest_NK)
        label_NK = key_label_X[nearest_NK]
        for temperature in temperatures:
            votes = _votes(similarity_NK.double(), label_NK, num_classes, neighbours, temperature)
            for k, winner_N in votes:
                right[k, temperature] += int((winner_N == truth_N).sum())
    return {setting: count / len(test.label_X) for setting, count in right.items()}


def nearest(
    train: Features,
    test: Features,
    most: int,
    *,
    impl: str = "torch",
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return cosine similarities, falling, and rows of the nearest training images of each query.

    Args:
        train: Features that are found.
        test: Features that are looked for.
        most: How many of each; all if there are fewer.
        impl: Key of :data:`IMPLEMENTATIONS`.
        device: Where ``torch`` compares.

    Returns:
        Both (X, most); of equals the first row comes first.

    Raises:
        ConfigError: As :func:`knn_scores`.
        FloatingPointError: If a feature is not finite.
    """
    check_pair(train, test)
    _check_settings((most,), (TEMPERATURE,), impl)
    most = min(most, len(train.label_X))
    found = list(IMPLEMENTATIONS[impl](train, test, most, _QUERIES, device))
    similarity_XK, row_XK = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    return similarity_XK, row_XK


def _check_settings(neighbours: Sequence[int], temperatures: Sequence[float], impl: str) -> None:
    """Refuse a grid that makes no sense."""
    if impl not in IMPLEMENTATIONS:
        raise ConfigError(
            f"nearest neighbours by {impl!r} are unknown: choose {', '.join(IMPLEMENTATIONS)}."
        )
    if min(neighbours, default=0) < 1 or not min(temperatures, default=0) > 0:
        raise ConfigError(
            f"{list(neighbours)} neighbours at temperatures {list(temperatures)} cannot vote: give "
            "1 or more neighbours and temperatures above 0."
        )


def _votes(
    similarity_NK: torch.Tensor,
    label_NK: torch.Tensor,
    num_classes: int,
    neighbours: Sequence[int],
    temperature: float,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the winners (N,) for each number of neighbours; each neighbour is counted once."""
    # Divided by the nearest one's weight, which changes no order: exp(1 / 0.001) is infinite.
    weight_NK = ((similarity_NK - similarity_NK[:, :1]) / temperature).exp()
    votes_NC = weight_NK.new_zeros(len(weight_NK), num_classes)
    counted = 0
    for k in sorted(set(neighbours)):
        votes_NC.scatter_add_(1, label_NK[:, counted:k], weight_NK[:, counted:k])
        counted = k
        yield k, votes_NC.argmax(1)


def _by_torch(
    train: Features, test: Features, most: int, block: int, device: torch.device
) -> Found:
    """Yield similarities, descending, and rows of the nearest keys for each block of queries."""
    for query_NF in _unit_blocks(test.h_XF, block, block):
        query_NF = query_NF.to(device)
        best_NK = query_NF.new_empty(len(query_NF), 0)
        nearest_NK = torch.empty(len(query_NF), 0, dtype=torch.int64, device=device)
        first = 0
        for key_MF in _unit_blocks(train.h_XF, _FIRST_KEYS, _KEYS):
            best_NK, nearest_NK = _merge(
                best_NK, nearest_NK, query_NF @ key_MF.to(device).T, first, most
            )
            first += len(key_MF)
        yield best_NK.cpu(), nearest_NK.cpu()


def _merge(
    best_NK: torch.Tensor,
    nearest_NK: torch.Tensor,
    similarity_NM: torch.Tensor,
    first: int,
    most: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the best so far with a block of later keys; of equals the earlier keys stay."""
    num_rows = len(best_NK)
    if best_NK.shape[1] < most:
        bar_N1 = best_NK.new_full((num_rows, 1), -torch.inf)
    else:
        bar_N1 = best_NK[:, -1:]
    # Few pass once some blocks have been seen: k / seen of the keys.
    row_P, column_P = (similarity_NM > bar_N1).nonzero(as_tuple=True)
    count_N = torch.bincount(row_P, minlength=num_rows)
    place_P = torch.arange(len(row_P), device=row_P.device)
    place_P = place_P - (count_N.cumsum(0) - count_N)[row_P] + best_NK.shape[1]
    width = best_NK.shape[1] + int(count_N.max())
    value_NW = best_NK.new_full((num_rows, width), -torch.inf)
    key_NW = nearest_NK.new_zeros(num_rows, width)
    value_NW[:, : best_NK.shape[1]], key_NW[:, : best_NK.shape[1]] = best_NK, nearest_NK
    value_NW[row_P, place_P] = similarity_NM[row_P, column_P]
    key_NW[row_P, place_P] = column_P + first
    value_NW, order_NW = value_NW.sort(dim=1, descending=True, stable=True)
    return value_NW[:, :most].contiguous(), key_NW.gather(1, order_NW[:, :most])


def _unit_blocks(h_XF: npt.NDArray[np.float32], first: int, most: int) -> Iterator[torch.Tensor]:
    """Yield rows of length 1 in blocks that double from ``first`` to ``most`` rows."""
    start, size = 0, first
    while start < len(h_XF):
        yield F.normalize(torch.from_numpy(np.array(h_XF[start : start + size])), dim=1)
        start, size = start + size, min(2 * size, most)


def _by_faiss(
    train: Features, test: Features, most: int, block: int, device: torch.device
) -> Found:
    """Yield what faiss's exact index finds; it holds a copy of the training rows."""
    try:
        faiss: Any = importlib.import_module("faiss")
    except ImportError as error:
        raise ConfigError(
            f"faiss cannot be imported ({error}): install faiss-cpu or faiss-gpu, or take impl "
            "torch, which finds the same neighbours."
        ) from error
    index = faiss.IndexFlatIP(train.h_XF.shape[1])
    for key_MF in _unit_blocks(train.h_XF, _KEYS, _KEYS):
        index.add(key_MF.numpy())
    for query_NF in _unit_blocks(test.h_XF, block, block):
        found_NK, row_NK = map(torch.from_numpy, index.search(query_NF.numpy(), most))
        row_NK, order_NK = row_NK.sort(dim=1)  # of equals the first, as far as faiss found them
        best_NK, order_NK2 = found_NK.gather(1, order_NK).sort(dim=1, descending=True, stable=True)
        yield best_NK, row_NK.gather(1, order_NK2)


IMPLEMENTATIONS: dict[str, Callable[[Features, Features, int, int, torch.device], Found]] = {
    "torch": _by_torch,
    "faiss": _by_faiss,
}
