"""Successive halving over settings: many short measurements, then fewer and longer ones.

A rung measures the base and some settings one after the other; what counts is the ratio to the base
of the same rung, so that a machine that slows down in between misleads nobody. The first rung
changes one thing at a time. Each next one keeps the faster half of what beat the base, adds unions
of the best of them, and measures twice as long. Nothing here knows what a setting is.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

GAIN = 1.02  # a change has to be worth this much to be kept
FIRST_SHARE = 0.6  # of the budget, at most, for the first rung
SLOW_SHARE = 0.35  # of the budget, at most, for one measurement: compiling may take minutes
MOST_RUNGS = 5
OUT_OF_MEMORY = "out of memory"  # the one problem that is done something about


@dataclass(frozen=True)
class Outcome:
    """What one measurement found.

    Attributes:
        images_per_second: Over all its measured steps; 0 where there is none.
        seconds: Of each of these steps.
        problem: Why there is none: ``out of memory``, ``refused: ...``, ...
        peak_bytes: Most memory of rank 0.
    """

    images_per_second: float = 0.0
    seconds: tuple[float, ...] = ()
    problem: str = ""
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Trial:
    """A measurement in a rung.

    Attributes:
        setting: What was measured.
        rung: In which rung, from 0.
        outcome: What was found.
        ratio: Speed over that of the base in the same rung; 0 where it failed.
    """

    setting: Any
    rung: int
    outcome: Outcome
    ratio: float


@dataclass
class Found:
    """What a search found.

    Attributes:
        base: What everything is compared with: the given setting, or with the fewest chunks more
            that fit in memory.
        best: The fastest setting; the base itself where nothing is worth its change.
        trials: All measurements, in order.
        left_out: Settings of the first rung that there was no time for.
    """

    base: Any
    best: Any
    trials: list[Trial] = field(default_factory=list)
    left_out: list[Any] = field(default_factory=list)


# A setting, seconds of measured steps, and seconds after which to give up.
Measure = Callable[[Any, float, float], Outcome]


class NothingRuns(RuntimeError):
    """Not even the base can be measured; the message says why."""


def search(
    base: Any,
    axes: Mapping[str, Sequence[Any]],
    measure: Measure,
    *,
    budget_seconds: float,
    first_seconds: float,
    on_trial: Callable[[Trial], None] = lambda _: None,
    now: Callable[[], float] = time.monotonic,
) -> Found:
    """Find a fast setting within a budget.

    Args:
        base: A frozen dataclass.
        axes: Values of its fields, the base's own first; fields that matter most first, as those
            at the end are left out where time is short. ``chunks`` among them are what is raised
            where the base does not fit in memory.
        measure: Measures a setting, and never takes much longer than it was told to.
        budget_seconds: When to be done.
        first_seconds: Measured seconds of the first rung.
        on_trial: Told of every measurement.
        now: Clock.

    Raises:
        NothingRuns: If the base cannot be measured, with any number of chunks.
    """
    rungs = _Rungs(measure, now, now() + budget_seconds, budget_seconds, on_trial)
    base, first = rungs.fitting(base, axes.get("chunks", ()), first_seconds)
    found = Found(base, base, rungs.trials)
    singles = [replace(base, **{n: v}) for n, values in axes.items() for v in values[1:]]
    singles = [setting for setting in singles if setting != base]
    measured = rungs.run(0, base, first, singles, first_seconds, FIRST_SHARE)
    found.left_out = singles[len(measured) :]
    seen = set(singles)
    for rung in range(1, MOST_RUNGS):
        better = sorted((t for t in measured if t.ratio >= GAIN), key=lambda t: -t.ratio)
        if better:
            found.best = better[0].setting
        kept = [trial.setting for trial in better[: math.ceil(len(better) / 2)]]
        unions = [*_unions(base, better), *_retries(base, better, measured)]
        unions = [u for u in unions if u not in seen]
        if not unions and len(kept) <= 1:
            break
        seen.update(unions)
        # The union of all that helped is the best guess; one that loses is beaten by those kept.
        candidates = [*unions[:1], *kept, *unions[1:]]
        longer = rungs.run(rung, base, None, candidates, first_seconds * 2**rung, 1.0)
        if not any(trial.ratio for trial in longer):
            break
        # Those that there was no time for keep what they have shown.
        done = {trial.setting for trial in longer}
        measured = longer + [t for t in better if t.setting in kept and t.setting not in done]
    better = [trial for trial in measured if trial.ratio >= GAIN]
    found.best = max(better, key=lambda t: t.ratio).setting if better else base
    return found


def _unions(base: Any, better: Sequence[Trial]) -> list[Any]:
    """Join what helped: first all of it, then the three best in pairs; the faster one's value."""
    groups: list[Sequence[Trial]] = [better, *itertools.combinations(better[:3], 2)]
    found = [_union(base, [trial.setting for trial in group]) for group in groups]
    return [u for u in dict.fromkeys(found) if u != base]


def _retries(base: Any, better: Sequence[Trial], measured: Sequence[Trial]) -> list[Any]:
    """Join what did not fit in memory with the best: that may take less."""
    failed = [t.setting for t in measured if t.outcome.problem == OUT_OF_MEMORY]
    return [_union(base, [better[0].setting, setting]) for setting in failed] if better else []


def _union(base: Any, joined: Sequence[Any]) -> Any:
    """Join changes of the base; the first one's value, where several change one field."""
    union = base
    for setting in reversed(joined):
        changed = {n: v for n, v in vars(setting).items() if v != getattr(base, n)}
        union = replace(union, **changed)
    return union


class _Rungs:
    """Measures rungs until the time is up."""

    def __init__(
        self,
        measure: Measure,
        now: Callable[[], float],
        end: float,
        budget: float,
        on_trial: Callable[[Trial], None],
    ) -> None:
        self._measure, self._now, self._end, self._budget = measure, now, end, budget
        self._on_trial = on_trial
        self._overhead = 0.0  # seconds of a measurement beside its measured steps
        self.trials: list[Trial] = []

    def fitting(self, base: Any, chunks: Sequence[int], seconds: float) -> tuple[Any, Outcome]:
        """Measure the base, cut into more chunks until it fits in memory."""
        more, problem = sorted(k for k in chunks if k > base.chunks), ""
        for setting in (base, *(replace(base, chunks=k) for k in more)):
            outcome = self._one(setting, seconds)
            self._note(Trial(setting, 0, outcome, 0.0 if outcome.problem else 1.0))
            if not outcome.problem:
                return setting, outcome
            problem = outcome.problem
            if problem != OUT_OF_MEMORY:
                break
        raise NothingRuns(f"The setting that was given cannot be measured: {problem}")

    def run(
        self,
        rung: int,
        base: Any,
        base_outcome: Outcome | None,
        settings: Sequence[Any],
        seconds: float,
        share: float,
    ) -> list[Trial]:
        """Measure the base, if it is not yet, and as many settings as there is time for."""
        end = self._end - (1 - share) * self._budget
        if base_outcome is None:
            if not settings or self._now() + 2 * (self._overhead + seconds) > end:
                return []
            base_outcome = self._one(base, seconds)
            self._note(Trial(base, rung, base_outcome, 0.0 if base_outcome.problem else 1.0))
        found: list[Trial] = []
        for setting in settings:
            if self._now() + self._overhead + seconds > end:
                break
            outcome = self._one(setting, seconds)
            speed = base_outcome.images_per_second
            ratio = 0.0 if outcome.problem or not speed else outcome.images_per_second / speed
            found.append(Trial(setting, rung, outcome, ratio))
            self._note(found[-1])
        return found

    def _one(self, setting: Any, seconds: float) -> Outcome:
        before = self._now()
        limit = self._end - before
        if self._overhead:  # the base, which is first, may take all of it
            limit = min(limit, max(SLOW_SHARE * self._budget, 3 * self._overhead))
        outcome = self._measure(setting, seconds, limit)
        if not outcome.problem:
            took = self._now() - before - seconds
            # Of the usual ones: a setting that compiles says nothing about the next.
            self._overhead = min(self._overhead, took) if self._overhead else max(took, 0.0)
        return outcome

    def _note(self, trial: Trial) -> None:
        self.trials.append(trial)
        self._on_trial(trial)
