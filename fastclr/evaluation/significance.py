"""Whether one encoder is better than another on the same images, or it may be chance."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fastclr.config import ConfigError
from fastclr.evaluation.draws import Int64

NUM_SAMPLES = 100_000
PROTOCOL = (
    f"Paired permutation test, two-sided: the answers of two encoders to an image are exchanged at "
    f"random, {NUM_SAMPLES:,} times, or in all ways where these are no more. Chen et al. 2020, B.8."
)
_BLOCK_DRAWS = 2**22  # numbers drawn at a time
_ROUNDING = 1e-12

Bool: TypeAlias = npt.NDArray[np.bool_]


class Significance(NamedTuple):
    """Result of a paired permutation test.

    Attributes:
        difference: Score of the first minus score of the second, -1..1.
        p_value: Chance of a difference as large, either way, if the encoders were equally good.
        num_different: Images that one answers right and the other wrong; no other image matters.
        is_exact: Whether all exchanges were counted, not a sample.
    """

    difference: float
    p_value: float
    num_different: int
    is_exact: bool


def paired_permutation(
    right_a_X: Bool,
    right_b_X: Bool,
    label_X: Int64 | None = None,
    *,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
) -> Significance:
    """Compare the scores of two encoders on the same images; see :data:`PROTOCOL`.

    With ``label_X`` the score is the accuracy averaged over classes, else over images. A pair's
    exchange flips the sign of its difference; pairs of equal weight are flipped together, by one
    binomial number, so that a sample costs a number a class, not one an image.

    Args:
        right_a_X: Whether the first answers image x right.
        right_b_X: The same of the second.
        label_X: Labels, for the mean over classes.
        num_samples: Exchanges that are sampled.
        seed: Seed of the samples.

    Returns:
        The same for the same arguments. A sampled p-value counts the observed difference as one of
        the samples, and is never 0.

    Raises:
        ConfigError: If the encoders answered other numbers of images, or none.
    """
    if not len(right_a_X) == len(right_b_X) == len(right_a_X if label_X is None else label_X) > 0:
        raise ConfigError(
            f"answers to {len(right_a_X)} and {len(right_b_X)} images cannot be compared in pairs: "
            "score both encoders on the same images, one or more."
        )
    pair_X = right_a_X.astype(np.int64) - right_b_X
    class_X = np.zeros_like(pair_X)
    if label_X is not None:
        _, class_X = np.unique(label_X, return_inverse=True)
    weight_C = 1 / (np.bincount(class_X) * (class_X.max() + 1))
    observed = float(weight_C @ np.bincount(class_X, pair_X, len(weight_C)))
    differs_X = pair_X != 0
    count_C = np.bincount(class_X[differs_X], minlength=len(weight_C))
    num_different = int(differs_X.sum())
    is_exact = num_different <= 20 and 2**num_different <= num_samples
    if is_exact:
        weight_X = weight_C[class_X[differs_X]]
        flips = np.arange(2**num_different)[:, None] >> np.arange(num_different) & 1
        p_value = float(_as_large((2 * flips - 1) @ weight_X, observed).mean())
    else:
        found = _sampled(count_C, weight_C, observed, num_samples, seed)
        p_value = (found + 1) / (num_samples + 1)
    return Significance(observed, p_value, num_different, is_exact)


def _sampled(
    count_C: Int64, weight_C: npt.NDArray[np.float64], observed: float, num_samples: int, seed: int
) -> int:
    """Return how many samples differ as much as was observed."""
    rng = np.random.Generator(np.random.Philox(seed))
    count_C, weight_C = count_C[count_C > 0], weight_C[count_C > 0]
    found, block = 0, max(1, _BLOCK_DRAWS // len(count_C))
    for start in range(0, num_samples, block):
        size = (min(block, num_samples - start), len(count_C))
        ups = rng.binomial(count_C, 0.5, size)
        found += int(_as_large((2 * ups - count_C) @ weight_C, observed).sum())
    return found


def _as_large(samples: npt.NDArray[np.float64], observed: float) -> Bool:
    """Tell which differences are as large either way, up to rounding."""
    return np.abs(samples) >= abs(observed) - _ROUNDING
