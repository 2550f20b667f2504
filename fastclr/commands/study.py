"""Run an experiment of the literature: ``fastclr study heads --data TRAIN TEST``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from fastclr.config import ConfigError


def study(
    name: Annotated[str, tyro.conf.Positional],
    scale: str = "pilot",
    seeds: int = 3,
    data: tuple[str, str] = ("data/cifar10/train", "data/cifar10/test"),
    out: Path = Path("studies"),
    work: Path = Path("runs/studies"),
    only_report: bool = False,
    transfer: tuple[str, str] | None = None,
) -> None:
    """Do the runs of a study that are not done yet, then write its table, figure and verdicts.

    A row a run is written as soon as it is done; start the same command again to go on.

    Args:
        name: A study, such as ``heads`` (a wrong name tells all), or ``all``.
        scale: How much is trained: toy, pilot, small, cifar10 or paper.
        seeds: Seeds of each arm; verdicts take 3 or more.
        data: Training and test data set, labelled.
        out: Folder of RESULTS.md, studies.html and results/.
        work: Folder for the checkpoints of runs in progress.
        only_report: Do no runs; write what the rows say.
        transfer: Training and test shard set, labelled, that the study transfer goes to; without
            them ``all`` leaves it out.
    """
    from fastclr.facts import typed
    from fastclr.studies import STUDIES
    from fastclr.studies.images import open_images, with_target
    from fastclr.studies.pages import write_pages, write_study
    from fastclr.studies.running import rows_of, run_study
    from fastclr.studies.scales import SCALES
    from fastclr.studies.summaries import summary

    names = list(STUDIES) if name == "all" else [name]
    if name == "all" and transfer is None:
        names.remove("transfer")
        print("transfer is left out: name its data set behind --transfer", flush=True)
    if unknown := [n for n in names if n not in STUDIES]:
        raise ConfigError(f"study {unknown[0]!r} is unknown: choose {', '.join(STUDIES)}, or all.")
    if scale not in SCALES or seeds < 1:
        raise ConfigError(
            f"scale is {scale!r} and seeds {seeds}: choose from {', '.join(SCALES)}, and 1 or more."
        )
    size = SCALES[scale]
    own_images = open_images(*data, size)
    for chosen in names:
        images, of = own_images, _name(data)
        if chosen == "transfer":
            images = with_target(images, transfer, size)
            of += f", to {_name(transfer or data)}"
        facts = {
            **images.facts,
            "name": of,
            "num_train": len(images.train),
            "num_test": len(images.test),
        }
        results = out / "results"
        found = STUDIES[chosen]
        if only_report:
            rows = rows_of(found, size, images.facts, results, seeds)
            if not rows:
                print(f"{chosen} is left out: none of its runs is done", flush=True)
                continue
            (results / chosen / scale).mkdir(parents=True, exist_ok=True)
        else:
            rows = run_study(
                chosen,
                found,
                scale,
                size,
                images,
                num_seeds=seeds,
                results=results,
                work_dir=work,
                command=typed(),
                say=lambda line: print(line, flush=True),
            )
        write_study(
            results / chosen / scale, summary(chosen, found, scale, size, facts, rows, seeds)
        )
        write_pages(out)
    print(f"{out / 'RESULTS.md'} {out / 'studies.html'}")


def _name(data: tuple[str, str]) -> str:
    """Return the name of a data set by its folder."""
    return Path(data[0]).parent.name or data[0]
