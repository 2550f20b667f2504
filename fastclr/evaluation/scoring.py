"""What a protocol's answers are worth: the metrics of data sets, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fastclr.config import ConfigError

Int64: TypeAlias = npt.NDArray[np.int64]


def top1(answer_X: Int64, label_X: Int64) -> float:
    """Return the share of right answers, 0..1."""
    return float((answer_X == label_X).mean())


def mean_per_class(answer_X: Int64, label_X: Int64) -> float:
    """Return the share of right answers of each class there is, averaged over classes, 0..1."""
    known_C, class_X = np.unique(label_X, return_inverse=True)
    right_C = np.bincount(class_X, answer_X == label_X, len(known_C))
    return float((right_C / np.bincount(class_X)).mean())


METRICS: dict[str, Callable[[Int64, Int64], float]] = {
    "top1": top1,
    "mean_per_class": mean_per_class,
}


def metric(name: str) -> Callable[[Int64, Int64], float]:
    """Return a metric by name.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in METRICS:
        raise ConfigError(f"metric {name!r} is unknown: choose from {', '.join(METRICS)}.")
    return METRICS[name]
