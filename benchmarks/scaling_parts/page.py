"""The page, the rows and the plot of scaling.py, from what was measured and forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import plots
import verdicts
from harness import facts, measurement

from scaling_parts.forecasts import (
    MOST_OFF,
    Assumed,
    baseline,
    expected,
    extrapolated,
    forecast_row,
)
from scaling_parts.links import Timed
from scaling_parts.model import PARTS, WINDOW, Alone, Forecast, Job, Link
from scaling_parts.ranks import Setup, Steps, ratio

LEAST_EFFICIENCY = 0.85
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


class Results(NamedTuple):
    """All that was measured.

    Attributes:
        steps: Of every world, by round.
        scaling: Worlds of weak and strong scaling, by name; each name's first is one rank.
        stages: Worlds of the most ranks with other ZeRO stages and exchanges.
        links: Times of single collectives.
        link: Alpha and beta that fit them.
        alone: Arithmetic of a rank of many.
        job: What a rank has to tell.
    """

    steps: dict[Setup, list[Steps]]
    scaling: dict[str, list[Setup]]
    stages: list[Setup]
    links: list[Timed]
    link: Link
    alone: Alone
    job: Job

    def middle(self, setup: Setup) -> float:
        """Return the median step of a world."""
        return median(steps.step_seconds for steps in self.steps[setup])

    def efficiency(self, one: Setup, setup: Setup) -> float:
        """Return images per second of some ranks over as many times one rank's, round by round."""
        images = setup.images * setup.ranks / one.images
        return images / setup.ranks / ratio(self.steps, setup, one)

    def forecast(self, setup: Setup) -> Forecast:
        """Return what the model says of a measured world."""
        return expected(setup, self.job, self.alone, self.link)

    def off(self, setup: Setup) -> float:
        """Return by how much the model is off, relative to what was measured."""
        return self.forecast(setup).step_seconds / self.middle(setup) - 1

    def part(self, setup: Setup, name: str) -> tuple[float, float]:
        """Return transfer and waiting of a part, medians over the rounds."""
        found = [s.exposed[name] for s in self.steps[setup] if name in s.exposed]
        if not found:
            return 0.0, 0.0
        return median(e.transfer for e in found), median(e.waiting or 0.0 for e in found)


def rows(results: Results, gpu_job: Job, assumed: Assumed, warm_up: int) -> list[dict[str, Any]]:
    """Return everything as rows: what was measured, then what was only calculated."""
    found: list[dict[str, Any]] = []
    for setup, steps in results.steps.items():
        row = measurement(
            "scaling", str(setup), [s for one in steps for s in one.seconds],
            sizes=asdict(setup), warm_ups=warm_up, images=setup.images * setup.ranks,
        )  # fmt: skip
        parts = dict.fromkeys(name for one in steps for name in one.exposed)
        exposed = {name: results.part(setup, name) for name in parts}
        row["exposed_seconds"] = {
            name: {"transfer": transfer, "waiting": waiting}
            for name, (transfer, waiting) in exposed.items()
        }
        row["rounds_seconds"] = [one.step_seconds for one in steps]
        if setup.ranks > 1:
            row["model_seconds"] = results.forecast(setup).step_seconds
        found.append(row)
    for one in results.links:
        sizes = {"ranks": one.ranks, "num_bytes": one.num_bytes}
        found.append(measurement("collective", one.kind, [one.seconds], sizes=sizes))
    return found + [forecast_row(*entry) for entry in _forecasts(gpu_job, assumed)]


def targets(results: Results) -> list[str]:
    """Return the table of what has to be shown."""
    lines = verdicts.head()
    for name, (one, *more) in results.scaling.items():
        for setup in more:
            efficiency, off = results.efficiency(one, setup), results.off(setup)
            if name == "weak":
                what = f"weak scaling, {setup.ranks} ranks over one: efficiency"
                bound, met = f">= {LEAST_EFFICIENCY:.0%}", efficiency >= LEAST_EFFICIENCY
                lines.append(verdicts.row(what, bound, f"{efficiency:.1%}", met))
            what = f"{name} scaling, {setup.ranks} ranks: model off by"
            met = abs(off) <= MOST_OFF
            lines.append(verdicts.row(what, f"<= {MOST_OFF:.0%}", f"{off:+.1%}", met))
    return lines


def _scaling_table(results: Results) -> list[str]:
    """Return weak and strong scaling, with where a step's time goes."""
    lines = [
        "| scaling | ranks x images | images/s | efficiency | step, ms | arithmetic | transfer | "
        "waiting | model, ms | off |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, (one, *more) in results.scaling.items():
        for setup in (one, *more):
            parts = [results.part(setup, part) for part in PARTS]
            transfer, waiting = (1e3 * sum(column) for column in zip(*parts, strict=True))
            step = 1e3 * results.middle(setup)
            cells = [name, str(setup), f"{1e3 * setup.ranks * setup.images / step:,.0f}"]
            cells += [f"{results.efficiency(one, setup):.1%}", f"{step:.1f}"]
            cells += [f"{step - transfer - waiting:.1f}", f"{transfer:.1f}", f"{waiting:.1f}"]
            if setup.ranks > 1:
                model = 1e3 * results.forecast(setup).step_seconds
                cells += [f"{model:.1f}", f"{results.off(setup):+.1%}"]
            else:
                cells += ["", ""]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _parts_table(results: Results) -> list[str]:
    """Return each part of the exposed communication beside what the model says of it."""
    lines = [
        f"| ms a step | {' | '.join(PARTS)} | step |",
        f"|---|{'--:|' * (len(PARTS) + 1)}",
    ]
    for setup in dict.fromkeys([*[more[-1] for more in results.scaling.values()], *results.stages]):
        cells = []
        for name in PARTS:
            transfer, waiting = results.part(setup, name)
            model = results.forecast(setup).parts[name]
            cells.append(f"{1e3 * transfer:.1f} + {1e3 * waiting:.1f} ({1e3 * model:.1f})")
        step, model = results.middle(setup), results.forecast(setup).step_seconds
        cells.append(f"{1e3 * step:.1f} ({1e3 * model:.1f})")
        lines.append(f"| {setup} | {' | '.join(cells)} |")
    return lines


Entry = tuple[Forecast, Forecast, Assumed, str]


def _forecasts(job: Job, assumed: Assumed) -> list[Entry]:
    """Return weak and strong scaling, and all stages and exchanges at both ends."""
    weak = baseline(job, assumed, assumed.images)
    strong = baseline(job, assumed, assumed.global_batch)
    found = [(extrapolated(job, assumed, n, weak=True), weak, assumed, "weak") for n in GPUS]
    found += [
        (extrapolated(job, assumed, n, weak=False), strong, assumed, "strong")
        for n in GPUS
        if assumed.global_batch % n == 0
    ]
    for n in (GPUS[0], GPUS[-1]):
        for stage in (1, 2, 3):
            one = extrapolated(job, assumed, n, weak=True, stage=stage)
            found.append((one, weak, assumed, f"weak, ZeRO {stage}, gather"))
        one = extrapolated(job, assumed, n, weak=True, exchange="ring")
        found.append((one, weak, assumed, "weak, ZeRO 0, ring"))
    return found


def _forecast_table(entries: Sequence[Entry]) -> list[str]:
    """Return where the time of forecasts goes, and what a rank sends."""
    lines = [
        "| scaling | GPUs | batch | step, ms | arithmetic | BatchNorm | loss | "
        "gradients, weights | efficiency | images/s | sent, MB: loss | gradients, weights |",
        f"|---|{'--:|' * 11}",
    ]
    for found, one, _, variant in entries:
        (norms, loss, *engine, _), sent = (1e3 * s for s in found.parts.values()), found.sent
        lines.append(
            f"| {variant} | {found.ranks:,} | {found.global_batch:,} | "
            f"{1e3 * found.step_seconds:,.1f} | {1e3 * found.compute_seconds:,.1f} | "
            f"{norms:,.2f} | {loss:,.2f} | {sum(engine):,.2f} | {found.efficiency(one):.0%} | "
            f"{found.images_per_second:,.0f} | {sent[PARTS[1]] / 1e6:,.1f} | "
            f"{sum(sent[part] for part in PARTS[2:5]) / 1e6:,.1f} |"
        )
    return lines


def _storage_table(entries: Sequence[Entry]) -> list[str]:
    """Return what weak and strong scaling ask of the storage."""
    lines = [
        "| scaling | GPUs | nodes | a node reads, MB/s: its own images, by place | whole shards, "
        "fetched | images a shard, at least | shards, if each worker had its own |",
        f"|---|{'--:|' * 6}",
    ]
    for found, one, assumed, variant in entries:
        if variant in ("weak", "strong"):
            needed = forecast_row(found, one, assumed, variant)["storage"]
            nodes, _ = assumed.cluster.shape(found.ranks)
            lines.append(
                f"| {variant} | {found.ranks:,} | {nodes} | {needed['by_offset'] / 1e6:,.0f} | "
                f"{needed['whole_shards'] / 1e6:,.0f} | {needed['fewest_per_shard']:,} | "
                f"{needed['split_by_rank']:,} |"
            )
    return lines


def text(results: Results, gpu_job: Job, assumed: Assumed, about: str, command: str) -> str:
    """Return what stands below "Measured"."""
    machine, link, alone = facts(), results.link, results.alone
    told = (
        f"{machine['measured'][:10]}, `{command}`, {machine['hardware']['processor']}, "
        f"{machine['hardware']['cores']} cores, torch {machine['versions']['torch']}, DeepSpeed "
        f"{machine['versions']['deepspeed']}, gloo, fp32: {about}."
    )
    fitted = (
        f"Alpha {1e6 * link.alpha:.0f} us, beta {link.beta / 1e9:.2f} GB/s, from all-reduce and "
        f"all-gather of {min(t.num_bytes for t in results.links)} B to "
        f"{max(t.num_bytes for t in results.links) / 1e6:.0f} MB. Arithmetic of a rank of many: "
        f"{1e3 * alone.fixed_seconds:.1f} ms a step, {1e3 * alone.image_seconds:.3f} ms an image, "
        f"{1e9 * alone.pair_seconds:.1f} ns a pair of rows."
    )
    guesses = ", ".join(f"{name} {value:g}" for name, value in asdict(assumed).items())
    entries = _forecasts(gpu_job, assumed)
    return "\n".join(
        [told, "", "![scaling](scaling.svg)", "", *targets(results), "",
         "### Weak and strong scaling", "", *_scaling_table(results), "", fitted, "",
         "### What is exchanged, at the most ranks", "",
         "Transfer + waiting for the last rank (the model's transfer).", "",
         *_parts_table(results), "", "### Forecast for 8 to 1,024 GPUs: nothing here was measured",
         "", f"Assumed: {guesses}. ResNet-50 with {gpu_job.parameters:,} parameters, "
         f"{len(gpu_job.channels)} BatchNorms, rows of {gpu_job.dim} numbers of "
         f"{gpu_job.row_bytes} bytes.", "", *_forecast_table(entries), "",
         f"Any number of ranks reads any number of shards here; {WINDOW} are shuffled together, "
         "and a batch takes its images from all of those.", "", *_storage_table(entries), ""]
    )  # fmt: skip


def plot(path: Path, results: Results, gpu_job: Job, assumed: Assumed) -> None:
    """Draw efficiency over ranks: here, and as forecast."""
    here: dict[str, list[tuple[float, float]]] = {}
    for name, (one, *more) in results.scaling.items():
        here[f"{name}, measured"] = [(s.ranks, results.efficiency(one, s)) for s in (one, *more)]
    ahead: dict[str, list[tuple[float, float]]] = {}
    for found, one, _, name in _forecasts(gpu_job, assumed):
        if name in ("weak", "strong"):
            ahead.setdefault(name, []).append((found.ranks, found.efficiency(one)))
    plots.save(
        path,
        [
            lambda axes: plots.lines(
                axes, here, title="Efficiency, measured", x_label="ranks", log_y=False
            ),
            lambda axes: plots.lines(
                axes, ahead, title="Efficiency, forecast by the model", x_label="GPUs", log_y=False
            ),
        ],
    )
