"""Rates as functions of the step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastclr.optim.schedules import Schedule, scaled_learning_rate


@pytest.mark.parametrize(
    ("base", "batch", "scaling", "rate"),
    [
        (0.3, 4096, "linear", 4.8),
        (0.3, 256, "linear", 0.3),
        (1.0, 512, "linear", 2.0),
        (1.2, 4096, "sqrt", 4.8),
        (1.2, 1024, "sqrt", 0.075 * math.sqrt(1024)),
        (0.3, 256, "sqrt", 0.3),
    ],
)
def test_scaling_of_the_paper(base, batch, scaling, rate):
    assert scaled_learning_rate(base, batch, scaling) == pytest.approx(rate, rel=1e-12)


def test_warm_up_is_linear_and_never_zero():
    schedule = Schedule(4, "cosine")
    assert [schedule.factor(s, 100) for s in range(5)] == [0.25, 0.5, 0.75, 1, 1]


def test_cosine_falls_to_nothing():
    schedule = Schedule(10, "cosine")
    assert schedule.factor(60, 110) == pytest.approx(0.5)
    assert schedule.factor(35, 110) == pytest.approx(0.5 * (1 + math.sqrt(0.5)))
    assert 0 < schedule.factor(109, 110) < 1e-3
    assert schedule.factor(110, 110) == schedule.factor(500, 110) == 0


@pytest.mark.parametrize(
    ("kind", "total"), [("constant", 20), ("constant", None), ("cosine", None)]
)
def test_what_holds_the_peak(kind, total):
    schedule = Schedule(2, kind)
    assert [schedule.factor(s, total) for s in (0, 1, 2, 10, 19)] == [0.5, 1, 1, 1, 1]


def test_no_warm_up_starts_at_the_peak():
    assert Schedule(0, "cosine").factor(0, 10) == 1


def test_a_run_shorter_than_its_warm_up():
    assert [Schedule(10, "cosine").factor(s, 3) for s in range(3)] == pytest.approx([0.1, 0.2, 0.3])


@given(st.integers(0, 50), st.integers(1, 300), st.sampled_from(["cosine", "constant"]))
def test_factors_rise_to_one_and_then_never_rise(warmup, total, kind):
    factors = [Schedule(warmup, kind).factor(s, total) for s in range(total)]
    assert all(0 < f <= 1 for f in factors)
    rising, falling = factors[:warmup], factors[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if falling:
        assert max(factors) == falling[0] == 1
