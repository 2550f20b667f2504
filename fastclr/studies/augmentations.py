"""Pairs of augmentations, applied to one view only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastclr.config import ViewsConfig
from fastclr.studies.scales import Scale
from fastclr.studies.study import ENTROPY, FOUND, Arm, Claim, Study, Variant

# Of the policy: setting -> value; the others are changes of views.
POLICY = {
    "crop": {"crop_scale": (0.08, 1.0), "crop_ratio": (3 / 4, 4 / 3), "flip_prob": 0.5},
    "colour": {"jitter_prob": 0.8, "grayscale_prob": 0.2},
    "blur": {"blur_prob": 0.5},
}
IDENTITY = {
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (1.0, 1.0),
    "flip_prob": 0.0,
    "jitter_prob": 0.0,
    "grayscale_prob": 0.0,
    "blur_prob": 0.0,
}
OPERATIONS = ("crop", "colour", "blur", "rotate", "cutout", "sobel", "noise")
FIRST = OPERATIONS[:4]  # these with every seed, cells with the others with one


def views(base: ViewsConfig, operations: Sequence[str]) -> ViewsConfig:
    """Return a policy that does only the given operations, of those it knows."""
    settings = dict(IDENTITY)
    for operation in operations:
        settings.update(POLICY.get(operation, {}))
    return replace(base, **settings)  # pyright: ignore[reportArgumentType]


def arms(scale: Scale) -> dict[str, Arm]:
    """Return every operation alone and every pair, in the order crop, colours, blur, the rest."""
    found = {}
    for i, first in enumerate(OPERATIONS):
        for second in OPERATIONS[i:]:
            pair = tuple(dict.fromkeys((first, second)))
            config = replace(
                scale.base,
                views=views(scale.base.views, ()),
                views_second=views(scale.base.views, pair),
            )
            changes = tuple(name for name in pair if name not in POLICY)
            seeds = None if set(pair) <= set(FIRST) else 1
            found[" + ".join(pair)] = Arm(config, Variant(changes=((), changes)), seeds)
    return found


def claims(arms: Sequence[str]) -> list[Claim]:
    """Return the claims of figure 5, over the cells that have every seed."""
    cells = [a for a in arms if set(a.split(" + ")) <= set(FIRST)]
    pairs = tuple(a for a in cells if "+" in a)
    best = "crop + colour"
    with_crop = tuple(a for a in cells if "crop" in a)
    return [
        Claim(
            "crop and colour together are better than the mean of the other pairs",
            (best,),
            tuple(a for a in pairs if a != best),
        ),
        Claim("crop and colour together are better than crop alone", (best,), ("crop",)),
        Claim("crop and colour together are better than colour alone", (best,), ("colour",)),
        Claim(
            "cells with a crop are better than cells without",
            with_crop,
            tuple(a for a in cells if a not in with_crop),
        ),
    ]


STUDY = Study(
    title="Pairs of augmentations",
    question=(
        "One view is the image as it is, the other gets one operation or two. The source crops all "
        "views first, because ImageNet's images are of many sizes; CIFAR-10's are of one, so "
        "nothing comes before. A pair is one run, in the order crop, colour, blur, then rotate, "
        "cutout, Sobel or noise; the source has both orders. Cells of crop, colour, blur and "
        "rotate have every seed, the others one."
    ),
    source="Chen et al. 2020, section 3.1 and figure 5, whose cells are in no text.",
    arms=arms,
    columns={"h, linear": "h.linear", "h, kNN": "h.knn", **FOUND, **ENTROPY},
    claims=claims,
    figure="grid",
    drawn=("h, linear",),
)
