"""From what a run measured of itself to a table that adds up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from throughput_parts import data_work, limits, observing
from throughput_parts.marks import BETWEEN

HAND_OUT = "hand out"
DATA = (
    data_work.READ, data_work.DECODE, data_work.READ_DECODE, data_work.DECODE_AUGMENT,
    data_work.AUGMENT, HAND_OUT,
)  # fmt: skip
MODEL = (
    observing.INPUT, observing.ENCODER, observing.HEAD, observing.MODEL, observing.HEAD_BACK,
    observing.ENCODER_BACK, observing.MODEL_BACK,
)  # fmt: skip
LOSS = (observing.LOSS, observing.LOSS_BACK)
# In the order of a step.
STAGES = (
    *DATA, observing.TO_DEVICE, observing.INPUT, observing.ENCODER, observing.HEAD,
    observing.MODEL, observing.LOSS, observing.LOSS_BACK, observing.HEAD_BACK,
    observing.ENCODER_BACK, observing.MODEL_BACK, observing.FINITE, observing.OPTIMIZER,
    observing.ENGINE, observing.TRAINER, observing.SIGNALS, observing.LEDGER,
    observing.LOGGING,
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Attributes:
        name: Of :data:`STAGES`, or a communication.
        alone: Images a second by itself; None where it was not measured so.
        work: Seconds a step inside the run; of the loader's stages summed over threads.
        exposed: Seconds of the step's wall time that are this stage's; the rest is overlapped.
        seconds: Of each step, as far as it is known.
    """

    name: str
    alone: float | None
    work: float
    exposed: float
    seconds: tuple[float, ...]

    @property
    def overlapped(self) -> float:
        """Seconds a step that cost no wall time of their own."""
        return max(0.0, self.work - self.exposed)


@dataclass(frozen=True)
class Account:
    """A run's wall time, explained.

    Attributes:
        stages: In the order of a step; what is not explained is the last one.
        wall: Mean seconds of a marked step.
        plain: Mean seconds of a step without marks.
        resident: Mean seconds of a step without a loader.
        verdict: Bottleneck and limit.
        uses: Share of each limit that the model uses while it runs.
        mfu: Model FLOPs over wall time and measured peak.
        raw: What the run measured.
    """

    stages: list[Stage]
    wall: float
    plain: float
    resident: float
    verdict: limits.Verdict
    uses: dict[str, float]
    mfu: float
    raw: Mapping[str, Any]

    @property
    def accounted(self) -> float:
        """Share of the wall time that stages explain."""
        return sum(s.exposed for s in self.stages if s.name != BETWEEN) / self.wall

    @property
    def images_per_second(self) -> float:
        """Of the run as it is, without marks."""
        return self.raw["images"] / self.plain


def account_of(raw: Mapping[str, Any]) -> Account:
    """Make the account of what :func:`throughput_parts.measuring.account` found."""
    stages = [*_data_stages(raw), *_step_stages(raw)]
    wall = fmean(raw["wall"])
    by_name = {stage.name: stage for stage in stages}
    data = {n: by_name[n].work for n in DATA if n in by_name and n != HAND_OUT}
    uses = _uses(raw, [by_name[n].exposed for n in MODEL if n in by_name])
    found = limits.verdict(_shares(stages, wall), data, uses)
    needed = raw["flops_per_image"] * raw["images_per_rank"]
    return Account(
        stages,
        wall,
        fmean(raw["plain"]),
        fmean(raw["resident_wall"]),
        found,
        uses,
        needed / raw["matmul_flops_per_second"] / wall,
        raw,
    )


def _data_stages(raw: Mapping[str, Any]) -> list[Stage]:
    """Share the wait for batches out among the loader's stages, by their work."""
    steps = len(raw["marked"])
    exposed = _mean(raw["marked"], observing.WAIT)
    work = {name: seconds / steps for name, seconds in raw["loader_work"].items()}
    total = sum(work.values())
    # A wait that is longer than all the work was for threads to be woken: not a stage's.
    waited = min(fmean(raw["waits"]), exposed, total)
    found = []
    for name in DATA[:-1]:
        if name in raw["alone"]:
            mine = work.get(name, 0.0)
            share = waited * mine / total if total else 0.0
            found.append(Stage(name, raw["alone"][name], mine, share, (mine,)))
    rest = exposed - sum(stage.exposed for stage in found)
    return [*found, Stage(HAND_OUT, None, rest, rest, (rest,))]


def _step_stages(raw: Mapping[str, Any]) -> list[Stage]:
    """Return the stages of the step; alone they are those of steps without a loader."""
    names = dict.fromkeys(name for lap in raw["marked"] for name in lap)
    communication = sorted(n for n in names if n.startswith(observing.COMMUNICATION))
    found = []
    for name in (*STAGES, *communication, BETWEEN):
        if name not in names:
            continue
        seconds = tuple(lap.get(name, 0.0) for lap in raw["marked"])
        alone = _mean(raw["resident"], name)
        per_second = raw["images"] / alone if alone else None
        mean = fmean(seconds)
        found.append(Stage(name, None if name == BETWEEN else per_second, mean, mean, seconds))
    return found


def _shares(stages: Sequence[Stage], wall: float) -> dict[str, float]:
    """Add the exposed shares of the wall time up in groups."""
    groups = dict.fromkeys(("data", "model", "loss", "communication", "optimizer", "host"), 0.0)
    for stage in stages:
        if stage.name.startswith(observing.COMMUNICATION):
            group = "communication"
        elif stage.name == observing.OPTIMIZER:
            group = "optimizer"
        else:
            known = {"data": DATA, "model": MODEL, "loss": LOSS}
            group = next((g for g, names in known.items() if stage.name in names), "host")
        groups[group] += stage.exposed / wall
    return groups


def _uses(raw: Mapping[str, Any], seconds: Sequence[float]) -> dict[str, float]:
    """Return how much of each limit encoder and head use while they run."""
    # Gradient caching runs the forward pass twice: a third of forward and backward more.
    again = 4 / 3 if raw["chunks"] > 1 else 1.0
    images, passed = raw["images_per_rank"] * again, sum(seconds)
    asked = {
        "FLOPs": (raw["flops_per_image"], raw["matmul_flops_per_second"]),
        "memory bandwidth": (raw["bytes_per_image"], raw["triad_bytes_per_second"]),
    }
    return {name: images * each / most / passed for name, (each, most) in asked.items()}


def _mean(laps: Sequence[Mapping[str, float]], name: str) -> float:
    return fmean(lap.get(name, 0.0) for lap in laps)
