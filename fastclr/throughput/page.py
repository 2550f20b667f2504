"""Rows and page of a session."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from fastclr.files import write_durably
from fastclr.measurements import facts, measurement, write_rows
from fastclr.throughput import observing, settings
from fastclr.throughput.account import HAND_OUT, Account, Stage
from fastclr.throughput.marks import BETWEEN
from fastclr.throughput.search import Found, Trial
from fastclr.throughput.session import Results, Session

HEADING = "## Measured\n"  # what stands below is replaced
ACCOUNTED, GAIN = 0.95, 1.2  # asked for
UNREST = 1.25  # of the base between its measurements: beyond it something else was running
SAVE_EVERY = 1000  # steps, where neither the recipe nor an epoch of real data says how many


def rows_of(session: Session, results: Results) -> list[dict[str, Any]]:
    """Return a row for each measurement."""
    raw = results.account.raw
    sizes = {
        "batch": raw["images"],
        "ranks": raw["ranks"],
        "size": session.config.views.size,
        "encoder": session.config.encoder.name,
        "width": session.config.encoder.width,
    }
    common: dict[str, Any] = {"sizes": sizes, "dtype": raw["dtype"], "images": raw["images"]}
    rows = []
    for stage in results.account.stages:
        steps = common if median(stage.seconds) else {**common, "images": None}
        row = measurement("stage", stage.name, stage.seconds, **steps)
        told = {"alone_images_per_second": stage.alone, "work_seconds": stage.work,
                "exposed_seconds": stage.exposed}  # fmt: skip
        rows.append({**row, **told})
    for variant, seconds in (
        ("marked", raw["wall"]), ("plain", raw["plain"]), ("without loader", raw["resident_wall"]),
    ):  # fmt: skip
        peak = raw["peak_bytes"]
        rows.append(measurement("step", variant, seconds, **common, peak_bytes=peak))
    for variant, part in (("checkpoint", "all"), ("without hashes, fsync and ledger", "bare")):
        rows.append(measurement("save", variant, [raw["save"][part]], sizes=sizes))
    trials = results.found.trials if results.found else ()
    rows += [_trial_row(trial, session, sizes) for trial in trials]
    for k, variant in enumerate(("before", "after")):
        seconds = [s for pair in results.pairs or () for s in pair[k].seconds]
        if seconds:
            rows.append(measurement("end to end", variant, seconds, **common))
    return rows


def _trial_row(trial: Trial, session: Session, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a trial; one that failed has its reason instead of times."""
    variant = settings.describe(trial.setting, session.base)
    is_bf16 = trial.setting.precision == "bf16"
    more = {"rung": trial.rung, "ratio": trial.ratio, "problem": trial.outcome.problem}
    if trial.outcome.problem:
        return {"name": "trial", "variant": variant, "sizes": sizes, **more}
    row = measurement(
        "trial", variant, trial.outcome.seconds, sizes=sizes, images=session.images,
        dtype="bfloat16" if is_bf16 else "float32", peak_bytes=trial.outcome.peak_bytes,
    )  # fmt: skip
    return {**row, **more}


def text_of(session: Session, results: Results, about: str, epoch_is_real: bool) -> str:
    """Return the results as Markdown.

    Args:
        session: What was measured.
        results: What was found.
        about: Recipe, data and command, in a sentence.
        epoch_is_real: Whether an epoch of the data measured on is one of the data trained on.
    """
    a = facts()
    machine = f"{a['hardware']['processor']}, {a['hardware']['cores']} cores"
    device = a["hardware"]["device"]
    where = machine if device == "cpu" else f"{device}, {machine}"
    lines = [
        f"{a['measured']}, {where}, torch {a['versions']['torch']}, deepspeed "
        f"{a['versions']['deepspeed']}. {about}",
        *([] if device != "cpu" else ["Nothing here has run on a GPU."]),
        "",
        "### Where the time goes",
        "",
        *_account_lines(session, results.account, epoch_is_real),
        "",
        "### What makes it faster",
        "",
        *_tuning_lines(session, results),
    ]
    return "\n".join(lines) + "\n"


def _account_lines(session: Session, account: Account, epoch_is_real: bool) -> list[str]:
    """Return the table of stages and what follows from it."""
    raw = account.raw
    met = "met" if account.accounted >= ACCOUNTED else "**missed**"
    marking, loading = account.wall / account.plain - 1, account.wall / account.resident - 1
    return [
        f"{len(raw['wall'])} marked steps of {1e3 * account.wall:.1f} ms on average, "
        f"{raw['images']} images on {raw['ranks']} rank(s), views by `{raw['backend']}`; "
        f"{account.images_per_second:,.0f} images/s without marks.",
        "",
        "| stage | alone, images/s | in the run, ms a step | overlapped | exposed | share |",
        "|---|--:|--:|--:|--:|--:|",
        *(_stage_line(stage, account.wall) for stage in account.stages),
        "",
        f"- Accounted for: **{account.accounted:.1%}** of the wall time (asked: >= "
        f"{ACCOUNTED:.0%}: {met}). Marked steps took {marking:+.1%} beside those without marks.",
        f"- Bottleneck: **{account.verdict.bottleneck}**, {account.verdict.share:.0%} of the wall "
        f"time. Near: {account.verdict.limit}.",
        f"- Steps on a batch that is there already take {1e3 * account.resident:.1f} ms: loading "
        f"costs {loading:+.1%} in all, waits and shared cores together. Stages of the step are "
        "alone in those.",
        f"- Limits, measured here: {raw['triad_bytes_per_second'] / 1e9:.1f} GB/s (triad), "
        f"{raw['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s (product of two matrices, "
        f"{raw['dtype']}). While it runs the model uses {account.uses['FLOPs']:.0%} of the FLOPs "
        f"and {account.uses['memory bandwidth']:.0%} of the bandwidth if each layer's input and "
        f"output goes to memory once a use; MFU over the whole step {account.mfu:.0%} "
        f"({raw['flops_per_image'] / 1e9:.2f} GFLOP an image, both views, forward and backward).",
        *_link_line(account),
        *_save_lines(session, account, epoch_is_real),
    ]


def _stage_line(stage: Stage, wall: float) -> str:
    """Return a stage's row."""
    alone = "" if stage.alone is None else f"{stage.alone:,.0f}"
    share = f"{stage.exposed / wall:.1%}"
    numbers = (stage.work, stage.overlapped, stage.exposed)
    name = f"*{stage.name}*" if stage.name in (BETWEEN, HAND_OUT) else stage.name
    return f"| {name} | {alone} | {' | '.join(f'{1e3 * n:.2f}' for n in numbers)} | {share} |"


def _link_line(account: Account) -> list[str]:
    """Say how fast the link is, where there is one."""
    link = account.raw.get("link")
    if not link:
        return ["- Gradient communication: none, one rank."]
    speed = link["bytes"] / link["seconds"] / 1e9
    return [
        f"- An all-reduce of all gradients' bytes ({link['bytes'] / 1e6:.1f} MB) with nothing "
        f"beside it: {1e3 * link['seconds']:.1f} ms, {speed:.2f} GB/s."
    ]


def _save_lines(session: Session, account: Account, epoch_is_real: bool) -> list[str]:
    """Say what saving costs, and what it costs to be sure of it."""
    save = account.raw["save"]
    every, why = session.given.checkpoint_every, "the recipe's"
    if not every:
        every, why = account.raw["batches_per_epoch"], "an epoch"
        if not epoch_is_real:
            every, why = SAVE_EVERY, "assumed: the images are synthetic"
    parts = {name: seconds for name, seconds in save.items() if name not in ("all", "bare")}
    whole = save["all"] - save["bare"]
    share = save["all"] / (save["all"] + every * account.plain)
    steps = sum(s.exposed for s in account.stages if s.name == observing.LEDGER)
    told = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in parts.items())
    return [
        f"- A checkpoint takes {1e3 * save['all']:.0f} ms: {share:.2%} of the time at one in "
        f"{every} steps ({why}).",
        f"- Without what makes it whole and provable it takes {1e3 * save['bare']:.0f} ms: that "
        f"costs {whole / save['bare']:+.0%} of a save (asked: at most +10%). Work of its parts, "
        f"most of it beside the writing: {told}.",
        f"- With the ledger's {1e3 * steps:.2f} ms a step it costs "
        f"{(steps + whole / every) / account.plain:.2%} of the training time (asked: at most 1%).",
    ]


def _tuning_lines(session: Session, results: Results) -> list[str]:
    """Return what was tried and what came of it."""
    found = results.found
    if found is None:
        return [results.ended]
    last = {}  # each setting's longest measurement
    for trial in found.trials:
        last[trial.setting] = trial
    ranked = sorted(last.values(), key=lambda t: -t.ratio)
    lines = [
        f"{len(found.trials)} measurements of {len(last)} settings, in processes of their own; "
        "ratios to the base of the same rung. The base is "
        f"{settings.describe(found.base, session.base)}: {_values(found.base)}.",
        "",
        "| setting | rung | images/s | x base | peak memory, GiB |",
        "|---|--:|--:|--:|--:|",
        *(_trial_line(t, session) for t in ranked),
        "",
    ]
    if found.left_out:
        names = "; ".join(settings.describe(s, session.base) for s in found.left_out)
        lines += [f"Left out, for want of time: {names}.", ""]
    lines += [*_outcome_lines(session, results, found), *_unrest_lines(results)]
    if results.command:
        lines += ["", "```bash", results.command, "```"]
    return lines


def _trial_line(trial: Trial, session: Session) -> str:
    """Return a trial's row."""
    name = settings.describe(trial.setting, session.base)
    if trial.outcome.problem:
        return f"| {name} | {trial.rung} | {trial.outcome.problem} | | |"
    peak = (trial.outcome.peak_bytes or 0) / 2**30
    speed = f"{trial.outcome.images_per_second:,.0f}"
    return f"| {name} | {trial.rung} | {speed} | {trial.ratio:.2f} | {peak:.2f} |"


def _outcome_lines(session: Session, results: Results, found: Found) -> list[str]:
    """Say before and after."""
    if found.best == found.base:
        worked = [t.ratio for t in found.trials if t.setting != found.base and t.ratio]
        best = f"the best of the others was {max(worked):.2f}x" if worked else "no other ran"
        why = results.account.verdict
        return [
            f"**Nothing is faster than the base**: {best}. {why.bottleneck.capitalize()} takes "
            f"{why.share:.0%} of the time, near {why.limit}."
        ]
    what = settings.describe(found.best, session.base)
    if not results.pairs:
        return [f"Found: **{what}**; there was no time left to compare it with the base."]
    before, after = (
        sum(pair[k].images_per_second for pair in results.pairs) / len(results.pairs)
        for k in (0, 1)
    )
    ratio = results.ratio or 0.0
    met = f"asked: >= {GAIN}x: " + ("met" if ratio >= GAIN else "**missed**")
    each = ", ".join(f"{r:.2f}" for r in results.ratios)
    notes = settings.notes(found.best, session.base, session.images_per_rank)
    return [
        f"Before -> after, in turn: {before:,.0f} -> {after:,.0f} images/s, **{ratio:.2f}x** "
        f"({met}; pair by pair {each}). After: {what}.",
        *(["", f"Short of it because: {_why_short(results)}"] if ratio < GAIN else []),
        "",
        *(f"- {note}" for note in notes),
    ]


def _unrest_lines(results: Results) -> list[str]:
    """Warn where the base itself was now fast, now slow."""
    least, most = min(results.base_speeds), max(results.base_speeds)
    if most <= UNREST * least:
        return []
    return [
        "",
        f"**Do not trust this**: the base alone went from {least:,.0f} to {most:,.0f} images/s "
        "between its measurements, so something else was using the machine. Fewer threads look "
        "better than they are then. Measure again when it is quiet.",
    ]


def _why_short(results: Results) -> str:
    """Say what stands in the way."""
    why, account = results.account.verdict, results.account
    return (
        f"{why.bottleneck} takes {why.share:.0%} of the wall time, near {why.limit}; loading, "
        f"which most settings are about, costs {account.wall / account.resident - 1:.1%}."
    )


def _values(setting: settings.Setting) -> str:
    """Say a setting in full."""
    return ", ".join(f"{settings.NAMES[name]} {value}" for name, value in vars(setting).items())


def write(page: Path, session: Session, results: Results, text: str) -> None:
    """Write the page below what stands in it by hand, and its rows beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    by_hand = page.read_text(encoding="utf-8").partition(HEADING)[0] if page.exists() else ""
    write_rows(page.with_suffix(".jsonl"), rows_of(session, results))
    write_durably(page, f"{by_hand}{HEADING}\n{text}")
