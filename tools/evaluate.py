"""Score a run: ``python tools/evaluate.py --run runs/demo --train data/train --test data/test``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastclr.cli import guard

Name = Literal[
    "quick", "ridge", "knn", "linear-lbfgs", "linear-sgd", "semi-1", "semi-10", "finetune",
    "transfer", "all",
]  # fmt: skip


def evaluate(
    run: Path,
    train: str,
    test: str,
    protocol: tuple[Name, ...] = ("quick",),
    transfer: tuple[str, ...] = (),
    transfer_steps: int = 0,
    head_layers: int = 0,
    cached_views: int = 4,
    seed: int = 0,
    again: bool = False,
    against: Path | None = None,
) -> None:
    """Score a trained encoder by one or more protocols; what is done already is not done again.

    Args:
        run: Folder of a training run (its --run-dir).
        train: Labelled data set that is fitted: a folder, a URL, others' tars.
        test: Labelled data set that is scored on.
        protocol: quick (linear probe and kNN of the trained encoder, the untrained one, and raw
            pixels), ridge, knn, linear-lbfgs, linear-sgd, semi-1, semi-10, finetune, transfer, or
            all; several.
        transfer: Folders with the shard sets train and test; :mean_per_class behind one names its
            metric, which is top1 otherwise.
        transfer_steps: Steps of fine-tuning in transfer, twice as many from random weights; 0 for
            the paper's 20,000.
        head_layers: Layers of the projection head that fine-tuning keeps.
        cached_views: Crops of each image that linear-sgd sees; 0 for new ones every epoch.
        seed: Seed of subsets, splits and orders.
        again: Run protocols again that are done.
        against: Another run, scored by the same protocols on the same data: tell whether the
            difference may be chance (paired permutation test).
    """
    from fastclr import answers, protocols
    from fastclr.subject import Options, Subject

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting")

        def say(text: str) -> None:
            progress.update(task, description=text)
            progress.console.print(text, highlight=False)

        options = Options(transfer, transfer_steps, head_layers, cached_views, seed)
        subject = Subject.open(run, train, test, options, say)
        entries = protocols.score(subject, protocol, again=again)
    show(entries)
    if against:
        for name, found in answers.compare(run, against).items():
            print(
                f"{name}: {100 * found.difference:+.2f} points against {against}, "
                f"p = {found.p_value:.2g} ({found.num_different} images differ)"
            )
    print(run / "scores.json")


def show(entries: dict[str, dict[str, Any]]) -> None:
    """Print a table of scores."""
    table = Table("protocol", "score", "percent", "minutes")
    for name, entry in entries.items():
        for k, (metric, value) in enumerate(entry["scores"].items()):
            first = (name, f"{entry['minutes']:.1f}") if k == 0 else ("", "")
            table.add_row(first[0], metric, f"{100 * value:.2f}", first[1])
    Console().print(table)


if __name__ == "__main__":
    sys.exit(guard(lambda: tyro.cli(evaluate)))
