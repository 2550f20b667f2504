"""Score a run: ``python tools/evaluate.py --run runs/demo --train data/train --test data/test``."""

from __future__ import annotations

import sys
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fastclr.cli import guard


def evaluate(run: Path, train: str, test: str) -> None:
    """Linear probe and kNN of the trained encoder, the untrained one, and raw pixels.

    Args:
        run: Folder of a training run (its --run-dir).
        train: Labelled data set that the probes are fitted on: a folder, a URL, others' tars.
        test: Labelled data set that they are scored on.
    """
    from fastclr import runs

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting")

        def say(text: str) -> None:
            progress.update(task, description=text)
            progress.console.print(text, highlight=False)

        runs.evaluate(run, train, test, say)
    print(run / "scores.json")


if __name__ == "__main__":
    sys.exit(guard(lambda: tyro.cli(evaluate)))
