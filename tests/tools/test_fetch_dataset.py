"""The command line that makes data sets: commands, progress, one message per error."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fastclr.config import ConfigError
from pipelines.cifar10 import Cifar10

TOOL = Path(__file__).parents[2] / "tools" / "fetch_dataset.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """Import the tool from its file."""
    spec = importlib.util.spec_from_file_location("fetch_dataset", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_cifar10() -> Cifar10:
    """Make a data set of three images."""
    images, labels = np.zeros((3, 32, 32, 3), np.uint8), np.array([0, 3, 9])
    return Cifar10(images[:2], labels[:2], images[2:], labels[2:])


def test_photos_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "photos"
    done = subprocess.run(
        [sys.executable, TOOL, "photos", "--out", out],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(TOOL.parents[1])},
    )
    assert done.returncode == 0, done.stderr
    assert "16 classes, 4000 train, 992 test" in done.stdout
    assert len(list(out.glob("train/*/*.png"))) == 4000
    assert len(list(out.glob("test/*/*.png"))) == 992


@pytest.mark.parametrize("command", ["photos", "cifar10"])
def test_used_target_is_one_message_and_78(
    command: str, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert tool.main([command, "--out", str(tmp_path)]) == 78
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: target")
    assert printed.err.count("\n") == 1 and "Traceback" not in printed.err


def test_from_is_read_and_nothing_downloaded(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def load(source: Path, **_: object) -> Cifar10:
        asked.append(source)
        return tiny_cifar10()

    monkeypatch.setattr(tool.cifar10, "load_cifar10", load)
    monkeypatch.setattr(tool.cifar10, "download_cifar10", lambda *a, **k: pytest.fail("download"))
    assert tool.main(["cifar10", "--out", str(tmp_path / "out"), "--from", "here.tgz"]) == 0
    assert asked == [Path("here.tgz")]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["test.tar", "train.tar"]


def test_download_is_loaded_and_its_folder_removed(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives: list[Path] = []

    def download(workdir: Path, **_: object) -> Path:
        archives.append(workdir / "archive")
        archives[0].write_bytes(b"x")
        return archives[0]

    def load(source: Path, **_: object) -> Cifar10:
        assert source == archives[0] and source.exists()
        return tiny_cifar10()

    monkeypatch.setattr(tool.cifar10, "download_cifar10", download)
    monkeypatch.setattr(tool.cifar10, "load_cifar10", load)
    assert tool.main(["cifar10", "--out", str(tmp_path / "out")]) == 0
    assert not archives[0].parent.exists()


def test_bad_source_is_one_message_and_78(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = str(tmp_path / "absent.tgz"), tmp_path / "out"
    assert tool.main(["cifar10", "--out", str(out), "--from", source]) == 78
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and "--from PATH" in printed and printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_failure_after_progress_keeps_the_message_last(
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(out: Path, progress: tool.cifar10.Progress) -> None:
        progress("cutting", 1, 2)
        raise ConfigError("the photo is gone")

    monkeypatch.setattr(tool.photos, "write_photo_tiles", fail)
    assert tool.main(["photos", "--out", str(tmp_path / "out")]) == 78
    assert capsys.readouterr().err.splitlines()[-1] == "error: the photo is gone"
