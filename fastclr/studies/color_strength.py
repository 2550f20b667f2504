"""Strength of the colour distortion, from none to 1."""

from __future__ import annotations

from collections.abc import Sequence

from fastclr.studies.scales import Scale, changed, without_colour
from fastclr.studies.study import ACCURACIES, ENTROPY, FOUND, Arm, Claim, Study, Variant

STRENGTHS = {"1/8": 1 / 8, "1/4": 1 / 4, "1/2": 1 / 2, "1": 1.0}
NONE = "no colour distortion"
SUPERVISED = tuple(f"supervised, {name}" for name in STRENGTHS)


def arms(scale: Scale) -> dict[str, Arm]:
    """Return no training, crops alone, and crops with every strength, without and with labels."""
    strong = {
        name: changed(scale.base, "views", color_strength=strength)
        for name, strength in STRENGTHS.items()
    }
    return {
        "untrained": Arm(scale.base, Variant(trained=False)),
        NONE: Arm(without_colour(scale.base)),
        **{name: Arm(config) for name, config in strong.items()},
        **{
            name: Arm(config, Variant(supervised=True))
            for name, config in zip(SUPERVISED, strong.values(), strict=True)
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
        Claim(
            "from 1/8 to 1/2 supervised training gains less at h than SimCLR (half of it)",
            ("1/2", SUPERVISED[0]),
            ("1/8", SUPERVISED[2]),
            not_judged="the source's differences are below what three seeds of a pilot can show",
        ),
    ]


STUDY = Study(
    title="Strength of the colour distortion",
    question=(
        "SimCLR with crops alone and with colour distortion of rising strength in both views; "
        "grayscale with every strength but none. Beside it supervised training with the same views."
    ),
    source="Chen et al. 2020, section 3.2 and table 1.",
    arms=arms,
    columns={**ACCURACIES, **FOUND, **ENTROPY},
    claims=claims,
    published={
        **dict(zip(STRENGTHS, ("59.6", "61.0", "62.6", "63.2"), strict=True)),
        **dict(zip(SUPERVISED, ("77.0", "76.7", "76.5", "75.7"), strict=True)),
    },
)
