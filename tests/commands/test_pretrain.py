"""A folder in, a scored encoder out: refusals, the plan, stops, and all of it once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastclr
from fastclr.commands import main, pretrain
from fastclr.config import ConfigError
from fastclr.interruption import Preempted
from pipelines.writer import write_shards

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make 60 JPEGs of three colours; read only."""
    folder = tmp_path_factory.mktemp("pretrain") / "my images"
    rng = np.random.default_rng(0)
    for k in range(60):
        file = folder / ("red", "green", "blue")[k % 3] / f"{k}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 100, (40, 44, 3), np.uint8)
        pixels[..., k % 3] += 150
        Image.fromarray(pixels).save(file)
    return folder


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Note the commands instead of calling them."""
    commands: list[list[str]] = []
    monkeypatch.setattr(pretrain, "_do", lambda words, *_: commands.append(words))
    monkeypatch.chdir(tmp_path)
    return commands


def test_it_stands_for_plain_commands(images, done, tmp_path, capsys):
    result = pretrain.pretrain(str(images), minutes=2)
    assert [words[0] for words in done] == (
        ["shards", "shards", "train", "evaluate", "report", "export"]
    )
    assert result.run_dir == Path("runs/my images") and result.scores is None
    said = capsys.readouterr().out
    assert "60 images of about 40 pixels, 3 classes. 6 of them are held out" in said
    for line in result.commands:
        assert f"\n  {line}\n" in said, "printed before it runs"
        assert line.startswith("fastclr ")
    train = done[2]
    assert train[train.index("--minutes") + 1] == "2"
    assert train[train.index("--global-batch-size") + 1] == "16"
    (cache,) = Path("runs/shards").iterdir()
    assert len((cache / "train.jsonl").read_text().splitlines()) == 54
    assert train[train.index("--data.train") + 1] == str(cache / "train")
    before = [*done]
    pretrain.pretrain(str(images), minutes=2)
    assert done == 2 * before, "goes on with the same"


def test_images_without_labels_are_trained_on_and_not_scored(images, done, tmp_path, capsys):
    shutil.copytree(images / "red", tmp_path / "flat")
    (tmp_path / "flat" / "notes.txt").write_text("mine")
    pretrain.pretrain("flat", run_dir="out/run")
    assert [words[0] for words in done] == ["shards", "train", "report", "export"]
    said = capsys.readouterr().out
    assert "Nothing is scored" in said and "no images by their names: notes.txt (1 in all)" in said
    assert len([*Path("out/shards").iterdir()]) == 1, "beside the run"


LAUNCHED = """
import signal, subprocess, sys, time
print(*sys.argv[1:], flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # it has to be spared
code = int(sys.argv[2])
if code == 143:
    rank = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); "
    rank += "open(sys.argv[1], 'a').close(); time.sleep(60)"
    code = subprocess.call([sys.executable, "-c", rank, sys.argv[1], "--local_rank=0"])
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("code", "kind"),
    [(0, None), (75, Preempted), (78, ConfigError), (9, RuntimeError), (143, Preempted)],
)
def test_several_ranks_train_by_the_launcher(images, tmp_path, monkeypatch, capfd, code, kind):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain, "run", lambda *_: None)
    runner = [sys.executable, "-c", LAUNCHED, tmp_path / "started", str(code)]
    monkeypatch.setattr(pretrain, "RUNNER", runner)

    def stop() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    if code == 143:
        thread.start()
    words = (
        "--log_level warning --num_accelerators 2 --module fastclr train --ds-config fp32_clipped"
    )
    if kind:
        with pytest.raises(kind, match="start the same command again"):
            pretrain.pretrain(str(images), ranks=2)
    else:
        result = pretrain.pretrain(str(images), ranks=2)
        assert result.commands[2].startswith(f"deepspeed {words}")
    assert f"{code} {words}" in capfd.readouterr().out


def fails(capsys, *words: object) -> str:
    assert main(["pretrain", *map(str, words)]) == 78
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said
    return said


@pytest.mark.usefixtures("done")
def test_what_cannot_be_is_refused_and_leaves_nothing(images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no image" in fails(capsys, "empty") or "no file" in fails(capsys, "empty")
    assert "is no folder" in fails(capsys, tmp_path / "nowhere")
    few = tmp_path / "few"
    few.mkdir()
    for file in sorted((images / "red").iterdir())[:15]:
        shutil.copy(file, few)
    assert "15 images to train on and the smallest batch is 16" in fails(capsys, "few")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "few"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    said = fails(capsys, images, "--run-dir", foreign)
    assert "has not begun" in said and "Choose a new --run-dir" in said
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]
    assert not (tmp_path / "shards").exists()


@pytest.mark.usefixtures("done")
def test_a_run_goes_on_only_as_it_was_begun(images, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    assert main(["pretrain", "images", "--minutes", "1"]) == 0
    assert "minutes 1.0 then, 2.0 now" in fails(capsys, "images", "--minutes", "2")
    said = fails(capsys, images, "--minutes", "1", "--run-dir", "runs/images")
    assert "folder " in said and "Repeat those to go on" in said
    shutil.copy(folder / "red" / "0.jpg", folder / "red" / "new.jpg")
    assert "has changed since" in fails(capsys, "images", "--minutes", "1")


def test_an_interruption_is_told_in_words_of_this_command(images, tmp_path, monkeypatch, capsys):
    """Packing's own hint is about a flag that this command does not have."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt("go on with --resume")

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(pretrain, "run", interrupt)
    monkeypatch.setattr(pretrain.os, "_exit", leave)
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", str(images), "--run-dir", str(tmp_path / "run")])
    assert stop.value.code == 130
    said = capsys.readouterr().err
    assert "start the same command again to go on" in said and "--resume" not in said


@pytest.mark.slow
def test_all_of_it_stopped_and_gone_on_with(images, tmp_path, capsys):
    """Stop the command while it trains; the same call in this process does the rest."""
    run_dir = tmp_path / "run"
    gone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in gone}
    command = ["pretrain", str(images), "--run-dir", str(run_dir), "--minutes", "0.3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastclr", *command], cwd=ROOT, text=True,
        env={**kept, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    log = run_dir / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 75, out + err
    assert "is saved: start the same command again" in err and "[3/6] train" in out
    packed = {f: f.stat().st_mtime_ns for f in tmp_path.glob("shards/*/*/*.tar")}
    steps = len(log.read_text().splitlines())

    result = fastclr.pretrain(str(images), run_dir=str(run_dir), minutes=0.3)
    assert packed == {f: f.stat().st_mtime_ns for f in tmp_path.glob("shards/*/*/*.tar")}, "cached"
    assert len(log.read_text().splitlines()) > steps
    assert result.report.read_text(encoding="utf-8").rstrip().endswith("</html>")
    scores = result.scores["scores"]
    assert scores.keys() == {"trained", "untrained", "pixels"}
    assert scores["pixels"]["linear_top1"] == 1, "three colours"
    from fastclr.export import load

    assert load(result.encoder).feature_dim == 256
    facts = json.loads((run_dir / "config.json").read_text())
    assert facts["command"].startswith("fastclr train --ds-config fp32_clipped")
    before = (run_dir / "summary.json").read_bytes()
    capsys.readouterr()
    fastclr.pretrain(str(images), run_dir=str(run_dir), minutes=0.3)
    said = capsys.readouterr().out
    assert said.count("done before") == 2 and (run_dir / "summary.json").read_bytes() == before


def test_shards_are_no_images(images, done, tmp_path, capsys):
    write_shards(images, tmp_path / "packed")
    with pytest.raises(ConfigError, match="fastclr shards"):
        pretrain.pretrain("packed")
