"""Every command and code block of the README runs; long ones in a shortened form."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.photos import write_photo_tiles
from pipelines.writer import write_shards
from tests.fenced import blocks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# The environment that runs this test is installed already: make is told so.
MAKE = "make -o .venv/.installed"
STUDY = "fastclr study heads --data data/cifar10/train data/cifar10/test"
PRETRAIN = "fastclr pretrain path/to/images/train"
SHORTENED = {
    # Where the environment is older than the command, it has no script of that name.
    PRETRAIN: f"python -m {PRETRAIN} --minutes 0.1",
    "make demo": f"{MAKE} demo FLAGS='--epochs 4'",
    "make test": f"{MAKE} test FLAGS='-q {ROOT}/tests/test_world.py'",
    "python benchmarks/nt_xent.py": "python benchmarks/nt_xent.py --sizes 64 --dims 16 "
    "--large-sizes 128 --repeats 3 --out results",
    "python benchmarks/lars.py": "python benchmarks/lars.py --models 1000-tensors --rounds 3 "
    "--out lars.md",
    "python benchmarks/trainer.py": "python benchmarks/trainer.py --blocks 1 --steps 2 --rounds 1 "
    "--batch 16 --out trainer.md",
    "python benchmarks/data_plane.py": "python benchmarks/data_plane.py --only opening damage "
    "--out plane.md",
    "python benchmarks/kernels_aot.py": "python benchmarks/kernels_aot.py --match 'D=16$' --chips "
    "80 --out aot.md",
    "python benchmarks/throughput.py": "python benchmarks/throughput.py --synthetic --recipe demo "
    "--budget-minutes 1 --out throughput --page throughput.md",
    "python benchmarks/scaling.py": "python benchmarks/scaling.py --ranks 2 --images 8 --steps 2 "
    "--warm-up 1 --rounds 1 --no-stages --out scaling.md",
    "python benchmarks/curves.py": "python benchmarks/curves.py --only step --batches 16 32 "
    "--chunk 16 --step-rounds 1 --out curves.md",
    STUDY: "python -m fastclr study heads --scale toy --seeds 1 --data data/demo/train "
    "data/demo/test --out study --work study/work",
    "python benchmarks/peers.py": "python benchmarks/peers.py --sides 32 --parts loss optimizer "
    "--only lightly --calls 2 --out results/peers.jsonl",
    "python benchmarks/report.py": "python benchmarks/report.py --results results",
    "make bench-check": f"{MAKE} bench-check FLAGS='--only LARS'",
    "make cifar10 MINUTES=24": f"{MAKE} cifar10 MINUTES=0.1 FLAGS='--global-batch-size 16'",
}
REPLACED = {"--minutes 10": "--minutes 0.1 --global-batch-size 16"}


COMMANDS = [line for block in blocks(README, "bash") for line in block.text.splitlines()]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """A checkout of links, with a user's images and stand-ins for CIFAR-10's shards."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("Makefile", "pyproject.toml", "benchmarks", "fastclr", "pipelines", "tools"):
        (folder / name).symlink_to(ROOT / name)
    write_photo_tiles(folder / "path/to/images", train_per_photo=20, test_per_photo=5)
    (folder / "data/images/cifar10").mkdir(parents=True)
    for split in ("train", "test"):
        write_shards(folder / "path/to/images" / split, folder / "data/cifar10" / split)
    return folder


def run(command, folder):
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environ.pop("TRITON_INTERPRET", None)  # of the tests, not of a user
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environ, capture_output=True, text=True,
        timeout=400,
    )  # fmt: skip
    said = f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    if "bench-check" in command:  # ratios of a machine busy with other tests may be worse
        assert "triad / LARS, resnet50" in done.stdout
        assert done.returncode == 0 or "1 of 1 lost over 25%" in done.stderr, said
        return done
    assert done.returncode == 0, said
    return done


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, sandbox):
    shortened = SHORTENED.get(command, command)
    for long, short in REPLACED.items():
        shortened = shortened.replace(long, short)
    run(shortened, sandbox)
    if command == "make demo":
        check_demo(sandbox / "runs/demo")


def check_demo(run_dir):
    """Even a third of the demo learns; the report says so."""
    report = json.loads((run_dir / "report.json").read_text())
    scores = report["scores"]
    assert set(scores) == {"trained", "untrained", "pixels"}
    for score in ("linear_top1", "knn_top1"):
        trained = scores["trained"][score]
        assert 1 >= trained > scores["untrained"][score] + 0.05 > 0.05
        assert trained > scores["pixels"][score] + 0.1
    assert report["images_per_second"] > 0
    assert 0 <= report["data_wait_fraction"] < 1
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>")
    assert list((run_dir / "tensorboard").glob("events*"))


@pytest.mark.parametrize("code", [block.text for block in blocks(README, "python")])
def test_python(code, sandbox, tmp_path):
    script = tmp_path / "readme.py"
    script.write_text(code)
    run(f"{MAKE} data/demo/train/manifest.json", sandbox)  # nothing to do after `make demo`
    run(f"{sys.executable} {script}", sandbox)
    if "trainer.fit" in code:
        assert (sandbox / "runs/api/metrics.jsonl").exists()
        shutil.rmtree(sandbox / "runs/api")


def test_named_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for named in re.findall(r"`(tests/[\w/.]+)`", README):
        assert (ROOT / named).exists(), named
