"""Small packed photographs, and the commands as a user starts them."""

from __future__ import annotations

import faulthandler
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pipelines.photos import write_photo_tiles
from pipelines.writer import write_shards
from tests.starts import ROOT, Started, environment, environments_of_ranks


class Photos(NamedTuple):
    """Photo tiles as image folders and as shard sets; 16 classes."""

    images: Path
    train: Path
    test: Path


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    """Pack 640 training and 160 test tiles."""
    folder = tmp_path_factory.mktemp("photos")
    write_photo_tiles(folder / "images", train_per_photo=40, test_per_photo=10)
    for split in ("train", "test"):
        write_shards(folder / "images" / split, folder / split)
    return Photos(folder / "images", folder / "train", folder / "test")


@pytest.fixture(autouse=True)
def _say_where_it_hangs() -> Iterator[None]:
    faulthandler.dump_traceback_later(300)
    yield
    faulthandler.cancel_dump_traceback_later()


class Commands:
    """Runs the project's scripts in the repository, outside any launcher's environment.

    Args:
        make_folder: Makes a new folder of a name.
    """

    def __init__(self, make_folder: Callable[[str], Path]) -> None:
        self._make_folder = make_folder

    def start(self, *script: str | Path, ranks: int = 0) -> Started:
        """Start a script, on ranks if there are any: as a launcher would, without its seconds."""
        environs = environments_of_ranks(ranks) if ranks else [{}]
        return Started(script, self._make_folder("logs"), environs)

    def run(self, *script: str | Path, ranks: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a script to its end, on ranks if there are any."""
        return self.start(*script, ranks=ranks).ended(280)

    def launch(self, *command: str | Path) -> subprocess.Popen[str]:
        """Start a launcher as a user does; its output is thrown away."""
        return subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def launched(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a launcher to its end."""
        return subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=280,
        )

    def train(self, *flags: str | Path, ds: str | Path = "") -> list[str]:
        """Return the script that trains, and its flags."""
        ds_config = ds or "fastclr/recipes/fp32.json"
        recipe = ["--ds-config", ds_config, "--recipe", "demo"]
        return [str(part) for part in ("fastclr/train.py", *recipe, *flags)]

    def losses(self, run_dir: Path) -> dict[int, float]:
        """Return the logged losses by step, which rise."""
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
        return {row["step"]: row["loss"] for row in rows}


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    """Return what starts the project's commands."""
    return Commands(tmp_path_factory.mktemp)
