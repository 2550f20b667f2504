"""The command line that makes data sets: commands, progress, one message per error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastclr.commands import fetch, main
from fastclr.config import ConfigError
from pipelines.cifar10 import Cifar10

ROOT = Path(__file__).parents[2]


def tiny_cifar10() -> Cifar10:
    """Make a data set of three images."""
    images, labels = np.zeros((3, 32, 32, 3), np.uint8), np.array([0, 3, 9])
    return Cifar10(images[:2], labels[:2], images[2:], labels[2:])


def test_photos_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "photos"
    done = subprocess.run(
        [sys.executable, ROOT / "tools/fetch_dataset.py", "photos", "--out", out],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "16 classes, 4000 train, 992 test" in done.stdout
    assert len(list(out.glob("train/*/*.png"))) == 4000
    assert len(list(out.glob("test/*/*.png"))) == 992


@pytest.mark.parametrize("command", ["photos", "cifar10"])
def test_used_target_is_one_message_and_78(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["fetch", command, "--out", str(tmp_path)]) == 78
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: target")
    assert printed.err.count("\n") == 1 and "Traceback" not in printed.err


def test_from_is_read_and_nothing_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def load(source: Path, **_: object) -> Cifar10:
        asked.append(source)
        return tiny_cifar10()

    monkeypatch.setattr(fetch.cifar10, "load_cifar10", load)
    monkeypatch.setattr(fetch.cifar10, "download_cifar10", lambda *a, **k: pytest.fail("download"))
    assert main(["fetch", "cifar10", "--out", str(tmp_path / "out"), "--from", "here.tgz"]) == 0
    assert asked == [Path("here.tgz")]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["test.tar", "train.tar"]


def test_download_is_loaded_and_its_folder_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives: list[Path] = []

    def download(workdir: Path, **_: object) -> Path:
        archives.append(workdir / "archive")
        archives[0].write_bytes(b"x")
        return archives[0]

    def load(source: Path, **_: object) -> Cifar10:
        assert source == archives[0] and source.exists()
        return tiny_cifar10()

    monkeypatch.setattr(fetch.cifar10, "download_cifar10", download)
    monkeypatch.setattr(fetch.cifar10, "load_cifar10", load)
    assert main(["fetch", "cifar10", "--out", str(tmp_path / "out")]) == 0
    assert not archives[0].parent.exists()


def test_bad_source_is_one_message_and_78(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = str(tmp_path / "absent.tgz"), tmp_path / "out"
    assert main(["fetch", "cifar10", "--out", str(out), "--from", source]) == 78
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and "--from PATH" in printed and printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_failure_after_progress_keeps_the_message_last(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(out: Path, progress: fetch.cifar10.Progress) -> None:
        progress("cutting", 1, 2)
        raise ConfigError("the photo is gone")

    monkeypatch.setattr(fetch.photos, "write_photo_tiles", fail)
    assert main(["fetch", "photos", "--out", str(tmp_path / "out")]) == 78
    assert capsys.readouterr().err.splitlines()[-1] == "error: the photo is gone"
