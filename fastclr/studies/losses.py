"""NT-Xent, NT-Logistic and the margin triplet loss, with and without semi-hard mining."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastclr.config import LossConfig
from fastclr.studies.scales import Scale
from fastclr.studies.study import ACCURACIES, FOUND, Arm, Claim, Study

XENT, LOGISTIC, MARGIN = "NT-Xent", "NT-Logistic", "margin"
HARD = ", semi-hard"
GRID = {XENT: (0.1, 0.2, 0.5), LOGISTIC: (0.2, 0.5), MARGIN: (0.4, 0.8)}
PUBLISHED = {
    XENT: "63.9",
    LOGISTIC: "51.6",
    MARGIN: "50.9",
    LOGISTIC + HARD: "57.9",
    MARGIN + HARD: "57.5",
}


def arms(scale: Scale) -> dict[str, Arm]:
    """Return every loss at every value of its small grid; negatives of the other view only."""
    losses: dict[str, LossConfig] = {}
    for value in GRID[XENT]:
        losses[f"{XENT} {value}"] = LossConfig(temperature=value)
    for mining in (False, True):
        end = HARD * mining
        for value in GRID[LOGISTIC]:
            losses[f"{LOGISTIC} {value}{end}"] = LossConfig(
                "nt_logistic", temperature=value, semi_hard=mining
            )
        for value in GRID[MARGIN]:
            losses[f"{MARGIN} {value}{end}"] = LossConfig(
                "margin_triplet", margin=value, semi_hard=mining
            )
    return {
        name: Arm(replace(scale.base, loss=replace(loss, negatives="other_view")))
        for name, loss in losses.items()
    }


def of_kind(arms: Sequence[str], kind: str) -> tuple[str, ...]:
    """Return the arms of a loss over its grid; with mining only if the kind says so."""
    name = kind.removesuffix(HARD)
    return tuple(
        a for a in arms if a.startswith(f"{name} ") and a.endswith(HARD) == kind.endswith(HARD)
    )


def claims(arms: Sequence[str]) -> list[Claim]:
    """Return table 4's order, as means over the small grids."""
    pairs = [
        (XENT, LOGISTIC),
        (XENT, MARGIN),
        (XENT, LOGISTIC + HARD),
        (XENT, MARGIN + HARD),
        (LOGISTIC + HARD, LOGISTIC),
        (MARGIN + HARD, MARGIN),
    ]
    return [
        Claim(f"{better} is better at h than {worse}", of_kind(arms, better), of_kind(arms, worse))
        for better, worse in pairs
    ]


STUDY = Study(
    title="Losses",
    question=(
        "Each loss over a small grid of its temperature or margin, at one learning rate; negatives "
        "of one view only, as in the source's table. The source reports the best of its grid; the "
        "claims here compare means over the grid."
    ),
    source="Chen et al. 2020, section 5.1, table 4 and appendix B.10.",
    arms=arms,
    columns={**ACCURACIES, "h, validation": "h.validation", **FOUND},
    claims=claims,
    published={
        f"{kind.removesuffix(HARD)} {value}{HARD * kind.endswith(HARD)}": f"best of grid {score}"
        for kind, score in PUBLISHED.items()
        for value in GRID[kind.removesuffix(HARD)][:1]
    },
)
