"""What a run tells: JSON lines for programs, a progress line for people, events for monitors."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fastclr.config import ConfigError
from fastclr.files import write_durably

Row = dict[str, Any]
Events = list[tuple[str, float, int]]

_PLAIN_LINE_SECONDS = 10.0


def memory_gib(device: torch.device) -> float:
    """Return the peak device memory in GiB on CUDA, the process's resident memory elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def read_rows(file: Path) -> list[Row]:
    """Read a metrics file; a last line that a killed run left unfinished is left out.

    Raises:
        ConfigError: If any other line is damaged.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ConfigError(f"{file} line {number} is damaged: {error}.") from error
    return rows


class RowLog:
    """Appends rows to a file, whole and readable at once, and tells monitors of them.

    Args:
        file: JSON lines file; goes on after the last row of an earlier start.
        start_step: Rows after this step are dropped: they were never checkpointed.
        write_events: Gets (name, value, images) for monitors such as TensorBoard.
        prefix: What the names of events begin with.
    """

    def __init__(
        self, file: Path, start_step: int, write_events: Callable[[Events], None], prefix: str
    ) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_rows(file) if row["step"] <= start_step]
        write_durably(file, "".join(json.dumps(row) + "\n" for row in kept))
        self._stream = file.open("a", encoding="utf-8")
        self._write_events, self._prefix = write_events, prefix

    def write(self, row: Row) -> None:
        """Write one row; it has step and images."""
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()
        skipped = ("step", "images", "eta_seconds")
        self._write_events(
            [(f"{self._prefix}/{k}", v, row["images"]) for k, v in row.items() if k not in skipped]
        )

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class MetricsLog:
    """Writes the rows of a run's steps; use as a context on the main rank.

    On a terminal it shows a progress bar, elsewhere a plain line every ten seconds.

    Args:
        file: JSON lines file; goes on after the last row of an earlier start.
        start_step: Rows after this step are dropped: they were never checkpointed.
        write_events: Gets (name, value, images) for monitors such as TensorBoard.
    """

    def __init__(
        self, file: Path, start_step: int, write_events: Callable[[Events], None] = lambda _: None
    ) -> None:
        self._rows = RowLog(file, start_step, write_events, "train")
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[line]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None, line="starting", start=True)
        self._last_plain_line = -_PLAIN_LINE_SECONDS

    def __enter__(self) -> MetricsLog:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()
        self._rows.close()

    def write(self, row: Row, total_steps: int | None) -> None:
        """Write one row.

        Args:
            row: Has step, images, epoch, loss, contrastive_accuracy, learning_rate,
                images_per_second, data_wait_fraction, memory_gib and eta_seconds (or None).
            total_steps: Length of the run, or None while it is unknown.
        """
        self._rows.write(row)
        line = _line(row, total_steps)
        self._progress.update(self._task, total=total_steps, completed=row["step"], line=line)
        now = time.monotonic()
        done = row["step"] == total_steps
        if self._progress.disable and (done or now - self._last_plain_line >= _PLAIN_LINE_SECONDS):
            self._last_plain_line = now
            self._console.print(line, highlight=False, soft_wrap=True)


def _line(row: Row, total_steps: int | None) -> str:
    """Say a row in one line."""
    eta = row["eta_seconds"]
    damaged = f"  {row['damaged_samples']} damaged" if row.get("damaged_samples") else ""
    left = "?" if eta is None else f"{int(eta) // 60}:{int(eta) % 60:02d}"
    return (
        f"step {row['step']}/{total_steps or '?'}  loss {row['loss']:.4f}  "
        f"contrastive acc {row['contrastive_accuracy']:.3f}  "
        f"{row['images_per_second']:.0f} images/s  data wait {row['data_wait_fraction']:.0%}  "
        f"{row['memory_gib']:.1f} GiB{damaged}  {left} left"
    )
