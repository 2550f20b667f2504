"""Make a run's report: ``fastclr report --run runs/demo``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console


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
