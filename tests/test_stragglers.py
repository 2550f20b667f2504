"""Which rank is called slow, and how often."""

from __future__ import annotations

import logging

import pytest

from fastclr import collectives, stragglers
from fastclr.stragglers import Stragglers
from fastclr.world import World


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stragglers, "time", clock)
    return clock


def said(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    clock: Clock,
    found: Stragglers,
    others: list[float],
    own: float = 0.1,
) -> str:
    """Let this rank take its time, in two parts of a window of 10 s, and compare with others."""
    caplog.clear()
    for _ in range(2):
        found.begin()
        clock.now += own / 2
        found.end()
        clock.now += 5 - own / 2
    hosts = [(seconds, f"host{rank}") for rank, seconds in enumerate(others, 1)]
    monkeypatch.setattr(collectives, "from_all", lambda mine: [(mine[0], "host0"), *hosts])
    with caplog.at_level(logging.WARNING):
        found.compare(10)
    return caplog.text


def test_the_slow_rank_is_named_with_its_factor(caplog, monkeypatch, clock) -> None:
    found = Stragglers(World(0, 4, 0, 4))
    text = said(caplog, monkeypatch, clock, found, [0.1, 1.0, 0.2])
    assert "rank 2 on host2 is slow: 1.00 s" in text and "10.0 times" in text
    assert said(caplog, monkeypatch, clock, found, [0.1, 1.0, 0.1]) == "", "told before"
    assert "30.0 times" in said(caplog, monkeypatch, clock, found, [0.1, 3.0, 0.1])
    assert "rank 0 on host0" in said(caplog, monkeypatch, clock, found, [0.1, 0.1, 0.1], own=2.0)


@pytest.mark.parametrize(
    ("others", "own"), [([0.1, 0.1], 0.1), ([0.25, 0.1], 0.1), ([0.001, 0.09], 0.001)]
)
def test_little_is_not_slow(caplog, monkeypatch, clock, others, own) -> None:
    assert said(caplog, monkeypatch, clock, Stragglers(World(0, 3, 0, 3)), others, own) == ""


def test_only_the_main_rank_speaks_and_one_rank_asks_nobody(caplog, monkeypatch, clock) -> None:
    assert said(caplog, monkeypatch, clock, Stragglers(World(1, 2, 1, 2)), [9.0]) == ""
    monkeypatch.setattr(collectives, "from_all", lambda _: pytest.fail("asked"))
    Stragglers(World(0, 1, 0, 1)).compare(10)


def test_a_part_that_begins_again_counts_from_there(clock) -> None:
    found = Stragglers(World(0, 2, 0, 2))
    found.begin()
    clock.now += 3
    found.begin()
    clock.now += 1
    found.end()
    assert found._own == 1.0
