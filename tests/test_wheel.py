"""The wheel, without the repository: everything the commands need is in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastclr

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build source archive and wheel as ``python -m build`` does, the second from the first.

    From a copy: setuptools leaves its own folders where it builds.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fastclr", "pipelines", "tools", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)

    def call(*words: str | Path) -> None:
        done = subprocess.run(
            [sys.executable, *words], cwd=source, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr

    call("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})")
    (archive,) = folder.glob("fastclr-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    pip = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q")
    call(*pip, "-w", folder, unpacked)
    (file,) = folder.glob("fastclr-*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the wheel into a folder for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("installed") / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_what_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = message_from_string(archive.read(info).decode())
        entry = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
    modules = {
        str(file.relative_to(ROOT))
        for package in ("fastclr", "pipelines")
        for file in (ROOT / package).rglob("*.py")
    }
    data = {str(f.relative_to(ROOT)) for f in (ROOT / "fastclr/recipes").glob("*.json")}
    assert len(data) >= 2
    data |= {"fastclr/py.typed", "pipelines/py.typed"}
    of_it = {name for name in names if ".dist-info/" not in name}
    assert of_it == modules | data, of_it ^ (modules | data)
    assert metadata["Version"] == fastclr.__version__ and "fastclr = fastclr.commands:main" in entry
    extras = set(metadata.get_all("Provides-Extra") or [])
    assert {"dali", "http", "s3", "parquet", "ray", "pictures", "export", "dev"} <= extras


def test_commands_without_the_repository(installed: Path, tmp_path: Path) -> None:
    gone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in gone}
    start = [sys.executable, "-m", "fastclr"]

    def run(*words: object) -> str:
        done = subprocess.run(
            [*start, *map(str, words)], cwd=tmp_path, capture_output=True, text=True,
            env={**kept, "PYTHONPATH": str(installed)}, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    where = "import fastclr, pipelines; print(fastclr.__file__, pipelines.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**kept, "PYTHONPATH": str(installed)},
    ).stdout.split()  # fmt: skip
    assert all(file.startswith(str(installed)) for file in found), found

    assert "usage: fastclr COMMAND" in run("--help")
    rng = np.random.default_rng(0)
    for k in range(60):
        file = tmp_path / "images" / "ab"[k % 2] / f"{k}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(file)
    assert "60 images, 2 classes" in run("shards", "images", "--out", "data/train")
    assert "all is well" in run("check", "data/train", "--all")
    said = run("pretrain", "images", "--minutes", "0.05")
    assert "report:  runs/images/report.html" in said
    assert (tmp_path / "runs/images/report.html").stat().st_size > 10_000
    assert (tmp_path / "runs/images/encoder/encoder.safetensors").is_file()
    assert (tmp_path / "runs/images/scores.json").is_file()
