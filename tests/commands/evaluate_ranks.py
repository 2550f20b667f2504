"""Trains with a probe beside the encoder and scores on one and two ranks; started by its test.

The ranks are forks of this process, which has everything loaded.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist

from fastclr import runs
from fastclr.commands import evaluate as command
from fastclr.evaluation import forgetting, linear_sgd
from fastclr.evaluation.linear_joint import JointProbe
from fastclr.evaluations import joined
from fastclr.interruption import Interruption
from pipelines.writer import write_shards
from tests.drills.forks import Ranks, config_of, outcome, small_data

PROTOCOLS = (
    "quick", "ridge", "knn", "linear-lbfgs", "linear-sgd", "linear-joint", "layers", "forgetting",
    "pictures",
)  # fmt: skip


def run(folder: Path, num_ranks: int, work: Any) -> list[int | None]:
    """Run work on ranks and return their exit codes."""
    ranks = Ranks(folder, num_ranks, work)
    try:
        assert ranks.wait(), f"ranks hang: {ranks.said()}"
        return ranks.codes
    finally:
        ranks.kill()
        for rank in range(num_ranks):
            sys.stderr.write(ranks.said(rank))


def train(folder: Path, name: str, num_ranks: int = 1, chunks: int = 1, joint: bool = True) -> Path:
    """Train, or go on with, a run that is scored after each epoch; return its folder."""
    run_dir, ds = folder / name, folder / f"{name}.json"
    ds.write_text(json.dumps({"gradient_accumulation_steps": chunks}))
    config = config_of(folder, run_dir)
    evaluation = replace(config.evaluation, test=str(folder / "test"), joint_probe=joint)
    config = replace(config, evaluation=evaluation)

    def work() -> None:
        with Interruption() as interruption:
            runs.train(config, str(ds), ["test"], interruption)

    assert run(folder, num_ranks, work) == num_ranks * [0]
    return run_dir


def trained(run_dir: Path) -> dict[str, Any]:
    """Return what a training led to."""
    lines = (run_dir / "evaluations.jsonl").read_text().splitlines()
    facts = json.loads((run_dir / "checkpoints/step-0000015/fastclr.json").read_text())
    return {
        **outcome(run_dir),
        "probe": facts["sha256"].get("probe.safetensors"),
        "rows": [json.loads(line) for line in lines],
    }


def resumed(folder: Path, before: Path) -> dict[str, Any]:
    """Return what a run leads to whose last step is taken again."""
    run_dir = folder / "resumed"
    shutil.copytree(before, run_dir)
    shutil.copy(folder / f"{before.name}.json", folder / "resumed.json")
    shutil.rmtree(run_dir / "checkpoints/step-0000015")
    train(folder, "resumed")
    return trained(run_dir)


def probe_of_ranks(file: Path) -> None:
    """Train a probe on this rank's rows of some batches; rank 0 writes its weights."""
    with joined() as world:
        probe = JointProbe(6, 3, batch_size=20)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            h_NF = torch.randn(20, 6, generator=generator)
            label_N = torch.randint(-1, 3, (20,), generator=generator)
            rows = torch.arange(20).tensor_split([7])[world.rank] if world.num_ranks > 1 else ...
            found = probe.step(h_NF[rows], label_N[rows], 9)
        if world.is_main:
            weights = probe.classifier.weight.flatten().tolist()
            file.write_text(json.dumps([*weights, *torch.stack(found).tolist()]))
        if world.num_ranks > 1:
            dist.barrier()


def evaluate(folder: Path, run_dir: Path, num_ranks: int, **options: Any) -> list[int | None]:
    """Score a run by the command."""
    texts = (str(folder / "train"), str(folder / "test"))
    work = partial(command.evaluate, run_dir, *texts, maps=("tsne",), cached_views=2, **options)
    return run(folder, num_ranks, work)


def scored(folder: Path, before: Path, num_ranks: int) -> dict[str, Any]:
    """Return the scores on ranks, and which files of features there are."""
    run_dir = folder / f"scored-{num_ranks}"
    shutil.copytree(before, run_dir)
    codes = evaluate(folder, run_dir, num_ranks, protocol=PROTOCOLS)
    entries = json.loads((run_dir / "scores.json").read_text())["protocols"]
    again = evaluate(folder, run_dir, num_ranks, protocol=PROTOCOLS)
    wrong = evaluate(folder, run_dir, num_ranks, protocol=("pictures",), layers=("nothing",))
    fails = evaluate(folder, run_dir, num_ranks, protocol=("semi-1",), head_layers=9)
    return {
        "codes": [codes, again, wrong, fails],
        "scores": {name: entry["scores"] for name, entry in entries.items()},
        "chosen": {name: entry["chosen"] for name, entry in entries.items()},
        "settings": {name: entry["settings"] for name, entry in entries.items()},
        "features": sorted(path.name for path in (run_dir / "features/cache").iterdir()),
        "unchanged": entries == json.loads((run_dir / "scores.json").read_text())["protocols"],
    }


def main(result: Path) -> None:
    """Write what was found."""
    torch.set_num_threads(1)
    forgetting.EPOCHS = 2
    linear_sgd.SMALL_IMAGES = linear_sgd.SGDSettings(epochs=3, batch_size=16)
    with small_data() as folder:
        write_shards(folder / "images" / "test", folder / "test")
        joint = train(folder, "joint")
        found: dict[str, Any] = {
            "joint": trained(joint),
            "alone": trained(train(folder, "alone", joint=False)),
            "joint in chunks": trained(train(folder, "joint-chunks", chunks=2)),
            "alone in chunks": trained(train(folder, "alone-chunks", chunks=2, joint=False)),
            "joint on 2 ranks": trained(train(folder, "joint-ranks", num_ranks=2)),
            "alone on 2 ranks": trained(train(folder, "alone-ranks", num_ranks=2, joint=False)),
            "resumed": resumed(folder, joint),
            "probes": [],
            "scored": [scored(folder, joint, num_ranks) for num_ranks in (1, 2)],
        }
        for num_ranks in (1, 2):
            file = folder / f"probe-{num_ranks}.json"
            codes = run(folder, num_ranks, partial(probe_of_ranks, file))
            assert codes == num_ranks * [0]
            found["probes"].append(json.loads(file.read_text()))
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
