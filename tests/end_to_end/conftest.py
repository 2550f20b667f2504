"""Small packed photographs, and the commands as a user starts them."""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pipelines.photos import write_photo_tiles
from pipelines.writer import write_shards

ROOT = Path(__file__).resolve().parents[2]


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
    """Runs the project's commands in the repository, outside any launcher's environment."""

    def environment(self) -> dict[str, str]:
        """Return this environment, the interpreter's folder first on the path."""
        gone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        kept = {k: v for k, v in os.environ.items() if k not in gone}
        return {**kept, "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}"}

    def start(self, *command: str | Path) -> subprocess.Popen[str]:
        """Start a command; its output is thrown away."""
        return subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=self.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=280,
        )

    def train(self, *flags: str | Path, ranks: int | None = None, ds: str | Path = "") -> list[str]:
        """Return the training command; through the launcher if a number of ranks is given."""
        start = [sys.executable]
        if ranks is not None:
            port = 29600 + os.getpid() % 300
            start = ["deepspeed", "--num_accelerators", f"{ranks}", "--master_port", f"{port}"]
        ds_config = ds or "fastclr/recipes/fp32.json"
        recipe = ["--ds-config", ds_config, "--recipe", "demo"]
        return [str(part) for part in (*start, "fastclr/train.py", *recipe, *flags)]

    def losses(self, run_dir: Path) -> dict[int, float]:
        """Return the logged losses by step, which rise."""
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
        return {row["step"]: row["loss"] for row in rows}


@pytest.fixture(scope="session")
def commands() -> Commands:
    """Return what starts the project's commands."""
    return Commands()
