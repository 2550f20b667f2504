"""What a study has come to: ``study.json``, from rows alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastclr.evaluation import finetune, transfer
from fastclr.studies import spaces
from fastclr.studies.scales import Scale
from fastclr.studies.scoring import PROTOCOL
from fastclr.studies.study import Study, digest_of, is_fraction
from fastclr.studies.verdicts import judge, summarise, value_at

JSON = dict[str, Any]

# How a study's scores are taken, by its work.
_PROTOCOLS = {
    "histograms": "",  # it has no probe
    "changes": PROTOCOL,
    "spaces": f"{PROTOCOL} {spaces.PROTOCOL} {spaces.MAP_PROTOCOL}",
    "tuned": f"{PROTOCOL} Tuned: {finetune.PROTOCOL}",
    "transfer": f"{PROTOCOL} Transfer: {transfer.PROTOCOL}",
}


def summary(
    name: str,
    study: Study,
    scale_name: str,
    scale: Scale,
    images: Mapping[str, Any],
    rows: Sequence[JSON],
    num_seeds: int,
) -> JSON:
    """Summarise the rows of a study.

    Args:
        name: The study's name.
        study: The study.
        scale_name: Name of its scale.
        scale: The scale.
        images: What is to be said of the images.
        rows: Finished runs; some may be missing.
        num_seeds: Seeds that were asked for.

    Returns:
        For JSON, numbers that are not there as None: ``arms`` in the study's order, each with
        ``values`` by heading as mean, standard error and number of seeds; and ``verdicts``.
    """
    by_arm: dict[str, dict[int, JSON]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {})[row["seed"]] = row["scores"]
    names = list(study.arms(scale))
    cells = {
        arm: {h: _cell(by_arm, arm, path) for h, path in study.columns.items()} for arm in names
    }
    # A column that no arm has a score for is left out, such as what a scale does not do.
    shown = [h for h in study.columns if not rows or any(cells[arm][h][2] for arm in names)]
    verdicts = [judge(claim, by_arm) for claim in study.claims(names)]
    return {
        "name": name,
        "title": study.title,
        "question": study.question,
        "source": study.source,
        "scale": scale_name,
        "expects": scale.expects,
        "images": dict(images),
        "protocol": _PROTOCOLS.get(study.work, f"{PROTOCOL} {spaces.PROTOCOL}"),
        "seeds": num_seeds,
        "runs": len(study.runs(scale, num_seeds)),
        "done": len(rows),
        "headings": shown,
        "plain": [h for h in shown if not is_fraction(study.columns[h])],
        "arms": [
            {
                "name": arm,
                "published": study.published.get(arm, ""),
                "values": {h: cells[arm][h] for h in shown},
            }
            for arm in names
        ],
        "figure": study.figure,
        "drawn": [h for h in study.drawn if h in shown],
        "pictures": {arm: found for arm in names if (found := _pictures(by_arm, arm))},
        "verdicts": [
            {
                "claim": v.claim.text,
                "verdict": v.word,
                "difference": _number(v.difference),
                "error": _number(v.error),
                "seeds": v.num_seeds,
                "margin": v.claim.margin,
                "kind": v.claim.kind,
                "is_percent": is_fraction(v.claim.score),
            }
            for v in verdicts
        ],
        "seconds": {digest_of(row["key"]): row["seconds"] for row in rows},
        "measured": sorted({row["measured"][:10] for row in rows}),
        "hardware": sorted({_machine(row) for row in rows}),
        "command": f"fastclr study {name} --scale {scale_name} --seeds {num_seeds}"
        + " --transfer TRAIN TEST" * (study.work == "transfer"),
    }


def _cell(
    by_arm: Mapping[str, Mapping[int, JSON]], arm: str, path: str
) -> list[float | int | None]:
    """Return mean, error and number of seeds of a score."""
    values = [value_at(scores, path) for scores in by_arm.get(arm, {}).values()]
    found = summarise([value for value in values if math.isfinite(value)])
    return [_number(found.mean), _number(found.error), found.num_seeds]


def _pictures(by_arm: Mapping[str, Mapping[int, JSON]], arm: str) -> JSON | None:
    """Return what is drawn of an arm's first seed, where its work makes pictures."""
    of_seeds = by_arm.get(arm, {})
    return of_seeds[min(of_seeds)].get("pictures") if of_seeds else None


def _number(value: float) -> float | None:
    """Return a number as JSON has it."""
    return value if math.isfinite(value) else None


def _machine(row: JSON) -> str:
    """Say what a run was made on."""
    facts = row["hardware"]
    what = facts["device"] if facts["device"] != "cpu" else facts["processor"]
    return f"{what}, {row['threads']} thread{'s' * (row['threads'] > 1)}"
