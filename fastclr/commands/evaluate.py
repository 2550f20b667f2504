"""Score a run: ``fastclr evaluate --run runs/demo --train data/train --test data/test``.

Any number of ranks, by any launcher: ``deepspeed --module fastclr evaluate ...``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

Name = Literal[
    "quick", "ridge", "knn", "linear-lbfgs", "linear-sgd", "linear-joint", "semi-1", "semi-10",
    "layers", "forgetting", "pictures", "finetune", "transfer", "all",
]  # fmt: skip
# torchrun takes a --run behind the script for its own, and fails.
_Run = Annotated[Path, tyro.conf.arg(aliases=("--run-dir",))]


def evaluate(
    run: _Run,
    train: str,
    test: str,
    protocol: tuple[Name, ...] = ("quick",),
    transfer: tuple[str, ...] = (),
    transfer_steps: int = 0,
    head_layers: int = 0,
    cached_views: int = 4,
    finetune_epochs: int = 0,
    neighbours_by: Literal["torch", "faiss"] = "torch",
    layers: tuple[str, ...] = (),
    maps: tuple[Literal["tsne", "opentsne", "umap"], ...] = (),
    map_points: int = 2000,
    seed: int = 0,
    again: bool = False,
    against: Path | None = None,
) -> None:
    """Score a trained encoder by one or more protocols; what is done already is not done again.

    On several ranks each takes features of a part of the images, and rank 0 does the rest.

    Args:
        run: Folder of a training run (its --run-dir).
        train: Labelled data set that is fitted: a folder, a URL, others' tars.
        test: Labelled data set that is scored on.
        protocol: quick (linear probe and kNN of the trained encoder, the untrained one, and raw
            pixels), ridge, knn, linear-lbfgs, linear-sgd, linear-joint (of a run with
            --evaluation.joint-probe), semi-1, semi-10, layers (every layer), forgetting (what the
            head forgets), pictures (for the report), finetune, transfer, or all; several.
        transfer: Folders with the shard sets train and test; :mean_per_class behind one names its
            metric, which is top1 otherwise.
        transfer_steps: Steps of fine-tuning in transfer, twice as many from random weights; 0 for
            the paper's 20,000.
        head_layers: Layers of the projection head that fine-tuning keeps.
        cached_views: Crops of each image that linear-sgd sees; 0 for new ones every epoch.
        finetune_epochs: Epochs of finetune, from trained and from untrained weights; 0 for the
            paper's 30, hours on a CPU.
        neighbours_by: What finds neighbours in knn and pictures.
        layers: Layers of the pictures, such as h encoder.layer2; h and z by default.
        maps: Maps of each layer; t-SNE, by openTSNE where it is installed, and UMAP by default.
        map_points: Test images in a map.
        seed: Seed of subsets, splits and orders.
        again: Run protocols again that are done.
        against: Another run, scored by the same protocols on the same data: tell whether the
            difference may be chance (paired permutation test).
    """
    from fastclr import answers, evaluations, protocols
    from fastclr.subject import Options, Subject

    options = Options(
        transfer=transfer,
        transfer_steps=transfer_steps,
        head_layers=head_layers,
        cached_views=cached_views,
        finetune_epochs=finetune_epochs,
        neighbours_by=neighbours_by,
        layers=layers,
        maps=maps,
        map_points=map_points,
        seed=seed,
    )
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    console = Console(stderr=True)
    with (
        evaluations.joined() as world,
        Progress(*columns, console=console, transient=True, disable=not world.is_main) as progress,
    ):
        task = progress.add_task("starting")

        def say(text: str) -> None:
            progress.reset(task, description=text)
            progress.tasks[0].total = None  # not known of what comes now
            if world.is_main:
                progress.console.print(text, highlight=False)

        subject = Subject.open(run, train, test, options, say)
        subject.progress = lambda done, total: progress.update(task, completed=done, total=total)
        entries = protocols.score(subject, protocol, again=again)
    if not world.is_main:
        return
    show(entries)
    if against:
        for name, found in answers.compare(run, against).items():
            print(
                f"{name}: {100 * found.difference:+.2f} points against {against}, "
                f"p = {found.p_value:.2g} ({found.num_different} images differ)"
            )
    print(run / "scores.json", run / protocols.SHEET)


def show(entries: dict[str, dict[str, Any]]) -> None:
    """Print a table of scores."""
    from fastclr.evaluation.score_sheet import lines

    table = Table("protocol", "score", "percent", "minutes")
    for line in lines(entries):
        table.add_row(*line)
    Console().print(table)
