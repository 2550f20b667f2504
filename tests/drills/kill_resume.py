"""Kill training at random instants, go on until it is done, compare with a run nobody killed.

python tests/drills/kill_resume.py [--runs 50] [--ranks 1] [--stage 0] [--seed 0]

SIGKILL hits all ranks at once, at an instant drawn uniformly from a whole run: in a step, while a
checkpoint is written, between epochs, before the first step. What counts is the end: weights,
momenta, position and every logged loss must be equal bit for bit. One line a run; exit 1 if one
differs.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

from forks import LIMIT_SECONDS, Ranks, outcome, small_data, train

from fastclr import checkpointing

MOST_KILLS = 3  # of one run, then it may finish


def drill(folder: Path, ranks: int, stage: int, num_runs: int, seed: int) -> int:
    """Print one line a run and a summary; return how many ended differently."""
    started = time.monotonic()
    whole = Ranks(folder, ranks, partial(train, folder, folder / "whole", stage))
    assert whole.wait() and not any(whole.codes), whole.said()
    duration = time.monotonic() - started
    expected = outcome(folder / "whole")
    generator = random.Random(seed)
    failures, where = 0, Counter[str]()
    for number in range(num_runs):
        kills: list[str] = []
        while not kills:  # a run that was faster than the first may have escaped
            kills = kill_and_resume(folder, ranks, stage, generator, duration)
        where.update(kill.split()[0] for kill in kills)
        found = outcome(folder / "killed")
        wrong = [name for name, value in expected.items() if found[name] != value]
        failures += bool(wrong)
        verdict = f"DIFFERS in {', '.join(wrong)}" if wrong else "equal"
        print(f"run {number}: killed {'; '.join(kills)}: {verdict}", flush=True)
    moments = ", ".join(f"{count} {name}" for name, count in sorted(where.items()))
    print(
        f"kill_resume, {ranks} ranks, stage {stage}, seed {seed}: {num_runs - failures} of "
        f"{num_runs} equal bit for bit to the run nobody killed, after {sum(where.values())} kills "
        f"({moments})"
    )
    return failures


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
    with small_data() as folder:
        return 1 if drill(folder, args.ranks, args.stage, args.runs, args.seed) else 0


if __name__ == "__main__":
    sys.exit(main())
