"""Kill training at random instants, go on until it is done, compare with a run nobody killed.

python tests/drills/kill_resume.py [--runs 50] [--ranks 1] [--stage 0] [--seed 0]

SIGKILL hits all ranks at once, at an instant drawn uniformly from a whole run: in a step, while a
checkpoint is written, between epochs, before the first step. What counts is the end: weights,
momenta, position and every logged loss must be equal bit for bit. One line a run; exit 1 if one
differs. Drill A1 is the same.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from forks import LIMIT_SECONDS, Ranks, outcome, small_data, train

from fastclr import checkpointing

MOST_KILLS = 3  # of one run, then it may finish


def killed_runs(
    folder: Path, ranks: int, stage: int, seed: int
) -> Iterator[tuple[list[str], list[str]]]:
    """Yield where each run was killed, and in what its end differs; without end."""
    started = time.monotonic()
    run_dir = folder / f"whole{ranks}"
    whole = Ranks(folder, ranks, partial(train, folder, run_dir, stage))
    assert whole.wait() and not any(whole.codes), whole.said()
    duration = time.monotonic() - started
    expected, generator = outcome(run_dir), random.Random(seed)
    while True:
        kills: list[str] = []
        while not kills:  # a run that was faster than the first may have escaped
            kills = kill_and_resume(folder, ranks, stage, generator, duration)
        found = outcome(folder / "killed")
        yield kills, [name for name, value in expected.items() if found[name] != value]


def kill_and_resume(
    folder: Path, ranks: int, stage: int, generator: random.Random, duration: float
) -> list[str]:
    """Run to the end, killed on the way; return where each kill hit."""
    run_dir, kills = folder / "killed", []
    shutil.rmtree(run_dir, ignore_errors=True)
    while True:
        run = Ranks(folder, ranks, partial(train, folder, run_dir, stage))
        is_last = len(kills) == MOST_KILLS
        if run.wait(LIMIT_SECONDS if is_last else generator.uniform(0, duration)):
            assert not any(run.codes), run.said()
            return kills
        assert not is_last, f"it hangs: {run.said()}"
        run.kill()
        kills.append(_moment(run_dir / "checkpoints"))


def _moment(folder: Path) -> str:
    """Say where a run was when it was killed."""
    saved = [int(path.name.split("-")[1]) for path in checkpointing.list_checkpoints(folder)]
    after = f"after step {max(saved)}" if saved else "before the first checkpoint"
    return f"{'saving' if list(folder.glob('.step-*.partial')) else 'training'} {after}"


def main() -> int:
    """Parse the flags and run."""
    parser = argparse.ArgumentParser(description="Kill training at random instants and resume it.")
    parser.add_argument("--runs", type=int, default=50, help="runs to be killed (default: 50)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run (default: 1)")
    parser.add_argument("--stage", type=int, default=0, help="ZeRO stage (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (default: 0)")
    args = parser.parse_args()
    failures, where = 0, Counter[str]()
    with small_data() as folder:
        found = killed_runs(folder, args.ranks, args.stage, args.seed)
        for number, (kills, wrong) in zip(range(args.runs), found, strict=False):
            where.update(kill.split()[0] for kill in kills)
            failures += bool(wrong)
            verdict = f"DIFFERS in {', '.join(wrong)}" if wrong else "equal"
            print(f"run {number}: killed {'; '.join(kills)}: {verdict}", flush=True)
    moments = ", ".join(f"{count} {name}" for name, count in sorted(where.items()))
    print(
        f"kill_resume, {args.ranks} ranks, stage {args.stage}, seed {args.seed}: "
        f"{args.runs - failures} of {args.runs} equal bit for bit to the run nobody killed, after "
        f"{sum(where.values())} kills ({moments})"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
