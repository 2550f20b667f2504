"""Toy images, and what does a study on them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastclr.interruption import Interruption, Preempted
from fastclr.studies.images import StudyImages, open_images
from fastclr.studies.running import run_study
from fastclr.studies.scales import TOY
from fastclr.studies.study import Arm, Run, Study, Variant
from fastclr.studies.work import WORKS, Job, train
from fastclr.trainer import Trainer
from pipelines.photos import write_photo_tiles
from pipelines.writer import write_shards


class Toy(NamedTuple):
    """Photo tiles as shard sets."""

    train: Path
    test: Path


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Pack 128 training and 64 test tiles."""
    folder = tmp_path_factory.mktemp("toy")
    write_photo_tiles(folder / "images", train_per_photo=8, test_per_photo=4)
    for split in ("train", "test"):
        write_shards(folder / "images" / split, folder / split)
    return Toy(folder / "train", folder / "test")


@pytest.fixture(scope="session")
def images(toy: Toy) -> StudyImages:
    """The toy scale's images."""
    return open_images(str(toy.train), str(toy.test), TOY)


@pytest.fixture
def job(images: StudyImages, tmp_path: Path) -> Callable[..., Job]:
    """Return a function that makes the job of a configuration and a variant."""

    def make(config: Any = TOY.base, variant: Variant = Variant(), name: str = "run") -> Job:  # noqa: B008
        run = Run("arm", config, variant, "train")
        return Job(run, images, TOY, tmp_path / name, Interruption())

    return make


@pytest.fixture
def study(images: StudyImages, tmp_path: Path) -> Callable[..., list[dict]]:
    """Return a function that runs a study on the toy images; its lines are in ``said``."""

    def run(
        name: str,
        study: Study,
        num_seeds: int = 1,
        said: list[str] | None = None,
        of: StudyImages = images,
    ) -> list[dict]:
        return run_study(
            name,
            study,
            "toy",
            TOY,
            of,
            num_seeds=num_seeds,
            results=tmp_path / "results",
            work_dir=tmp_path / "work",
            command=["fastclr", "study"],
            say=(said if said is not None else []).append,
        )

    return run


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Make work of kind ``instant`` that trains nothing; the runs it was asked for."""
    asked: list[Run] = []

    def work(job: Job) -> dict:
        asked.append(job.run)
        value = 0.5 + job.run.config.seed / 100 + len(job.run.arm) / 10
        return {"h": {"linear": value}, "z": {"linear": value - 0.1}}

    monkeypatch.setitem(WORKS, "instant", work)
    return asked


@pytest.fixture
def broken_off(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Return a function that trains a job until a signal comes in its second step.

    It returns a list of one number a step, which grows when the training goes on.
    """

    def begin(broken: Job, trainer: type[Trainer] = Trainer) -> list[int]:
        step, steps = trainer.train_step, []

        def interrupted(self: Trainer, *args: Any) -> Any:
            steps.append(0)
            if len(steps) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, *args)

        monkeypatch.setattr(trainer, "train_step", interrupted)
        with pytest.raises(Preempted):
            train(broken)
        return steps

    return begin


def plain_study(names: dict[str, Arm], claims: list, **settings: Any) -> Study:
    """Return a study of instant work."""
    return Study(
        title="Title",
        question="Question?",
        source="Source.",
        arms=lambda scale: names,
        columns={"h, linear": "h.linear", "z, linear": "z.linear"},
        claims=lambda arms: claims,
        work="instant",
        **settings,
    )
