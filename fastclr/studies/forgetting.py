"""Table 3: what the head forgets, told from h and from g(h)."""

from __future__ import annotations

from collections.abc import Sequence

from fastclr.studies.scales import Scale, changed
from fastclr.studies.study import Arm, Claim, Study, Variant

STANDARD = "crop, colour"
ADDED = {"rotation": "rotate", "noise": "noise", "Sobel": "sobel"}  # name -> change of both views
TASKS = {
    "gray": "colour_or_grayscale",
    "rotation": "rotation",
    "noise": "original_or_noise",
    "Sobel": "original_or_Sobel",
}


def arms(scale: Scale) -> dict[str, Arm]:
    """Return the standard augmentation, and it with one more change."""
    base = changed(scale.base, "head", kind="mlp")
    return {
        STANDARD: Arm(base),
        **{
            f"{STANDARD}, {name}": Arm(base, Variant(changes=((change,), (change,))))
            for name, change in ADDED.items()
        },
    }


def claims(arms: Sequence[str]) -> list[Claim]:
    """Return the claims of table 3."""
    found = [
        Claim(
            f"{name} added to training is told better from h than from g(h)",
            (f"{STANDARD}, {name}",),
            (f"{STANDARD}, {name}",),
            score=f"{TASKS[name]}.h",
            than_score=f"{TASKS[name]}.z",
        )
        for name in ADDED
    ]
    rotated = f"{STANDARD}, rotation"
    return [
        *found,
        Claim(
            "rotation added to training is told from g(h) within 5 points of a guess",
            (rotated,),
            (rotated,),
            score="rotation.z",
            than_score="rotation.chance",
            margin=0.05,
            kind="equal",
        ),
        Claim(
            "gray is told better from h than from g(h)",
            (STANDARD,),
            (STANDARD,),
            score="colour_or_grayscale.h",
            than_score="colour_or_grayscale.z",
            not_judged="both are near the guess or near 1 at this size",
        ),
    ]


STUDY = Study(
    title="What the head forgets",
    question=(
        "A small MLP tells from h, and from g(h), how a test image was changed. As in the source, "
        "rotation, noise and Sobel are added to the standard augmentation, one at a time, of "
        "another training. The strength of noise and the share of changed views are ours: the "
        "source does not publish its own."
    ),
    source="Chen et al. 2020, section 4.2 and table 3.",
    arms=arms,
    columns={
        f"{name} {layer}": f"{path}.{key}"
        for name, path in TASKS.items()
        for layer, key in (("h", "h"), ("g(h)", "z"))
    },
    claims=claims,
    published={
        STANDARD: "gray: h 99.3, g(h) 97.4, guess 80",
        f"{STANDARD}, rotation": "rotation: h 67.6, g(h) 25.6, guess 25",
        f"{STANDARD}, noise": "noise: h 99.5, g(h) 59.6, guess 50",
        f"{STANDARD}, Sobel": "Sobel: h 96.6, g(h) 56.3, guess 50",
    },
    work="changes",
    drawn=("rotation h", "rotation g(h)"),
)
