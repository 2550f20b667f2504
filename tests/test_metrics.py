"""The log of a run: rows survive stops, lines reach people, events reach monitors."""

from __future__ import annotations

import contextlib
import json
import os

import pytest
import torch

from fastclr.config import ConfigError
from fastclr.metrics import MetricsLog, RowLog, memory_gib, read_rows


def row(step: int, **changes) -> dict:
    """Return a full row of one step."""
    return {
        "step": step,
        "epoch": step / 10,
        "images": 64 * step,
        "loss": 1 / (step + 1),
        "contrastive_accuracy": 0.25,
        "learning_rate": 0.3,
        "images_per_second": 1234.4,
        "data_wait_fraction": 0.021,
        "memory_gib": 1.26,
        "eta_seconds": 75.0,
        **changes,
    }


def steps(file) -> list[int]:
    """Return the steps in a file."""
    return [r["step"] for r in read_rows(file)]


@pytest.fixture
def file(tmp_path):
    """Return the path of a log that has rows of steps 10, 20 and 30."""
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path, start_step=0) as log:
        for step in (10, 20, 30):
            log.write(row(step), 100)
    return path


def test_rows_come_back_as_they_were(file):
    assert read_rows(file) == [row(10), row(20), row(30)]


def test_no_file_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("start", "kept"), [(0, []), (20, [10, 20]), (25, [10, 20]), (99, [10, 20, 30])]
)
def test_a_resume_drops_what_was_never_checkpointed(file, start, kept):
    with MetricsLog(file, start_step=start) as log:
        assert steps(file) == kept
        log.write(row(start + 10), 200)
    assert steps(file) == [*kept, start + 10]


def test_every_row_is_readable_at_once(file):
    with MetricsLog(file, start_step=30) as log:
        log.write(row(40), None)
        assert steps(file)[-1] == 40


def test_a_half_written_last_line_is_left_out_and_removed(file):
    with file.open("a") as stream:
        stream.write(json.dumps(row(40))[:25])
    assert steps(file) == [10, 20, 30]
    with MetricsLog(file, start_step=30) as log:
        log.write(row(40), None)
    assert steps(file) == [10, 20, 30, 40]
    assert len(file.read_text().splitlines()) == 4


def test_a_last_line_without_its_newline_is_kept(file):
    file.write_text(file.read_text().rstrip("\n"))
    with MetricsLog(file, start_step=30) as log:
        log.write(row(40), None)
    assert steps(file) == [10, 20, 30, 40]


def test_a_damaged_line_in_the_middle_is_named(file):
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1][:9], lines[2]]))
    with pytest.raises(ConfigError, match=r"metrics.jsonl line 2 is damaged"):
        MetricsLog(file, start_step=30)


def test_events_leave_out_what_is_no_measurement(tmp_path):
    events = []
    with MetricsLog(tmp_path / "m", 0, events.append) as log:
        log.write(row(3), 10)
    (event,) = events
    assert ("train/loss", 0.25, 192) in event
    names = {name for name, _, _ in event}
    assert not names & {"train/step", "train/images", "train/eta_seconds"}
    assert len(names) == len(row(3)) - 3
    assert {images for _, _, images in event} == {192}


def test_other_rows_have_a_file_and_a_prefix_of_their_own(tmp_path, capsys):
    file, events = tmp_path / "run" / "evaluations.jsonl", []
    rows = [{"step": s, "epoch": s / 10, "images": 64 * s, "knn_top1": 0.5} for s in (10, 20, 30)]
    log = RowLog(file, 0, events.append, "evaluation")
    for each in rows:
        log.write(each)
        assert read_rows(file)[-1] == each  # readable at once
    log.close()
    assert events[1] == [("evaluation/epoch", 2.0, 1280), ("evaluation/knn_top1", 0.5, 1280)]
    with contextlib.closing(RowLog(file, 20, events.append, "evaluation")) as log:
        assert read_rows(file) == rows[:2]  # step 30 was never checkpointed
        log.write(rows[2])
    assert read_rows(file) == rows
    with pytest.raises(ValueError, match="closed"):
        log.write(rows[2])
    assert capsys.readouterr() == ("", "")


def test_off_a_terminal_there_are_plain_lines_every_ten_seconds(tmp_path, monkeypatch, capsys):
    now = 1000.0
    monkeypatch.setattr("fastclr.metrics.time.monotonic", lambda: now)
    with MetricsLog(tmp_path / "m", 0) as log:
        for step in range(1, 31):  # a row a second
            now += 1
            log.write(row(step), 30)
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err
    printed = [int(line.split()[1].partition("/")[0]) for line in err.splitlines()]
    assert printed == [1, 11, 21, 30]  # the last one always


def test_what_a_line_says(tmp_path, capsys):
    with MetricsLog(tmp_path / "m", 0) as log:
        log.write(row(3), 10)
    assert capsys.readouterr().err.strip() == (
        "step 3/10  loss 0.2500  contrastive acc 0.250  1234 images/s  data wait 2%  1.3 GiB  "
        "1:15 left"
    )


def test_damaged_samples_are_told_if_there_are_any(tmp_path, capsys):
    for damaged, told in ((0, False), (3, True)):
        with MetricsLog(tmp_path / f"{damaged}.jsonl", 0) as log:
            log.write(row(1, damaged_samples=damaged), 2)
        assert ("3 damaged" in capsys.readouterr().err) == told


def test_unknown_length(tmp_path, capsys):
    with MetricsLog(tmp_path / "m", 0) as log:
        log.write(row(3, eta_seconds=None), None)
    err = capsys.readouterr().err
    assert err.startswith("step 3/? ")
    assert err.rstrip().endswith("? left")


def test_on_a_terminal_there_is_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with MetricsLog(tmp_path / "m", 0) as log:
        log.write(row(7), 10)
    err = capsys.readouterr().err
    assert "training" in err
    assert "step 7/10" in err
    assert "━" in err


def test_memory_is_of_this_process():
    assert (
        0.05
        < memory_gib(torch.device("cpu"))
        < 0.9 * os.sysconf("SC_PHYS_PAGES") * (os.sysconf("SC_PAGE_SIZE") / 2**30)
    )
