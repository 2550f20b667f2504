"""Strength of the colour distortion, from none to 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastclr.studies.scales import Scale
from fastclr.studies.study import Arm, Claim, Study, Variant

STRENGTHS = {"1/8": 1 / 8, "1/4": 1 / 4, "1/2": 1 / 2, "1": 1.0}
NONE = "no colour distortion"


def arms(scale: Scale) -> dict[str, Arm]:
    """Return no training, crops alone, and crops with every strength."""
    views = scale.base.views
    plain = replace(views, jitter_prob=0.0, grayscale_prob=0.0)
    return {
        "untrained": Arm(scale.base, Variant(trained=False)),
        NONE: Arm(replace(scale.base, views=plain)),
        **{
            name: Arm(replace(scale.base, views=replace(views, color_strength=strength)))
            for name, strength in STRENGTHS.items()
        },
    }


def claims(arms: Sequence[str]) -> list[Claim]:
    """Return the claims of section 3 and table 1."""
    return [
        Claim("colour distortion is better at h than crops alone", (*STRENGTHS,), (NONE,)),
        Claim(
            "without it the positives are found more often",
            (NONE,),
            (*STRENGTHS,),
            score="log.accuracy",
        ),
        Claim("strength 1/2 is better at h than 1/8", ("1/2",), ("1/8",)),
        Claim(
            "strength 1 is better at h than 1/2",
            ("1",),
            ("1/2",),
            not_judged="the authors themselves take 1/2 for CIFAR-10",
        ),
    ]


STUDY = Study(
    title="Strength of the colour distortion",
    question=(
        "SimCLR with crops alone and with colour distortion of rising strength in both views; "
        "grayscale with every strength but none."
    ),
    source="Chen et al. 2020, section 3.2 and table 1.",
    arms=arms,
    columns={
        "h, linear": "h.linear",
        "z, linear": "z.linear",
        "h, kNN": "h.knn",
        "contrastive accuracy": "log.accuracy",
        "entropy": "log.entropy",
    },
    claims=claims,
    published={"1/8": "59.6", "1/4": "61.0", "1/2": "62.6", "1": "63.2"},
)
