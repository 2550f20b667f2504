"""Batch size by epochs, with the rate scaled linearly and with the root."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from fastclr.config import OptimizerConfig
from fastclr.studies.scales import Scale
from fastclr.studies.study import ACCURACIES, FOUND, Arm, Claim, Study

SHARES = {"a sixth": 1 / 6, "a third": 1 / 3, "all": 1.0}  # of the scale's epochs
FACTORS = {"small": 0.5, "middle": 2.0, "large": 4.0}  # of the scale's batch
SCALINGS: tuple[Literal["linear", "sqrt"], ...] = ("linear", "sqrt")


def _name(batch: str, scaling: str, share: str) -> str:
    return f"{batch} batch, {scaling}, {share} of the epochs"


def arms(scale: Scale) -> dict[str, Arm]:
    """Return every batch, scaling and length under LARS; the middle batch scales to itself."""
    base, found = scale.base, {}
    middle = FACTORS["middle"] * (base.global_batch_size or 0)
    for share, part in SHARES.items():
        epochs = (base.epochs or 1) * part
        for scaling in SCALINGS:
            # The rate is 2.0 at the middle batch under both scalings.
            rate = 2.0 * (256 / middle) ** (1.0 if scaling == "linear" else 0.5)
            optimizer = OptimizerConfig(
                "LARS", base_learning_rate=rate, scaling=scaling, weight_decay=1e-6,
                warmup_epochs=epochs / 10,
            )  # fmt: skip
            for batch, factor in FACTORS.items():
                config = replace(
                    base,
                    optimizer=optimizer,
                    epochs=epochs,
                    global_batch_size=round(factor * (base.global_batch_size or 0)),
                )
                found[_name(batch, scaling, share)] = Arm(config)
    return found


def claims(arms: Sequence[str]) -> list[Claim]:
    """Return what may be asked of few epochs: whether the batches draw nearer."""
    found = []
    for scaling in SCALINGS:
        short, long = (
            {batch: _name(batch, scaling, share) for batch in FACTORS}
            for share in ("a sixth", "all")
        )
        found.append(
            Claim(
                f"the lead of the small batch over the large one shrinks with epochs, {scaling} "
                "(half of what it loses)",
                (short["small"], long["large"]),
                (short["large"], long["small"]),
            )
        )
    longer = tuple(a for a in arms if "all" in a)
    sixth = tuple(a for a in arms if "a sixth" in a)
    return [
        *found,
        Claim("more epochs are better at h", longer, sixth),
        Claim(
            "large batches are better at h",
            tuple(a for a in arms if a.startswith("large")),
            tuple(a for a in arms if a.startswith("small")),
            not_judged="with so few epochs small batches win by taking more steps",
        ),
    ]


STUDY = Study(
    title="Batch size and epochs",
    question=(
        "LARS at half, twice and four times the scale's batch, for a part of the scale's epochs "
        "and for all of them; the rate is that of the middle batch, scaled linearly or with the "
        "root. In the source, batch 256 reaches 57.5 (linear) or 62.8 (root) and batch 8192 64.8 "
        "after 100 epochs; 66.6 or 66.5, and 69.0 or 69.1, after 800."
    ),
    source="Chen et al. 2020, section 5.3, figure 9 and table B.1.",
    arms=arms,
    columns={**ACCURACIES, **FOUND},
    claims=claims,
)
