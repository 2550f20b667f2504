"""Has anything become slower? Ratios of a short run beside those checked in: ``make bench-check``.

python benchmarks/check.py [--minutes 5] [--only LARS]

Times of two days or machines say nothing; ratios within a run do: how many times longer another
library takes than we, the bare loop beside the trainer, memory's least time beside LARS. A ratio
that lost more than 25 % is measured once more where there is time; if it still has, the command
exits with 1. The results of the long runs are what is compared with (``results/*.jsonl``).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import lars
import trainer
import tyro
from harness import interleaved
from peer_parts import contenders, parts
from peer_parts.names import LIGHTLY
from report_parts.rows import Row, named, read_rows

RESULTS = Path(__file__).with_name("results")
MOST_LOST = 0.25
SHORT = parts.Settings(
    rounds=2, seconds=0.8, calls=7, steps=6, limit_seconds=6.0, only=(LIGHTLY,)
)  # fmt: skip
MODEL = "resnet50"  # whose LARS is looked at
TRAINER, LARS = "bare loop / trainer", f"triad / LARS, {MODEL}"

Ratios = dict[str, float]


class Verdict(NamedTuple):
    """A ratio then and now; more is better.

    Attributes:
        name: Of what.
        checked: Checked in.
        fresh: Measured now.
    """

    name: str
    checked: float
    fresh: float

    @property
    def is_lost(self) -> bool:
        """Whether more than :data:`MOST_LOST` of it is gone."""
        return self.fresh < (1 - MOST_LOST) * self.checked

    def line(self) -> str:
        """Return it for people."""
        change = self.fresh / self.checked - 1
        word = "LOST" if self.is_lost else "ok"
        return f"{self.name:44} {self.checked:8.2f} {self.fresh:8.2f} {change:+7.0%}  {word}"


def of_peers(rows: list[Row]) -> Ratios:
    """Return how many times longer lightly takes than we, from rows of ``peers.py``."""
    found: Ratios = {}
    for row in rows:
        if row["variant"] == LIGHTLY and row["ratio"] is not None:
            sizes = row["sizes"]
            size = f"{sizes['side']} px" if "side" in sizes else f"N = {sizes['batch']:,}"
            found[f"lightly / fastclr, {row['name'].removeprefix('peers ')}, {size}"] = row["ratio"]
    return found


def share(rows: list[Row], part: str, whole: str) -> float:
    """Return the share of one variant's time in another's: the median of those within a round."""
    seconds = {row["variant"]: row["seconds"] for row in rows}
    pairs = zip(seconds[part], seconds[whole], strict=True)
    return statistics.median(a / b for a, b in pairs)


def of_trainer(rows: list[Row]) -> Ratios:
    """Return the share of a step that is the bare loop's, from rows of ``trainer.py``."""
    return {TRAINER: share(rows, "bare loop", "trainer")}


def of_lars(rows: list[Row]) -> Ratios:
    """Return the share of a step of LARS that memory needs, from rows of one model."""
    return {LARS: share(rows, lars.TRIAD, "fastclr")}


def checked_in(folder: Path) -> Ratios:
    """Return the ratios that lie in a folder of results; a file that is missing has none."""
    found = of_peers(read_rows(folder / "peers.jsonl"))
    if blocks := named(read_rows(folder / "trainer.jsonl"), "ten steps"):
        found |= of_trainer(blocks)
    steps = named(read_rows(folder / "lars.jsonl"), "optimizer step")
    if steps := [row for row in steps if row["sizes"]["model"] == MODEL]:
        found |= of_lars(steps)
    return found


def run_peers(part: str, side: int, folder: Path) -> Ratios:
    """Measure one part of a step by lightly and by us."""
    work = _work(side, folder)
    if part == "step":
        with tempfile.TemporaryDirectory(dir=folder) as runs:
            return of_peers(parts.step(work, SHORT, Path(runs)))
    return of_peers(getattr(parts, part)(work, SHORT))


@lru_cache
def _work(side: int, folder: Path) -> contenders.Work:
    return contenders.make_work(side, folder / f"images-{side}")


def run_trainer(folder: Path) -> Ratios:
    """Measure two blocks of trainer and bare loop."""
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        blocks = trainer.overhead(contenders.small_images(), 2, Path(runs))
    return of_trainer(trainer.measurements(blocks, [], contenders.small_images()))


def run_lars(folder: Path) -> Ratios:
    """Measure our LARS and the triad."""
    sizes = lars.shapes(MODEL)
    steps = {"fastclr": lars.ours(lars.groups(sizes))}
    steps |= lars.floors(sum(size.numel() for size in sizes))
    seconds = lars.whole_triads(interleaved(steps, 9))
    return of_lars([{"variant": name, "seconds": values} for name, values in seconds.items()])


GUARDS: dict[str, Callable[[Path], Ratios]] = {
    "LARS": run_lars,
    "trainer": run_trainer,
    **{
        f"{part}, {side} px": partial(run_peers, part, side)
        for side in contenders.WORKS
        for part in ("loss", "views", "step")
    },
}


def compare(checked: Mapping[str, float], fresh: Mapping[str, float]) -> list[Verdict]:
    """Return a verdict on each ratio that both have."""
    return [Verdict(name, checked[name], fresh[name]) for name in fresh if name in checked]


def measure(checked: Ratios, minutes: float, guards: Sequence[str] = ()) -> list[Verdict]:
    """Run the guards; those that found a loss once more, where the time allows it.

    Args:
        checked: Ratios checked in.
        minutes: Bound of it all, for a machine that nobody else uses.
        guards: Which guards; all if empty.
    """
    started = time.monotonic()
    fresh: Ratios = {}
    with tempfile.TemporaryDirectory() as name:
        for guard in guards or GUARDS:
            run = GUARDS[guard]
            print(f"{guard} ...", flush=True)
            before = time.monotonic()
            found = run(Path(name))
            now = time.monotonic()
            fits = 2 * now - before - started < 60 * minutes
            if fits and any(verdict.is_lost for verdict in compare(checked, found)):
                print(f"{guard}: less than before, measured once more ...", flush=True)
                again = run(Path(name))
                found = {ratio: max(found[ratio], again[ratio]) for ratio in found}
            fresh |= found
    return compare(checked, fresh)


def main(minutes: float = 5.0, only: tuple[str, ...] = (), results: Path = RESULTS) -> None:
    """Measure, compare, exit with 1 on a loss.

    Args:
        minutes: Bound of the run.
        only: Parts that are looked at, as the run names them, such as LARS; all by default.
        results: Folder of the results to compare with.
    """
    if unknown := set(only) - set(GUARDS):
        raise SystemExit(f"error: there is no part {sorted(unknown)}: give of {[*GUARDS]}.")
    verdicts = measure(checked_in(results), minutes, only)
    if not verdicts:
        raise SystemExit(f"error: {results} has no ratio to compare with: run the benchmarks.")
    print(f"\n{'ratio, more is better':44} {'then':>8} {'now':>8} {'change':>7}")
    print("\n".join(verdict.line() for verdict in verdicts))
    if lost := [verdict.name for verdict in verdicts if verdict.is_lost]:
        raise SystemExit(f"{len(lost)} of {len(verdicts)} lost over {MOST_LOST:.0%}: {lost}")


if __name__ == "__main__":
    tyro.cli(main)
