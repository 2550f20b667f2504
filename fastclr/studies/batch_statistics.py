"""BatchNorm's statistics over all of the batch, or over parts of it, which leaks the positives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastclr.studies.scales import Scale
from fastclr.studies.study import ACCURACIES, FOUND, Arm, Claim, Study, Variant

WHOLE = "all of the batch"
PARTS = {"quarters": 4, "sixteenths": 16}


def arms(scale: Scale) -> dict[str, Arm]:
    """Return statistics of all images, and of parts as if each were a rank's."""
    local = replace(scale.base, batch_norm="local")
    divided = {name: Arm(local, Variant(norm_parts=number)) for name, number in PARTS.items()}
    return {WHOLE: Arm(scale.base), **divided}


def claims(arms: Sequence[str]) -> list[Claim]:
    """Return the sentence of section 2.2: more found, nothing gained."""
    return [
        Claim(
            "with statistics of parts the positives are found more often",
            (*PARTS,),
            (WHOLE,),
            score="log.accuracy",
        ),
        Claim(
            "statistics of parts gain less than 2 points at h",
            (WHOLE,),
            (*PARTS,),
            margin=-0.02,
        ),
    ]


STUDY = Study(
    title="Statistics of a part of the batch",
    question=(
        "BatchNorm over the whole batch, as SimCLR needs it, and over parts of it that hold both "
        "views of their images, as ranks with statistics of their own do. Parts tell which views "
        "belong together. The source says so and gives no number."
    ),
    source="Chen et al. 2020, section 2.2.",
    arms=arms,
    columns={**ACCURACIES, **FOUND, "contrastive loss": "log.loss"},
    claims=claims,
)
