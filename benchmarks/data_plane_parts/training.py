"""End-to-end parity: what short trainings score whose views other back-ends made."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.photos import write_photo_tiles
from pipelines.writer import write_shards

ROOT = Path(__file__).parents[2]
BACKENDS = ("threads", "reference", "kornia", "dali")
SCORES = ("knn_top1", "linear_top1")


def measure(root: Path, *, epochs: int, seeds: int, tiles: int) -> Iterator[dict[str, Any]]:
    """Train and evaluate every back-end with every seed, by the commands a user gives.

    Args:
        root: Folder for data and runs.
        epochs: Length of each run.
        seeds: Seeds from 0, of weights, order and views.
        tiles: Training tiles of each of 16 classes, 62 for the test.

    Yields:
        A row a run.
    """
    write_photo_tiles(root / "tiles", train_per_photo=tiles)
    for split in ("train", "test"):
        write_shards(root / "tiles" / split, root / split)
    for seed in range(seeds):
        for backend in BACKENDS:
            yield {
                "backend": backend, "seed": seed, "epochs": epochs, "tiles": 16 * tiles,
                **_run(root, backend, seed, epochs),
            }  # fmt: skip


def _run(root: Path, backend: str, seed: int, epochs: int) -> dict[str, Any]:
    """Train with the recipe ``demo`` and score the encoder."""
    run = root / f"{backend}-{seed}"
    _command(
        "fastclr/train.py", "--ds-config", "fastclr/recipes/fp32_clipped.json", "--recipe", "demo",
        "--data.train", root / "train", "--data.backend", backend, "--run-dir", run,
        "--seed", seed, "--epochs", epochs, "--optimizer.warmup-epochs", 1,
    )  # fmt: skip
    _command("tools/evaluate.py", "--run", run, "--train", root / "train", "--test", root / "test")
    found = json.loads((run / "scores.json").read_text(encoding="utf-8"))["scores"]
    untrained = {f"untrained_{name}": found["untrained"][name] for name in SCORES}
    return {name: found["trained"][name] for name in SCORES} | untrained


def _command(*words: object) -> None:
    """Run a command of the project in its root."""
    command = [sys.executable, *map(str, words)]
    environment = {"LOCAL_RANK": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr[-2000:]}")


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table: means over the seeds, their range, and the distance from ``reference``.

    Seed noise is the largest range of a back-end's scores over the seeds.
    """
    if not rows:
        return []
    seeds, epochs = len({row["seed"] for row in rows}), rows[0]["epochs"]
    names = list(dict.fromkeys(row["backend"] for row in rows))
    scores = {b: {s: [r[s] for r in rows if r["backend"] == b] for s in SCORES} for b in names}
    noise = {s: max(max(scores[b][s]) - min(scores[b][s]) for b in names) for s in SCORES}
    table = [
        f"Recipe `demo` for {epochs} epochs of {rows[0]['tiles']} tiles, {seeds} seeds; "
        "mean accuracy on test tiles (lowest to highest). "
        "Seed noise, the widest range of any back-end: "
        + ", ".join(f"{s.split('_')[0]} {100 * noise[s]:.1f}" for s in SCORES)
        + " points."
        + (" One seed tells of no noise." if seeds == 1 else ""),
        "",
        "| back-end | kNN, % | linear, % | from `reference`: kNN, linear | within seed noise |",
        "|---|--:|--:|--:|---|",
    ]
    for b in names:
        means = {s: statistics.mean(scores[b][s]) for s in SCORES}
        base = {s: statistics.mean(scores.get("reference", scores[b])[s]) for s in SCORES}
        cells = [
            f"{100 * means[s]:.1f} ({100 * min(scores[b][s]):.1f} to {100 * max(scores[b][s]):.1f})"
            for s in SCORES
        ]
        away = [100 * (means[s] - base[s]) for s in SCORES]
        within = all(abs(means[s] - base[s]) <= noise[s] for s in SCORES)
        verdict = "one seed: not known" if seeds == 1 else "yes" if within else "NO"
        table.append(
            f"| {b} | {cells[0]} | {cells[1]} | {away[0]:+.1f}, {away[1]:+.1f} | {verdict} |"
        )
    return table
