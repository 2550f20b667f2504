"""None, a linear or a nonlinear projection head, by the width of z."""

from __future__ import annotations

from collections.abc import Sequence

from fastclr.studies.scales import Scale, changed
from fastclr.studies.study import ACCURACIES, FOUND, RANKS, Arm, Claim, Study, Variant


def arms(scale: Scale) -> dict[str, Arm]:
    """Return an untrained encoder, no head, and both heads in every width."""
    base = scale.base
    found = {
        "untrained": Arm(base, Variant(trained=False)),
        "none": Arm(changed(base, "head", kind="none")),
    }
    for kind in ("linear", "mlp"):
        for width in scale.output_dims:
            found[f"{kind} {width}"] = Arm(changed(base, "head", kind=kind, output_dim=width))
    return found


def claims(arms: Sequence[str]) -> list[Claim]:
    """Return the claims of figure 8 and section 4.2."""
    linear, mlp = (tuple(a for a in arms if a.startswith(kind)) for kind in ("linear ", "mlp "))
    return [
        Claim("training beats no training at h", (*linear, *mlp), ("untrained",)),
        Claim("a linear head beats none at h", linear, ("none",)),
        Claim("a nonlinear head beats none at h", mlp, ("none",)),
        Claim(
            "a nonlinear head beats a linear one at h",
            mlp,
            linear,
            not_judged="it takes longer training than a pilot's",
        ),
        Claim("h is better than z before a nonlinear head", mlp, mlp, than_score="z.linear"),
        Claim(
            "the width of z changes h by less than 2 points, from the smallest to the largest",
            (linear[-1], mlp[-1]),
            (linear[0], mlp[0]),
            margin=0.02,
            kind="equal",
        ),
    ]


STUDY = Study(
    title="Projection heads",
    question=(
        "SimCLR with no head, a linear one and one with a hidden layer, by the width of z; scored "
        "at h and at z. The source finds a nonlinear head about 3 points better than a linear one "
        "and more than 10 better than none, no influence of the width, and h more than 10 points "
        "better than z; its figure has bars without numbers."
    ),
    source="Chen et al. 2020, section 4.2 and figure 8.",
    arms=arms,
    columns={**ACCURACIES, **RANKS, **FOUND},
    claims=claims,
)
