"""Send signals to a run at every kind of moment: it saves, leaves with its code, goes on exactly.

python tests/drills/signals.py [--instants 12] [--seed 0]

One line a drill; exit 1 at the first that fails.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from forks import Ranks, outcome, small_data, train

from fastclr import checkpointing
from fastclr.evaluation import online
from pipelines.loader import Loader

WITHIN_SECONDS = 15.0
EVER = 10**6


def random_instants(folder: Path, ranks: int, stage: int, count: int, seed: int) -> str:
    """SIGTERM to one rank or all, at instants drawn from a whole run, until it is done."""
    started = time.monotonic()
    whole = Ranks(folder, ranks, partial(train, folder, folder / f"whole{ranks}", stage))
    assert whole.wait() and not any(whole.codes), whole.said()
    duration = time.monotonic() - started
    expected, generator = outcome(folder / f"whole{ranks}"), random.Random(seed)
    saved, slowest, run_dir = 0, 0.0, folder / f"stopped{ranks}"
    while saved < count:
        run = Ranks(folder, ranks, partial(train, folder, run_dir, stage))
        if not run.wait(generator.uniform(0, duration)):
            _wait_for_handlers(run)
            run.signal(signal.SIGTERM, *generator.choice([(), (0,), (ranks - 1,)]))
            slowest = max(slowest, _ended(run))
        if any(run.codes):
            assert set(run.codes) == {75}, (run.codes, [run.said(r) for r in range(ranks)])
            step = _last_step(run_dir)
            assert f"after step {step}, which is saved" in run.said(), run.said()
            saved += 1
            continue
        assert outcome(run_dir) == expected, "the end is another"
        shutil.rmtree(run_dir)
    return f"{saved} of {count} saved and left with 75, in {slowest:.1f} s at most; ends equal"


def each_signal(folder: Path) -> str:
    """SIGUSR1 is a pre-emption too, SIGINT a person; both are saved."""
    for number, code in ((signal.SIGUSR1, 75), (signal.SIGINT, 130)):
        run_dir = folder / number.name
        run = Ranks(folder, 1, partial(train, folder, run_dir, epochs=EVER))
        run.wait_for(run_dir / "checkpoints/latest")
        run.signal(number)
        _ended(run)
        assert run.codes == [code] and number.name in run.said(), (run.codes, run.said())
        assert f"after step {_last_step(run_dir)}" in run.said()
    return "SIGUSR1 75, SIGINT 130, both saved"


def at_the_start(folder: Path) -> str:
    """A signal before the first step leaves a checkpoint of step 0."""
    run = Ranks(folder, 1, partial(train, folder, folder / "start"))
    _wait_for_handlers(run)
    run.signal(signal.SIGTERM)
    _ended(run)
    assert run.codes == [75] and _last_step(folder / "start") == 0, (run.codes, run.said())
    return "75 and step 0"


def in_a_wait(folder: Path) -> str:
    """A loader that hangs does not keep a run from leaving."""
    make = Loader.make_views

    def stalls(self: Loader, epoch: int, positions: Any, sample_ids: Any) -> Any:
        if positions.min() >= 48:
            time.sleep(EVER)
        return make(self, epoch, positions, sample_ids)

    run_dir = folder / "wait"
    with mock.patch.object(Loader, "make_views", stalls):
        run = Ranks(folder, 2, partial(train, folder, run_dir, epochs=EVER))
    run.wait_for(run_dir / "checkpoints/step-0000002")
    time.sleep(1)
    run.signal(signal.SIGTERM)
    seconds = _ended(run)
    assert run.codes == [75, 75] and _last_step(run_dir) == 3, (run.codes, run.said())
    return f"75 and all three steps in {seconds:.1f} s"


def in_a_save(folder: Path) -> str:
    """A save is finished, and no second one begun."""
    run_dir = folder / "save"
    with mock.patch.object(checkpointing, "sync", lambda _: time.sleep(0.3)):
        run = Ranks(folder, 1, partial(train, folder, run_dir, epochs=EVER))
    run.wait_for(run_dir / "checkpoints/.step-0000002.1.partial/model.safetensors")
    run.signal(signal.SIGTERM)
    _ended(run)
    assert run.codes == [75] and _last_step(run_dir) == 2, (run.codes, run.said())
    return "75 and the step that was being saved"


def twice(folder: Path) -> str:
    """A second signal does not wait for anything; an echo of the first is none."""
    run_dir = folder / "twice"
    evaluation = mock.Mock()
    evaluation.check.return_value = None
    evaluation.side_effect = lambda _: time.sleep(EVER)
    with mock.patch.object(online, "OnlineEvaluation", return_value=evaluation):
        work = partial(train, folder, run_dir, checkpoint_every=2, evaluation=_scored(folder))
        run = Ranks(folder, 1, work)
    run.wait_for(run_dir / "checkpoints/step-0000004")
    time.sleep(1)
    run.signal(signal.SIGTERM)
    time.sleep(0.2)
    run.signal(signal.SIGTERM)  # as a launcher passes it on
    assert not run.wait(2.5), "an echo was taken for a second wish"
    started = time.monotonic()
    run.signal(signal.SIGTERM)
    assert run.wait(5) and run.codes == [143], run.codes
    assert _last_step(run_dir) == 4
    return f"143 after {time.monotonic() - started:.1f} s, the last checkpoint whole"


def _scored(folder: Path) -> Any:
    from fastclr.config import EvaluationConfig

    return EvaluationConfig(test=str(folder / "train"))


def _last_step(run_dir: Path) -> int:
    checkpoint = checkpointing.latest(run_dir / "checkpoints")
    assert checkpoint is not None, "nothing was saved"
    return checkpointing.read_facts(checkpoint)["step"]


def _ended(run: Ranks) -> float:
    """Wait for the end after a signal; return how long it took."""
    started = time.monotonic()
    assert run.wait(WITHIN_SECONDS), f"{run.codes}: {[run.said(r) for r in range(len(run.ids))]}"
    return time.monotonic() - started


def _wait_for_handlers(run: Ranks) -> None:
    """Wait until every rank catches SIGTERM: a process that has just begun cannot."""
    bit = 1 << (signal.SIGTERM - 1)
    for rank, child in enumerate(run.ids):
        while run.codes[rank] is None:
            status = Path(f"/proc/{child}/status").read_text()
            caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
            if int(caught.split()[1], 16) & bit or "State:\tZ" in status:
                break
            time.sleep(0.001)


def main() -> int:
    """Run every drill."""
    parser = argparse.ArgumentParser(description="Send signals to a run at every kind of moment.")
    parser.add_argument("--instants", type=int, default=12, help="random ones (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (default: 0)")
    args = parser.parse_args()
    drills: dict[str, Callable[[Path], str]] = {
        "one rank": lambda f: random_instants(f, 1, 0, args.instants, args.seed),
        "two ranks, stage 1": lambda f: random_instants(f, 2, 1, args.instants, args.seed),
        "each signal": each_signal,
        "at the start": at_the_start,
        "waiting for data": in_a_wait,
        "while saving": in_a_save,
        "twice, in an evaluation": twice,
    }
    with small_data() as folder:
        for name, drill in drills.items():
            print(f"signal, {name}: {drill(folder)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
