"""The colour shortcut: crops of one image found by their colours alone."""

from __future__ import annotations

from collections.abc import Sequence

from fastclr.studies.scales import Scale, without_colour
from fastclr.studies.study import Arm, Claim, Study

PLAIN, DISTORTED = "crops", "crops with colour distortion"


def arms(scale: Scale) -> dict[str, Arm]:
    """Return crops without and with colour distortion; nothing is trained."""
    return {
        PLAIN: Arm(without_colour(scale.base)),
        DISTORTED: Arm(scale.base),
    }


def claims(arms: Sequence[str]) -> list[Claim]:
    """Return what figure 6 shows without a number."""
    return [
        Claim(
            "crops alone are matched by their colours ten times as often as by chance or more",
            (PLAIN,),
            score="histogram.found",
            constant=10 / 256,
        ),
        Claim(
            "colour distortion takes more than half of those matches away",
            (PLAIN,),
            (DISTORTED,),
            score="histogram.found_half",
            than_score="histogram.found",
        ),
    ]


STUDY = Study(
    title="The colour shortcut",
    question=(
        "For two crops of each of 256 test images: how often is the crop with the nearest RGB "
        "histogram (16 bins a channel, sum of differences) of the same image? No network is "
        "involved. Chance is 1 in 256."
    ),
    source="Chen et al. 2020, section 3.1 and figure 6, which shows histograms and no number.",
    arms=arms,
    columns={"matched": "histogram.found", "chance": "histogram.chance"},
    claims=claims,
    work="histograms",
    figure="histograms",
    drawn=(),
)
