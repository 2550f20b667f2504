"""Weak and strong scaling over ranks, what is exposed of their talk, and a model checked by it.

python benchmarks/scaling.py [--ranks 2] [--rounds 5]

Every rank trains with the real trainer and loader on a core of its own; so does the one rank that
the others are compared with. Worlds of different sizes take turns, and ratios are taken within a
round. On a machine with GPUs each rank gets one; that was never run.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: ranks are forks of this process
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # CUDA does not survive a fork

import torch
import tyro
from harness import write_rows
from scaling_parts import links, page
from scaling_parts.forecasts import Assumed, alone_of, job_of
from scaling_parts.page import Results
from scaling_parts.ranks import Bench, Setup, rounds

from fastclr.config import Config
from fastclr.files import write_durably
from fastclr.recipes import RECIPES
from pipelines.photos import write_photo_tiles
from pipelines.writer import write_shards

RESULTS = Path(__file__).with_name("results") / "scaling.md"
HEADING = "## Measured\n"  # what stands below is replaced


def worlds(ranks: int, images: int) -> dict[str, list[Setup]]:
    """Return the worlds of weak and strong scaling, those of one rank first.

    The batch that is shared out has as many images as that of the most ranks in weak scaling.
    """
    numbers = [n for n in (1, 2, 4, 8, 16, 32) if n < ranks] + [ranks]
    whole = images * ranks
    return {
        "weak": [Setup(n, images) for n in numbers],
        "strong": [Setup(n, whole // n) for n in numbers if whole % n == 0],
    }


def slots(ranks: int) -> list[set[int]]:
    """Divide this machine's cores among ranks; some share one where there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // ranks)
    return [{cores[(r * share + k) % len(cores)] for k in range(share)} for r in range(ranks)]


def measure(bench: Bench, ranks: int, images: int, number: int, stages: bool) -> Results:
    """Let all worlds take turns; time single collectives between."""
    scaling = worlds(ranks, images)
    small, large = scaling["weak"][0], scaling["strong"][0]
    many = Setup(1, images, worlds=ranks)
    others = [Setup(ranks, images, stage=stage) for stage in (1, 2, 3)] if stages else []
    others += [Setup(ranks, images, exchange="ring")] if stages else []
    setups = dict.fromkeys([*scaling["weak"], *scaling["strong"], many])
    print("first a world that is not counted: what is compiled is compiled there", flush=True)
    replace(bench, warm_up=1, steps=1).run(Setup(ranks, images))
    found = rounds(bench, [*setups], number, _tell)
    found |= rounds(bench, others, max(1, number // 2), _tell)
    timed = links.measure(ranks, bench.slots, bench.folder)
    return Results(
        found, scaling, others, timed, links.fit(timed), alone_of(found, small, large, many),
        job_of(bench.config, images),
    )  # fmt: skip


def main(
    ranks: int = 0,
    images: int = 256,
    steps: int = 8,
    warm_up: int = 2,
    rounds: int = 4,
    stages: bool = True,
    assumed: Assumed = Assumed(),  # noqa: B008
    out: Path = RESULTS,
) -> None:
    """Measure, and write the page.

    Args:
        ranks: Most ranks; 0 for a rank on each GPU, or on each core where there is none.
        images: Images of each rank and step, in weak scaling.
        steps: Steps of a world in a round.
        warm_up: Steps before them.
        rounds: How often each world has its turn; half as often for the other ZeRO stages.
        stages: Whether to measure the other ZeRO stages and the ring too.
        assumed: Machine of the forecast.
        out: Page whose tables are replaced; rows and plot go beside it, as .jsonl and .svg.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    ranks = ranks or torch.cuda.device_count() or len(os.sched_getaffinity(0))
    if ranks < 2:
        raise SystemExit(
            f"{ranks} rank has nobody to scale with: this machine has one core and no two GPUs. "
            "Give --ranks 2 to let two share it, which tells of communication, not of efficiency."
        )
    config = RECIPES["cifar10-cpu"]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # An epoch is longer than a run, so that its order is made once.
        tiles = -(-images * ranks * (steps + warm_up + 2) // 16)
        write_photo_tiles(folder / "images", train_per_photo=tiles, test_per_photo=1)
        write_shards(folder / "images" / "train", folder / "shards", num_workers=1)
        bench = Bench(config, folder / "shards", folder, slots(ranks), warm_up, steps)
        results = measure(bench, ranks, images, rounds, stages)
    gpu_job = job_of(RECIPES["simclr-v1-paper"](), assumed.images, row_bytes=2, on_gpu=True)
    command = shlex.join(["python", "benchmarks/scaling.py", *sys.argv[1:]])
    text = page.text(results, gpu_job, assumed, _about(config), command)
    before = out.read_text(encoding="utf-8").partition(HEADING)[0] if out.exists() else ""
    write_durably(out, f"{before}{HEADING}\n{text}")
    write_rows(out.with_suffix(".jsonl"), page.rows(results, gpu_job, assumed, warm_up))
    page.plot(out.with_suffix(".svg"), results, gpu_job, assumed)
    print(text)


def _about(config: Config) -> str:
    """Say what is trained."""
    encoder = config.encoder
    return f"{encoder.name}, width {encoder.width}, {config.views.size} px, LARS, ZeRO 0 or as said"


def _tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    tyro.cli(main)
