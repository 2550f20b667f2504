"""What a drill is: a name, a seed, cells that pass or say why they do not, and one observable."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Skipped(Exception):
    """The machine cannot do what a drill needs; the text says what."""


@dataclass
class Cells:
    """What a drill tries, and what came of it.

    Attributes:
        folder: Its own, with packed photographs in ``train``.
        seed: Of all that is drawn.
        is_long: Whether this is the long tier.
        num_cells: Cells tried.
        failures: What went wrong, a line each.
        slowest: Seconds of the longest cell.
        notes: What was seen, for the result line.
    """

    folder: Path
    seed: int
    is_long: bool
    num_cells: int = 0
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = random.Random(self.seed)

    @contextmanager
    def cell(self, name: str) -> Iterator[None]:
        """Try one thing; what it raises is noted, and the drill goes on."""
        started = time.monotonic()
        self.num_cells += 1
        try:
            yield
        except Skipped:
            self.num_cells -= 1
            raise
        except Exception as error:
            self.failures.append(f"{name}: {type(error).__name__}: {str(error)[-1200:]}")
        finally:
            self.slowest = max(self.slowest, time.monotonic() - started)

    def check(self, name: str, passes: object) -> None:
        """Try one thing that says itself whether it passed."""
        with self.cell(name):
            assert passes, "it does not hold"

    def tests(self, *names: str) -> None:
        """Run tests of the suite, each a cell: what they show is not shown twice."""
        command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *names]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        found = re.findall(r"^(PASSED|FAILED|ERROR) (\S+.*)$", done.stdout, re.MULTILINE)
        wrong = [f"{kind} {name}" for kind, name in found if kind != "PASSED"]
        self.num_cells += len(found)
        self.failures += wrong
        if not found or (done.returncode and not wrong):
            self.failures.append(
                f"pytest {' '.join(names)}: {done.stdout[-600:]}{done.stderr[-300:]}"
            )


@dataclass(frozen=True)
class Drill:
    """One row of the table.

    Attributes:
        what: What passing means, one line.
        run: Tries it.
        seconds: Hard limit.
        long_seconds: The same in the long tier; None if it has nothing to add there.
        is_long_only: Whether it is left out of tier P.
    """

    what: str
    run: Callable[[Cells], None]
    seconds: float = 90
    long_seconds: float | None = None
    is_long_only: bool = False
