"""Transfer: what an encoder of one data set is worth on another."""

from __future__ import annotations

from collections.abc import Sequence

from fastclr.studies.scales import Scale
from fastclr.studies.study import Arm, Claim, Study, Variant

SIMCLR, SUPERVISED, UNTRAINED = "SimCLR", "supervised", "untrained"


def arms(scale: Scale) -> dict[str, Arm]:
    """Return encoders: without labels, with them, and untrained."""
    return {
        SIMCLR: Arm(scale.base),
        SUPERVISED: Arm(scale.base, Variant(supervised=True)),
        UNTRAINED: Arm(scale.base, Variant(trained=False)),
    }


def claims(arms: Sequence[str]) -> list[Claim]:
    """Return what a probe of another set may tell."""
    linear = "transfer.linear"
    return [
        Claim("SimCLR's h transfers better than untrained", (SIMCLR,), (UNTRAINED,), score=linear),
        Claim(
            "SimCLR's h transfers better than a supervised one",
            (SIMCLR,),
            (SUPERVISED,),
            score=linear,
            not_judged="in the source either is better, by the set",
        ),
    ]


STUDY = Study(
    title="Transfer",
    question=(
        "Encoders of one data set on another, which --transfer names: L-BFGS logistic regression "
        "on h and, at larger scales, fine-tuning. The source goes from ImageNet to 12 sets; its "
        "numbers here are those of ResNet-50 on CIFAR-10 and CIFAR-100."
    ),
    source="Chen et al. 2020, section 6, tables 8 and B.5, appendix B.8.",
    arms=arms,
    columns={
        "other set, linear": "transfer.linear",
        "other set, tuned": "transfer.tuned",
        "own set, linear": "h.linear",
    },
    claims=claims,
    published={
        SIMCLR: "linear 90.6, 71.6; tuned 97.7, 85.9",
        SUPERVISED: "linear 93.6, 78.3; tuned 97.5, 86.4",
        UNTRAINED: "tuned 95.9, 80.2",
    },
    work="transfer",
    drawn=("other set, linear", "own set, linear"),
)
