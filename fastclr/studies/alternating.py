"""The head as a part of the objective: alternating steps against joint training and fixed heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastclr.studies.scales import Scale, changed
from fastclr.studies.study import ACCURACIES, RANKS, Alternating, Arm, Claim, Study, Variant

STEPS = {"K = 1": 1, "K = 4": 4, "K = 16": 16}


def arms(scale: Scale) -> dict[str, Arm]:
    """Return joint training, alternating steps with one knob turned at a time, and fixed heads."""
    base = scale.base
    four = Alternating(head_steps=4)
    knobs = {
        **{name: Alternating(head_steps=steps) for name, steps in STEPS.items()},
        "K = 4, simultaneous": replace(four, order="simultaneous"),
        "K = 4, four batches": replace(four, earlier_batches=4),
        "K = 4, head rate / 10": replace(four, head_rate=0.1),
        "K = 4, head rate x 3": replace(four, head_rate=3.0),
        "K = 4, new head at half time": replace(four, renewed_epochs=(base.epochs or 2) / 2),
    }
    linear = changed(base, "head", kind="linear")
    low_rank = changed(linear, "head", output_dim=max(2, min(scale.output_dims)))
    return {
        "joint": Arm(base),
        "joint, linear head": Arm(linear),
        "joint, no head": Arm(changed(base, "head", kind="none")),
        **{name: Arm(base, Variant(alternating=how)) for name, how in knobs.items()},
        "random head, fixed": Arm(base, Variant(frozen=("fc1", "fc2"))),
        "low-rank projection, fixed": Arm(low_rank, Variant(start="orthogonal", frozen=("fc1",))),
        "first half of h": Arm(linear, Variant(start="direct")),
    }


def claims(arms: Sequence[str]) -> list[Claim]:
    """Return what must be so if the steps do what they should, and what is asked."""
    unknown = "the source's numbers could not be had, and a pilot's differences are small"
    return [
        Claim(
            "four steps of the head lower its loss on their batch",
            ("K = 4",),
            score="log.head_gain",
        ),
        Claim(
            "the contrastive loss with K = 4 and 16 is lower than in joint training",
            ("joint",),
            ("K = 4", "K = 16"),
            score="log.loss",
        ),
        Claim("alternating steps give a better h", (*STEPS,), ("joint",), not_judged=unknown),
        Claim(
            "alternating steps change h's rank",
            (*STEPS,),
            ("joint",),
            score="h.rank",
            not_judged=unknown,
        ),
        Claim(
            "a learned head gives a better h than a random, fixed one",
            ("joint",),
            ("random head, fixed",),
            not_judged=unknown,
        ),
        Claim(
            "with a head the rank of h is larger than without",
            ("joint",),
            ("joint, no head",),
            score="h.rank",
        ),
    ]


STUDY = Study(
    title="The head as a part of the objective: alternating steps",
    question=(
        "K steps of the head on fixed representations, then one of the encoder through the fixed "
        "head. This follows the idea in the abstract of the source; its text and code could not be "
        "had, so the formulation is ours and no number of it is repeated. Baselines: joint "
        "training, heads that are not trained, and the loss on the first half of h alone, as in "
        "DirectCLR (Jing et al. 2022)."
    ),
    source="Gupta, Ajanthan, van den Hengel & Gould 2022, arXiv 2212.11491 (abstract).",
    arms=arms,
    columns={
        **ACCURACIES,
        **RANKS,
        "h, alignment": "h.alignment",
        "h, uniformity": "h.uniformity",
        "z, alignment": "z.alignment",
        "z, uniformity": "z.uniformity",
        "contrastive loss": "log.loss",
        "head's gain": "log.head_gain",
    },
    claims=claims,
)
