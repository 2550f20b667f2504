"""Each part of a step, and the whole of it, by everyone in turn: rows with ratios to ours."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lars
import torch
from data_plane_parts import speed
from harness import interleaved, measurement
from nt_xent import Point, forward_backward
from nt_xent import check as check_losses

from fastclr.simclr import SimCLR
from peer_parts import contenders, memory, ours
from peer_parts.contenders import CONFIGURATIONS, WORKS, Work
from peer_parts.names import LIGHTLY, METRIC_LEARNING, OURS
from peer_parts.nt_xent import IMPLEMENTATIONS

Row = dict[str, Any]
Seconds = Mapping[str, list[float]]

LARGE_LOSS = 2048  # images, compared at the larger of the works only
MOST_FOR_METRIC_LEARNING = 256  # images; its memory grows with their cube: 2 GiB there


@dataclass
class Settings:
    """How much is measured.

    Attributes:
        rounds: Rounds; each runs every contender once. Ratios are medians of those within a round.
        seconds: Seconds a stream of views is timed in a round, after its start.
        calls: Calls of model, loss and optimizer, in turn.
        steps: Steps of an end-to-end measurement.
        limit_seconds: Fewer steps where another library would take longer for them.
        only: Contenders beside fastclr; all if none is named.
    """

    rounds: int = 3
    seconds: float = 1.2
    calls: int = 9
    steps: int = 12
    limit_seconds: float = 12.0
    only: tuple[str, ...] = ()

    def chosen(self, names: Iterable[str]) -> list[str]:
        """Return who takes part, ours first."""
        return [n for n in names if n == OURS or not self.only or n in self.only]


def rows_of(
    part: str, seconds: Seconds, sizes: Mapping[str, Any], images: int, warm_ups: int
) -> list[Row]:
    """Turn seconds, one a round, into rows; ``ratio`` is how many times longer than ours.

    Args:
        part: Key of ``CONFIGURATIONS``; the rows' name is "peers" and this.
        seconds: Of each contender, for ``images`` images; fastclr is one of them.
        sizes: What they depend on.
        images: Images handled.
        warm_ups: Rounds before.
    """
    rows = []
    for variant, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds[OURS], strict=True))
        row = measurement(
            f"peers {part}", variant, values, sizes=sizes, images=images, warm_ups=warm_ups
        )
        rows.append({**row, "ratio": ratio, "configuration": CONFIGURATIONS[part, variant]})
    return rows


def views(work: Work, settings: Settings) -> list[Row]:
    """Read, decode, augment."""
    streams = contenders.views(work)
    seconds: dict[str, list[float]] = {name: [] for name in settings.chosen(streams)}
    for _ in range(settings.rounds):
        for name, values in seconds.items():
            values.append(work.batch_size / speed.rate(streams[name], settings.seconds))
    return rows_of("views", seconds, _sizes(work), work.batch_size, 0)


def model(work: Work, settings: Settings) -> list[Row]:
    """Encoder and head, forward and backward; all others' is lightly's."""
    batch_size, side = work.batch_size, work.config.views.size
    channels_last = SimCLR.from_config(work.config).to(memory_format=torch.channels_last)
    plain = SimCLR.from_config(work.config)
    generator = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (2, batch_size, side, side, 3), generator=generator)
    views_VBCHW = views.to(torch.uint8).permute(0, 1, 4, 2, 3)
    floats = [(view_BCHW / 255).contiguous() for view_BCHW in views_VBCHW]

    def together() -> None:
        channels_last(views_VBCHW).z_ND.square().mean().backward()

    def one_by_one() -> None:
        z = [plain.projection_head(plain.encoder(x_BCHW)) for x_BCHW in floats]
        torch.cat(z).square().mean().backward()

    functions = {OURS: together, LIGHTLY: one_by_one}
    seconds = interleaved(functions, settings.calls, warm_ups=1)
    return rows_of("model", seconds, _sizes(work), batch_size, 1)


def loss(work: Work, settings: Settings) -> list[Row]:
    """NT-Xent, forward and backward, of this batch; of a large one beside the small images."""
    names = settings.chosen(contenders.LOSSES)
    dim, temperature = work.config.head.output_dim, work.config.loss.temperature
    if failed := check_losses([contenders.LOSSES[name] for name in names], dim, "cpu"):
        raise RuntimeError(f"a loss does not run: {failed}")
    rows: list[Row] = []
    large = [LARGE_LOSS] if work.config.views.size == min(WORKS) else []
    for num_images in [work.batch_size, *large]:
        z = Point(num_images, dim, "cpu").projections()
        functions: dict[str, Callable[[], object]] = {}
        for name in names:
            if name != METRIC_LEARNING or num_images <= MOST_FOR_METRIC_LEARNING:
                built = IMPLEMENTATIONS[contenders.LOSSES[name]].build(temperature)
                functions[name] = lambda built=built, z=z: forward_backward(built, z)
        calls = settings.calls if METRIC_LEARNING not in functions else settings.rounds
        seconds = interleaved(functions, calls, warm_ups=1)
        rows += rows_of("loss", seconds, {"batch": num_images, "dim": dim}, num_images, 1)
    return rows


def optimizer(work: Work, settings: Settings) -> list[Row]:
    """A step of LARS on this model's tensors."""
    sizes = [p.shape for p in SimCLR.from_config(work.config).parameters()]
    lars.check(sizes)
    names = settings.chosen(contenders.OPTIMIZERS)
    steps = {
        name: lars.CONTENDERS[contenders.OPTIMIZERS[name]](lars.groups(sizes)) for name in names
    }
    seconds = interleaved(steps, 5 * settings.calls)
    return rows_of("optimizer", seconds, _sizes(work), work.batch_size, 2)


def step(work: Work, settings: Settings, folder: Path) -> list[Row]:
    """Files to weights, whole steps."""
    names = settings.chosen([OURS, *contenders.STACKS])
    seconds: dict[str, list[float]] = {name: [] for name in names}
    warm_up = 2 * work.num_workers
    for round_ in range(settings.rounds):
        for name in names:
            if name == OURS:
                side = work.config.views.size
                found = ours.seconds_per_step(
                    work.case.shards, work.case.policy, work.config,
                    folder / f"run-{side}-{round_}", warm_up=warm_up, steps=settings.steps,
                )  # fmt: skip
            else:
                found = contenders.STACKS[name].seconds(
                    work, warm_up=warm_up, steps=settings.steps,
                    limit_seconds=settings.limit_seconds,
                )  # fmt: skip
            seconds[name].append(found)
            print(f"  step, {name}: {work.batch_size / found:,.1f} images/s", flush=True)
    return rows_of("step", seconds, _sizes(work), work.batch_size, 0)


def peak_memory(folder: Path) -> list[Row]:
    """Peak memory of a whole training above what the process held before, apart.

    Its time is of few steps, with everything that is compiled: not compared.
    """
    found = {name: memory.apart(name, folder) for name in (OURS, LIGHTLY)}
    base = found[OURS].extra_bytes
    rows = []
    for name, one in found.items():
        row = measurement(
            "peers memory", name, [one.seconds], images=memory.BATCH,
            sizes={"side": 32, "batch": memory.BATCH}, peak_bytes=one.extra_bytes,
        )  # fmt: skip
        ratio = one.extra_bytes / base if one.extra_bytes and base else None
        rows.append({**row, "ratio": ratio, "configuration": CONFIGURATIONS["memory", name]})
    return rows


def _sizes(work: Work) -> Row:
    encoder = work.config.encoder
    return {
        "side": work.config.views.size,
        "batch": work.batch_size,
        "encoder": f"{encoder.name}, width {encoder.width:g}",
    }
