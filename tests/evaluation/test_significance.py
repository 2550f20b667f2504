"""The paired permutation test is scipy's, exact where there are few pairs."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import scipy.stats

from fastclr.config import ConfigError
from fastclr.evaluation.scoring import mean_per_class
from fastclr.evaluation.significance import paired_permutation


def answers(num_images: int, only_a: int, only_b: int, seed: int = 0):
    """Return who is right: so many images each alone, the others both or none."""
    rng = np.random.default_rng(seed)
    a = rng.random(num_images) < 0.6
    b = a.copy()
    rows = rng.permutation(num_images)
    a[rows[:only_a]], b[rows[:only_a]] = True, False
    rows = rows[only_a : only_a + only_b]
    a[rows], b[rows] = False, True
    return a, b


def of_scipy(a, b, statistic, **settings):
    return scipy.stats.permutation_test(
        (a.astype(float), b.astype(float)), statistic, permutation_type="samples",
        alternative="two-sided", vectorized=False, **settings,
    )  # fmt: skip


@pytest.mark.parametrize(("only_a", "only_b"), [(7, 2), (3, 3), (8, 0), (0, 1), (0, 0)])
def test_few_pairs_are_exact(only_a, only_b):
    a, b = answers(400, only_a, only_b)
    found = paired_permutation(a, b)
    assert found.is_exact and found.num_different == only_a + only_b
    assert found.difference == pytest.approx(a.mean() - b.mean())
    binomial = scipy.stats.binomtest(only_a, only_a + only_b) if only_a + only_b else None
    assert found.p_value == pytest.approx(binomial.pvalue if binomial else 1.0)


def test_few_pairs_equal_scipys():
    a, b = answers(12, 5, 2)
    expected = of_scipy(a, b, lambda x, y: x.mean() - y.mean(), n_resamples=np.inf)
    found = paired_permutation(a, b)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.difference == pytest.approx(expected.statistic)


@pytest.mark.parametrize(("only_a", "only_b"), [(70, 45), (300, 290), (60, 20)])
def test_many_pairs_equal_scipys_and_the_binomial_within_sampling_error(only_a, only_b):
    a, b = answers(1000, only_a, only_b)
    found = paired_permutation(a, b)
    exact = scipy.stats.binomtest(only_a, only_a + only_b).pvalue
    error = 4 * math.sqrt(exact * (1 - exact) / 100_000) + 2e-5
    assert not found.is_exact and abs(found.p_value - exact) < error
    sampled = of_scipy(a, b, lambda x, y: x.mean() - y.mean(), n_resamples=2000, rng=0).pvalue
    assert abs(found.p_value - sampled) < 5 * math.sqrt(exact * (1 - exact) / 2000) + 2e-3


@pytest.mark.parametrize("num_different", [9, 90])
def test_the_mean_over_classes_is_what_is_compared(num_different):
    rng = np.random.default_rng(1)
    label_X = rng.choice(3, 200, p=[0.7, 0.2, 0.1]) * 2
    a, b = answers(200, num_different * 2 // 3, num_different // 3)
    rows = np.flatnonzero(a != b)
    found = paired_permutation(a, b, label_X)
    right = [mean_per_class(np.where(x, label_X, -1), label_X) for x in (a, b)]
    assert found.difference == pytest.approx(right[0] - right[1])
    weight_C = {k: 1 / (3 * (label_X == k).sum()) for k in (0, 2, 4)}
    weight_X = np.array([weight_C[k] for k in label_X[rows]])
    signs = 2 * rng.integers(0, 2, (40_000, len(rows))) - 1
    p_value = (np.abs(signs @ weight_X) >= abs(found.difference) - 1e-12).mean()
    assert found.p_value == pytest.approx(p_value, abs=5 * math.sqrt(0.25 / 40_000))
    assert found.p_value != pytest.approx(paired_permutation(a, b).p_value, rel=0.2)


def test_it_is_the_same_again_and_the_same_the_other_way_round():
    a, b = answers(5000, 200, 240)
    assert paired_permutation(a, b) == paired_permutation(a, b)
    assert paired_permutation(a, b, seed=1).p_value != paired_permutation(a, b).p_value
    there, back = paired_permutation(a, b), paired_permutation(b, a)
    assert (there.difference, there.p_value) == (-back.difference, back.p_value)


def test_it_is_never_certain_from_samples():
    a = np.ones(500, bool)
    assert paired_permutation(a, ~a).p_value == pytest.approx(1 / 100_001)


def test_a_large_test_set_takes_no_time():
    started = time.process_time()
    a, b = answers(1_000_000, 40_000, 40_500)
    paired_permutation(a, b, np.arange(1_000_000) % 100)
    assert time.process_time() - started < 8


def test_other_images_are_refused():
    with pytest.raises(ConfigError, match="answers to 3 and 2 images"):
        paired_permutation(np.ones(3, bool), np.ones(2, bool))
    with pytest.raises(ConfigError, match="answers to 0 and 0 images"):
        paired_permutation(np.ones(0, bool), np.ones(0, bool))
