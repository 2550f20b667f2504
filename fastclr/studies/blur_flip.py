"""The switches of blur and flip."""

from __future__ import annotations

from collections.abc import Sequence

from fastclr.studies.scales import Scale, changed
from fastclr.studies.study import ACCURACIES, ENTROPY, FOUND, Arm, Claim, Study

SWITCHES = {
    "blur and flip": (0.5, 0.5),
    "flip alone": (0.0, 0.5),
    "blur alone": (0.5, 0.0),
    "neither": (0.0, 0.0),
}  # name -> probabilities


def arms(scale: Scale) -> dict[str, Arm]:
    """Return crops and colours with every setting of both switches."""
    return {
        name: Arm(changed(scale.base, "views", blur_prob=blur, flip_prob=flip))
        for name, (blur, flip) in SWITCHES.items()
    }


def claims(arms: Sequence[str]) -> list[Claim]:
    """Return the two sentences of appendix A, which no small image can judge."""
    return [
        Claim(
            "blur is better at h than no blur",
            ("blur and flip", "blur alone"),
            ("flip alone", "neither"),
            not_judged="a tenth of a small image's side is a blur over 3 pixels",
        ),
        Claim(
            "flip is better at h than no flip",
            ("blur and flip", "flip alone"),
            ("blur alone", "neither"),
            not_judged="the source's difference of 1 point is below what a pilot can show",
        ),
    ]


STUDY = Study(
    title="Blur and flip",
    question=(
        "SimCLR with crops and colour distortion, with and without blur and horizontal flip, each "
        "with probability 1/2 in both views. The source calls the flip helpful but not essential, "
        "and leaves blur out for CIFAR-10."
    ),
    source="Chen et al. 2020, appendix A and table 1.",
    arms=arms,
    columns={**ACCURACIES, **FOUND, **ENTROPY},
    claims=claims,
    published={"blur and flip": "64.5", "flip alone": "63.2", "blur alone": "63.4"},
)
