"""A few labels: the whole network tuned on 1 % and on 10 % of them."""

from __future__ import annotations

from collections.abc import Sequence

from fastclr.studies.scales import Scale
from fastclr.studies.study import Arm, Claim, Study, Variant

SIMCLR, UNTRAINED = "SimCLR", "untrained"


def arms(scale: Scale) -> dict[str, Arm]:
    """Return weights to begin with: SimCLR's, and those that were drawn."""
    return {SIMCLR: Arm(scale.base), UNTRAINED: Arm(scale.base, Variant(trained=False))}


def claims(arms: Sequence[str]) -> list[Claim]:
    """Return what table 7 and table B.4 show."""
    return [
        *(
            Claim(
                f"with {share} % of the labels SimCLR's weights are a better beginning than drawn "
                "ones",
                (SIMCLR,),
                (UNTRAINED,),
                score=f"tuned.{share}",
            )
            for share in (1, 10)
        ),
        Claim(
            "the lead of SimCLR's weights is larger with 1 % than with 10 %",
            (UNTRAINED,),
            (SIMCLR,),
            score="tuned.lost",
        ),
    ]


STUDY = Study(
    title="A few labels",
    question=(
        "All weights are tuned on a share of the labels, equally many of each class, the same for "
        "both beginnings; the share of right answers to the test images. Lost: what a tenth of the "
        "labels costs."
    ),
    source="Chen et al. 2020, section 6, table 7 and appendix B.5.",
    arms=arms,
    columns={
        "1 % of labels": "tuned.1",
        "10 % of labels": "tuned.10",
        "lost": "tuned.lost",
        "h, linear, all labels": "h.linear",
    },
    claims=claims,
    published={
        SIMCLR: "ResNet-50: 48.3 and 65.6 (top-5 75.5 and 87.8)",
        UNTRAINED: "supervised: 25.4 and 56.4 (top-5 48.4 and 80.4)",
    },
    work="tuned",
    drawn=("1 % of labels", "10 % of labels"),
)
