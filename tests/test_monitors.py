"""Monitors that fail or hang cost a run nothing but their values, which are counted."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from fastclr import monitors
from fastclr.monitors import Monitors

ROW = [("train/loss", 1.0, 16), ("train/rate", 0.1, 16)]


def test_all_is_written_in_order_before_the_end(caplog: pytest.LogCaptureFixture) -> None:
    seen = []

    def slow(events: list) -> None:
        time.sleep(0.01)
        seen.append(events)

    rows = [[("x", float(k), k)] for k in range(20)]
    with Monitors(slow) as found:
        for row in rows:
            found.write(row)
    assert seen == rows and found.num_lost == 0 and caplog.text == ""


def test_what_raises_is_told_once_a_minute_without_its_words(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def raises(_: list) -> None:
        raise OSError(28, "No space left on device", "/with/hunter2")

    with caplog.at_level(logging.WARNING), Monitors(raises) as found:
        for _ in range(9):
            found.write(ROW)
    assert found.num_lost == 18 and "hunter2" not in caplog.text
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "OSError No space left on device" in said[0]
    assert "18 values did not reach" in said[1]


def test_after_a_failure_it_goes_on() -> None:
    seen = []

    def fails_once(events: list) -> None:
        seen.append(events)
        if len(seen) == 1:
            raise RuntimeError

    with Monitors(fails_once) as found:
        found.write(ROW)
        found.write(ROW)
    assert len(seen) == 2 and found.num_lost == 2


def test_one_that_hangs_holds_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(monitors, "_WAITING", 4)
    monkeypatch.setattr(monitors, "_CLOSE_SECONDS", 0.2)
    leaves, entered = threading.Event(), threading.Event()

    def hangs(_: list) -> None:
        entered.set()
        leaves.wait()

    started = time.monotonic()
    with Monitors(hangs) as found:
        found.write(ROW)
        assert entered.wait(5)
        for _ in range(9):
            found.write(ROW)
    assert time.monotonic() - started < 5
    assert found.num_lost == 20 and "they do not answer" in caplog.text
    leaves.set()
