"""Make a run's report: ``python tools/report.py --run runs/demo``."""

from __future__ import annotations

import sys
from pathlib import Path

import tyro
from rich.console import Console

from fastclr.cli import guard


def report(run: Path, train: str = "", test: str = "") -> None:
    """Write report.json and report.html into the run's folder.

    Args:
        run: Folder of a training run (its --run-dir).
        train: Its training data, where that lies elsewhere now or its URL had secrets.
        test: Its test data, likewise.
    """
    from fastclr import runs

    with Console(stderr=True).status("drawing the report"):
        page = runs.report(run, train, test)
    print(f"report: {page.resolve()}")


if __name__ == "__main__":
    sys.exit(guard(lambda: tyro.cli(report)))
