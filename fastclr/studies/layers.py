"""Where to cut the head off: probes after removing its modules one at a time."""

from __future__ import annotations

from collections.abc import Sequence

from fastclr.studies.scales import Scale, changed
from fastclr.studies.study import Arm, Claim, Study

SIMCLR, RASTOGI = "fc1 relu1 fc2", "fc1 relu1 fc2 relu2 fc3"


def arms(scale: Scale) -> dict[str, Arm]:
    """Return SimCLR's head, and Rastogi's of three layers without normalisation."""
    base = scale.base
    three = {"kind": "mlp", "depth": 3, "hidden_dim": base.head.output_dim, "norm": "none"}
    return {SIMCLR: Arm(base), RASTOGI: Arm(changed(base, "head", **three))}


def claims(arms: Sequence[str]) -> list[Claim]:
    """Return what METHODS calls robust in the source, and what it calls unstable."""
    return [
        Claim("h is better than z behind two layers", (SIMCLR,), (SIMCLR,), than_score="z.linear"),
        Claim(
            "h is better than z behind three layers", (RASTOGI,), (RASTOGI,), than_score="z.linear"
        ),
        Claim(
            "inside three layers, relu1 is better than z",
            (RASTOGI,),
            (RASTOGI,),
            score="relu1.linear",
            than_score="z.linear",
        ),
        Claim(
            "h is better than relu1 behind three layers",
            (RASTOGI,),
            (RASTOGI,),
            than_score="relu1.linear",
            not_judged="which cut is best changed between the source's own two experiments",
        ),
    ]


STUDY = Study(
    title="Layers of the head, removed one at a time",
    question=(
        "A linear probe at the output of every module of the head, from h (all removed) to z (none "
        "removed). Widths are those of the scale, not the source's 100."
    ),
    source=(
        "A. Rastogi, The projection head in SimCLR, 2020, and the repository thunderInfy/simclr, "
        "2021."
    ),
    arms=arms,
    columns={
        "h": "h.linear",
        "fc1": "fc1.linear",
        "relu1": "relu1.linear",
        "fc2": "fc2.linear",
        "relu2": "relu2.linear",
        "fc3": "fc3.linear",
    },
    claims=claims,
    published={
        RASTOGI: "from h to z 72.0, 69.6, 70.0, 72.8, 68.4, 64.4 (2021; ResNet-18, 5 classes of "
        "ImageNet, 250 test images: standard error 3; all but the 72.8 and the 64.4 read off bars)"
    },
    drawn=("h", "fc1", "relu1", "fc2", "relu2", "fc3"),
    figure="columns",
)
