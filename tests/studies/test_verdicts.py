"""Verdicts are computed: paired over seeds, means over arms, never a maximum."""

from __future__ import annotations

import math

import pytest

from fastclr.studies.study import Claim
from fastclr.studies.verdicts import FAILS, HOLDS, NOISE, differences, judge, summarise, value_at


def rows(**arms):
    """Rows of arms from their scores by seed."""
    return {
        arm: {seed: {"h": {"linear": value}} for seed, value in enumerate(values)}
        for arm, values in arms.items()
    }


LARGER = Claim("a beats b", ("a",), ("b",))


def test_differences_are_of_the_same_seed():
    # Seeds differ by far more than arms: unpaired, nothing could be said.
    found = judge(LARGER, rows(a=[0.21, 0.52, 0.81], b=[0.20, 0.50, 0.80]))
    assert found.word == HOLDS
    assert found.difference == pytest.approx(0.04 / 3)
    assert found.error == pytest.approx(0.01 / 3)
    assert found.num_seeds == 3


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        ([0.5, 0.5, 0.5], [0.4, 0.41, 0.39], HOLDS),
        ([0.4, 0.41, 0.39], [0.5, 0.5, 0.5], FAILS),
        ([0.5, 0.4, 0.6], [0.5, 0.5, 0.5], NOISE),
        ([0.52, 0.5, 0.54], [0.5, 0.5, 0.5], NOISE),  # two of three seeds are better
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], FAILS),  # equal is not larger
    ],
)
def test_a_word_for_each_outcome(a, b, word):
    assert judge(LARGER, rows(a=a, b=b)).word == word


def test_the_interval_is_students():
    # Three seeds: mean must exceed 2.92 standard errors.
    error = 0.01 / math.sqrt(3)
    for mean, word in ((2.93 * error, HOLDS), (2.91 * error, NOISE)):
        assert judge(LARGER, rows(a=[mean - 0.01, mean, mean + 0.01], b=[0, 0, 0])).word == word


@pytest.mark.parametrize(
    ("a", "word"),
    [
        ([0.501, 0.5, 0.502], HOLDS),
        ([0.6, 0.61, 0.59], FAILS),
        ([0.4, 0.41, 0.39], FAILS),
        ([0.51, 0.49, 0.53], NOISE),
    ],
)
def test_equality_is_a_distance_that_both_bounds_keep(a, word):
    claim = Claim("a is b", ("a",), ("b",), margin=0.02, kind="equal")
    assert judge(claim, rows(a=a, b=[0.5, 0.5, 0.5])).word == word


def test_a_margin_has_to_be_exceeded():
    by_two = Claim("a beats b by 2", ("a",), ("b",), margin=0.02)
    assert judge(by_two, rows(a=[0.53, 0.53, 0.53], b=[0.5, 0.5, 0.5])).word == HOLDS
    assert judge(by_two, rows(a=[0.51, 0.51, 0.51], b=[0.5, 0.5, 0.5])).word == FAILS


def test_several_arms_count_by_their_mean_and_not_by_their_best():
    claim = Claim("a beats b", ("a1", "a2"), ("b1", "b2"))
    scores = rows(a1=[0.9] * 3, a2=[0.1] * 3, b1=[0.6] * 3, b2=[0.5] * 3)
    assert differences(claim, scores) == pytest.approx([-0.05] * 3)
    assert judge(claim, scores).word == FAILS


def test_only_seeds_that_all_arms_have_count():
    found = judge(LARGER, rows(a=[0.5, 0.6, 0.7, 0.8], b=[0.1, 0.1]))
    assert found.num_seeds == 2
    assert found.word == "no verdict: 2 of 3 seeds"
    assert judge(LARGER, rows(a=[0.5])).num_seeds == 0


def test_a_missing_score_is_no_verdict():
    claim = Claim("a beats b", ("a",), ("b",), score="z.linear")
    assert judge(claim, rows(a=[1, 1, 1], b=[0, 0, 0])).word == "no verdict: a score is missing"


def test_a_constant_and_another_path_can_be_compared_with():
    above = Claim("a is above a half", ("a",), constant=0.5)
    assert judge(above, rows(a=[0.6, 0.61, 0.62])).word == HOLDS
    scores = {"a": {s: {"h": {"linear": 0.5}, "z": {"linear": 0.4 + s / 100}} for s in range(3)}}
    of_one = Claim("h beats z", ("a",), ("a",), than_score="z.linear")
    assert differences(of_one, scores) == pytest.approx([0.1, 0.09, 0.08])


def test_what_a_scale_cannot_tell_is_not_judged_but_shown():
    claim = Claim("a beats b", ("a",), ("b",), not_judged="too small")
    found = judge(claim, rows(a=[1, 1, 1], b=[0, 0, 0]))
    assert found.word == "not judged: too small"
    assert found.difference == 1


def test_summaries_of_few():
    assert math.isnan(summarise([]).mean)
    assert summarise([0.5]).mean == 0.5
    assert math.isnan(summarise([0.5]).error)
    assert summarise([1, 2, 3]).error == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(value_at({"h": {"linear": 1}}, "h.knn"))
    assert math.isnan(value_at({"h": 1}, "h.knn"))
