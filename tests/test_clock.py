"""Training time leaves pauses out and goes on over starts."""

from __future__ import annotations

import pytest

from fastclr.clock import Clock


class Time:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    """Put the time into the test's hands."""
    time = Time()
    monkeypatch.setattr("fastclr.clock.time", time)
    return time


def test_pauses_do_not_count(time):
    clock = Clock()
    time.now += 7
    assert clock.training_seconds == 0
    clock.start()
    time.now += 2
    assert clock.training_seconds == 2
    clock.pause()
    time.now += 50
    assert clock.training_seconds == 2
    clock.start()
    time.now += 3
    assert clock.training_seconds == 5
    assert clock.program_seconds == 62


def test_an_earlier_start_counts(time):
    clock = Clock(training_seconds=40)
    assert clock.training_seconds == 40
    clock.start()
    time.now += 2
    clock.pause()
    assert clock.training_seconds == 42
    assert clock.program_seconds == 2


def test_starting_or_pausing_twice_loses_nothing(time):
    clock = Clock()
    clock.start()
    time.now += 2
    clock.start()
    time.now += 3
    clock.pause()
    time.now += 4
    clock.pause()
    assert clock.training_seconds == 5
