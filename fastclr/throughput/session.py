"""The whole of ``fastclr bench``: account, search, comparison, within a budget."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastclr import ds_config
from fastclr.config import Config
from fastclr.ds_config import JSON
from fastclr.facts import num_cores
from fastclr.files import write_durably
from fastclr.throughput import settings
from fastclr.throughput.account import Account, account_of
from fastclr.throughput.jobs import Job, Processes
from fastclr.throughput.search import OUT_OF_MEMORY, Found, NothingRuns, Outcome, Trial, search
from fastclr.throughput.settings import Machine, Setting
from fastclr.world import World
from pipelines.backends import resolve_backend

# Where in the budget the search and all of it end, at the latest.
SEARCH_ENDS, ENDS = 0.72, 0.97
ACCOUNT_SHARE = 0.12  # of the budget: measured seconds of the account
MOST_PAIRS, LEAST_SECONDS = 4, 2.0
NEEDS = {"kornia": "kornia", "dali": "nvidia.dali", "triton": "triton", "threads": "numba"}

Say = Callable[[str], None]


@dataclass
class Results:
    """What a session found.

    Attributes:
        account: Of the base.
        found: Of the search; None where there was no time for one.
        pairs: Outcomes of base and best in turn.
        ended: Why parts are missing; empty if none is.
        command: How to train with the tuned files.
    """

    account: Account
    found: Found | None = None
    pairs: list[tuple[Outcome, Outcome]] | None = None
    ended: str = ""
    command: str = ""

    @property
    def ratios(self) -> list[float]:
        """Speed of the tuned setting over the base's, pair by pair."""
        return [b.images_per_second / a.images_per_second for a, b in self.pairs or ()]

    @property
    def ratio(self) -> float | None:
        """Their median."""
        return median(self.ratios) if self.pairs else None

    @property
    def base_speeds(self) -> list[float]:
        """Images a second of the base, each time that it was measured."""
        speeds = [self.account.images_per_second]
        if self.found and self.found.trials:
            base = self.found.base
            outcomes = [t.outcome for t in self.found.trials if t.setting == base]
            speeds += [o.images_per_second for o in outcomes if not o.problem]
        return speeds + [before.images_per_second for before, _ in self.pairs or ()]


class Session:
    """Measures one recipe on one machine.

    Args:
        config: Recipe and flags, with ``data.train``.
        ds: DeepSpeed JSON.
        ranks: Processes, all on this machine.
        budget_seconds: How long all may take, from ``started`` on.
        started: ``time.monotonic()`` at the beginning.
        say: Told what is being done.
        trace: File for a trace of the tuned setting; None for no trace.

    Raises:
        ConfigError: If recipe and JSON do not go together.
    """

    def __init__(
        self,
        config: Config,
        ds: JSON,
        *,
        ranks: int,
        budget_seconds: float,
        started: float,
        say: Say,
        trace: Path | None = None,
    ) -> None:
        # Nothing is evaluated, saved or ended but by the plan.
        self.config = replace(
            config,
            run_dir="measured",
            epochs=1.0,
            minutes=None,
            checkpoint_every=10**9,
            evaluation=replace(config.evaluation, test=""),
        )
        self.given, self.ds = config, ds
        self._started, self._budget, self._say = started, budget_seconds, say
        self._trace_file = trace
        world = World(0, ranks, 0, ranks)
        resolved, full = ds_config.resolve(self.config, ds, world)
        self.images_per_rank = ds_config.images_per_rank(full, world)
        self.images = resolved.global_batch_size or 0
        self.machine = _machine(self.config, ranks)
        threads = int(os.environ.get("OMP_NUM_THREADS", self.machine.cores))
        self.base = settings.given(self.config, ds, self.machine, threads)
        self.axes = settings.axes(self.base, ds, self.machine, self.images_per_rank)
        self._processes = Processes(ranks, self.machine.device == "cuda")
        self._starts: dict[Setting, float] = {}  # seconds of a measurement beside its steps

    def run(self) -> Results:
        """Do everything there is time for.

        Raises:
            NothingRuns: If not even the account could be made.
        """
        account, base = self._account()
        results = Results(account)
        axes = ordered(self.axes, account.verdict.bottleneck)
        if "chunks" in axes:  # far away ones are slower, and time is short
            near = (base.chunks // 2, 2 * base.chunks, 4 * base.chunks)
            axes["chunks"] = [base.chunks, *(k for k in near if k in axes["chunks"])]
        budget = self._until(SEARCH_ENDS)
        first = min(max(LEAST_SECONDS, 4 * account.plain), max(0.05 * self._budget, 1.0))
        if budget <= first:
            results.ended = "There was no time left to tune: give more --budget-minutes."
            return results
        self._say(f"tuning for {budget:.0f} s: {', '.join(axes)}")
        try:
            results.found = search(
                base, axes, self.measure, budget_seconds=budget, first_seconds=first,
                on_trial=self._tell, now=time.monotonic,
            )  # fmt: skip
        except NothingRuns as error:
            results.ended = f"{error}. Give more --budget-minutes."
            return results
        if self._trace_file:
            self._trace(results.found.best, self._trace_file)
        if results.found.best != results.found.base:
            results.pairs = self._compare(results.found)
        return results

    def measure(self, setting: Setting, seconds: float, limit: float) -> Outcome:
        """Run a trial in processes of its own."""
        config, ds = settings.apply(setting, self.base, self.config, self.ds)
        job = Job("trial", config, ds, setting.torch_threads, seconds)
        before = time.monotonic()
        found = self._processes.run(job, limit)
        if "problem" in found:
            return Outcome(problem=found["problem"])
        taken = tuple(found["seconds"])
        self._starts[setting] = time.monotonic() - before - sum(taken)
        speed = found["images"] * len(taken) / sum(taken)
        return Outcome(speed, taken, peak_bytes=found["peak_bytes"])

    def _trace(self, setting: Setting, out: Path) -> None:
        """Leave a trace of some steps of a setting."""
        config, ds = settings.apply(setting, self.base, self.config, self.ds)
        out.parent.mkdir(parents=True, exist_ok=True)
        job = Job("profile", config, ds, setting.torch_threads, 0.0, str(out.resolve()))
        found = self._processes.run(job, self._until(1.0))
        self._say(found.get("problem") or f"{out}: open it in https://ui.perfetto.dev")

    def _account(self) -> tuple[Account, Setting]:
        """Account for the base; where it does not fit in memory, for the fewest chunks that do."""
        chunks = [k for k in self.axes.get("chunks", ()) if k >= self.base.chunks]
        seconds, problem = max(4.0, ACCOUNT_SHARE * self._budget), ""
        for count in sorted(chunks) or [self.base.chunks]:
            setting = replace(self.base, chunks=count)
            self._say(f"accounting for {settings.describe(setting, self.base)}")
            config, ds = settings.apply(setting, self.base, self.config, self.ds)
            job = Job("account", config, ds, setting.torch_threads, seconds)
            raw = self._processes.run(job, self._until(ENDS))
            if "problem" not in raw:
                return account_of(raw), setting
            problem = raw["problem"]
            self._say(f"  {problem}")
            if problem != OUT_OF_MEMORY:
                break
        raise NothingRuns(f"the run cannot be measured: {problem}")

    def _compare(self, found: Found) -> list[tuple[Outcome, Outcome]]:
        """Measure base and best in turn."""
        left, pairs = self._until(ENDS), []
        self._say(f"comparing for {left:.0f} s: {settings.describe(found.best, found.base)}")
        start = (self._starts[found.base] + self._starts[found.best]) / 2
        seconds = min(10.0, max(LEAST_SECONDS, left / (2 * MOST_PAIRS) - start))
        for _ in range(MOST_PAIRS):
            before = time.monotonic()
            pair = [self.measure(s, seconds, self._until(1.0)) for s in (found.base, found.best)]
            if any(outcome.problem for outcome in pair):
                break
            pairs.append((pair[0], pair[1]))
            ratio = pair[1].images_per_second / pair[0].images_per_second
            self._say(
                f"  {pair[0].images_per_second:,.0f} -> {pair[1].images_per_second:,.0f} images/s: "
                f"{ratio:.2f}x"
            )
            if self._until(ENDS) < time.monotonic() - before:
                break
        return pairs

    def _until(self, share: float) -> float:
        """Return the seconds left until a share of the budget is spent."""
        return self._started + share * self._budget - time.monotonic()

    def _tell(self, trial: Trial) -> None:
        what = settings.describe(trial.setting, self.base)
        speed = f"{trial.outcome.images_per_second:,.0f} images/s, {trial.ratio:.2f}x"
        self._say(f"  rung {trial.rung}: {what}: {trial.outcome.problem or speed}")


def _machine(config: Config, ranks: int) -> Machine:
    """Say what there is on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cores = max(1, num_cores() // ranks)
    usual = resolve_backend(config.data.backend, torch.device(device), config.data.in_memory)
    usable = [n for n in NEEDS if n != usual and (n != "triton" or device == "cuda") and _has(n)]
    compiles = settings.compiler_is_there(device) and not config.compile
    return Machine(device, ranks, cores, tuple(usable), compiles)


def _has(backend: str) -> bool:
    """Whether a back-end's package is installed; found without importing it."""
    try:
        return importlib.util.find_spec(NEEDS[backend]) is not None
    except ModuleNotFoundError:
        return False


def ordered(axes: dict[str, list[Any]], bottleneck: str) -> dict[str, list[Any]]:
    """Put what may help against the bottleneck first: the last ones go where time is short.

    Compiling is last of all: it takes as long as many others together.
    """
    of_data = ("in_memory", "loader_threads", "backend", "prefetch")
    is_data = bottleneck == "data"

    def place(item: tuple[str, list[Any]]) -> tuple[bool, bool]:
        return item[0] == "compile", (item[0] in of_data) != is_data

    return dict(sorted(axes.items(), key=place))


def write_tuned(out: Path, session: Session, recipe: str, words: list[str], best: Setting) -> str:
    """Write ``tuned.json`` and ``tuned.flags``; return the command that trains with them.

    Args:
        out: Folder.
        session: What was measured.
        recipe: Its name.
        words: Flags that the user gave for the recipe.
        best: Setting to be written.
    """
    base = session.base
    _, ds = settings.apply(best, base, session.config, session.ds)
    out.mkdir(parents=True, exist_ok=True)
    write_durably(out / "tuned.json", json.dumps(ds, indent=1) + "\n")
    head = [f"# {settings.describe(best, base)}"]
    head += [f"# {note}" for note in settings.notes(best, base, session.images_per_rank)]
    lines = [*head, *settings.flags(best, base)]
    write_durably(out / "tuned.flags", "\n".join(lines) + "\n")
    variables = [f"{k}={v}" for k, v in settings.environment(best, base).items()]
    command = [
        "deepspeed", "--num_accelerators", str(session.machine.ranks), "--module",
        "fastclr", "train", "--ds-config", str(out / "tuned.json"), "--recipe", recipe, *words,
        f"@{out / 'tuned.flags'}", "--run-dir", "runs/tuned",
    ]  # fmt: skip
    return " ".join([*variables, shlex.join(command)])
