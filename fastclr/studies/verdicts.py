"""Whether scores support a claim: paired differences over seeds, never a maximum over a grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from fastclr.studies.study import Claim

LEAST_SEEDS = 3
CONFIDENCE = 0.95
HOLDS, FAILS, NOISE = "holds", "does not hold", "within noise"
RULE = (
    "A verdict rests on the differences between runs of the same seed, which share the order of "
    "images, the numbers of the views and the encoder's first weights; of several arms the mean is "
    f"taken, never the best. A claim holds, or does not, where the one-sided {CONFIDENCE:.0%} "
    "interval of Student's t over the seeds says so, and is within noise otherwise; an equality "
    f"holds where both such bounds lie within its distance. Fewer than {LEAST_SEEDS} seeds give no "
    "verdict."
)

Rows = Mapping[str, Mapping[int, Mapping[str, Any]]]  # arm -> seed -> scores


class Summary(NamedTuple):
    """A score of an arm over seeds.

    Attributes:
        mean: Mean; NaN without seeds.
        error: Standard error of the mean; NaN for fewer than two seeds.
        num_seeds: Seeds.
    """

    mean: float
    error: float
    num_seeds: int


class Verdict(NamedTuple):
    """What became of a claim.

    Attributes:
        claim: The claim.
        difference: Mean paired difference.
        error: Its standard error.
        num_seeds: Seeds that all of its arms have.
        word: The verdict, or why there is none.
    """

    claim: Claim
    difference: float
    error: float
    num_seeds: int
    word: str


def value_at(scores: Mapping[str, Any], path: str) -> float:
    """Return a score by its path, such as ``h.linear``; NaN where there is none."""
    found: Any = scores
    for part in path.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return math.nan
        found = found[part]
    return float(found)


def summarise(values: Sequence[float]) -> Summary:
    """Return mean and standard error of values."""
    if not values:
        return Summary(math.nan, math.nan, 0)
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Summary(float(np.mean(values)), float(error), len(values))


def differences(claim: Claim, rows: Rows) -> list[float]:
    """Return a claim's difference for each seed that all of its arms have."""
    seeds = set.intersection(*(set(rows.get(arm, {})) for arm in (*claim.arms, *claim.than)))
    found = []
    for seed in sorted(seeds):
        ours = [value_at(rows[arm][seed], claim.score) for arm in claim.arms]
        path = claim.than_score or claim.score
        theirs = [value_at(rows[arm][seed], path) for arm in claim.than] or [claim.constant]
        found.append(float(np.mean(ours) - np.mean(theirs)))
    return found


def judge(claim: Claim, rows: Rows) -> Verdict:
    """Judge a claim; see :data:`RULE`."""
    values = differences(claim, rows)
    mean, error, num_seeds = summarise(values)
    if claim.not_judged:
        word = f"not judged: {claim.not_judged}"
    elif num_seeds < LEAST_SEEDS:
        word = f"no verdict: {num_seeds} of {LEAST_SEEDS} seeds"
    elif not math.isfinite(mean):
        word = "no verdict: a score is missing"
    else:
        word = _word(claim, mean, error * float(scipy.stats.t.ppf(CONFIDENCE, num_seeds - 1)))
    return Verdict(claim, mean, error, num_seeds, word)


def _word(claim: Claim, mean: float, reach: float) -> str:
    """Return the verdict of an interval ``mean`` plus or minus ``reach``."""
    if claim.kind == "equal":
        if abs(mean) + reach <= claim.margin:
            return HOLDS
        return FAILS if abs(mean) - reach > claim.margin else NOISE
    if mean - reach > claim.margin:
        return HOLDS
    return FAILS if mean + reach <= claim.margin else NOISE
