"""LARS, SGD and Adam by batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastclr.config import OptimizerConfig
from fastclr.studies.scales import Scale
from fastclr.studies.study import ACCURACIES, FOUND, Arm, Claim, Study

RATES = {"LARS": 2.0, "SGD": 0.5, "Adam": 4.2e-3}  # at batch 256, scaled with the root
FACTORS = {"small": 0.5, "large": 4.0}  # of the scale's batch


def arms(scale: Scale) -> dict[str, Arm]:
    """Return every optimizer at a small and a large batch."""
    base, found = scale.base, {}
    for name, rate in RATES.items():
        for batch, factor in FACTORS.items():
            optimizer = OptimizerConfig(
                name, base_learning_rate=rate, scaling="sqrt", weight_decay=1e-6,
                warmup_epochs=(base.epochs or 1) / 10,
            )  # fmt: skip
            size = round(factor * (base.global_batch_size or 0))
            config = replace(base, optimizer=optimizer, global_batch_size=size)
            found[f"{name}, {batch} batch"] = Arm(config)
    return found


def claims(arms: Sequence[str]) -> list[Claim]:
    """Return the source's reason for LARS, which a pilot cannot judge."""
    small = "it is said of batches of thousands, and no rate was searched for here"
    return [
        Claim(
            f"LARS is better at h than {other} at the large batch",
            ("LARS, large batch",),
            (f"{other}, large batch",),
            not_judged=small,
        )
        for other in ("SGD", "Adam")
    ]


STUDY = Study(
    title="Optimizers",
    question=(
        "LARS, SGD with momentum and Adam at half and at four times the scale's batch, one rate "
        "each, scaled with the root of the batch. The source takes LARS to be stable at large "
        "batches and shows no comparison."
    ),
    source="Chen et al. 2020, section 2.2.",
    arms=arms,
    columns={**ACCURACIES, "contrastive loss": "log.loss", **FOUND},
    claims=claims,
)
