"""Heads whose first layer is lifted from an autoencoder, with the controls the source lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastclr.config import Config
from fastclr.studies.scales import Scale, changed
from fastclr.studies.study import ACCURACIES, FOUND, Arm, Claim, Study, Variant

LEARNED, AUTOENCODER, FREE = "learned", "autoencoder, frozen", "autoencoder, trained on"
CONTROLS = {
    "random, frozen": "random",
    "orthogonal, frozen": "orthogonal",
    "PCA of h, frozen": "pca",
}


def arms(scale: Scale) -> dict[str, Arm]:
    """Return all first layers with ReLU, and two of them over the source's other knobs."""
    base = changed(scale.base, "head", kind="mlp", norm="none")
    frozen = Variant(start="autoencoder", frozen=("fc1",))
    found = {
        LEARNED: Arm(base),
        AUTOENCODER: Arm(base, frozen),
        FREE: Arm(base, replace(frozen, frozen=())),
        **{n: Arm(base, replace(frozen, start=start)) for n, start in CONTROLS.items()},
    }
    for knob, (config, variant) in _knobs(base, scale).items():
        found[f"{LEARNED}, {knob}"] = Arm(config, variant)
        frozen_too = replace(variant, start="autoencoder", frozen=("fc1",))
        found[f"{AUTOENCODER}, {knob}"] = Arm(config, frozen_too)
    return found


def _knobs(base: Config, scale: Scale) -> dict[str, tuple[Config, Variant]]:
    """Return what else the source varies: activation, width of z, of the layer, z-score."""
    narrow = min(scale.output_dims)
    return {
        **{name: (base, Variant(activation=name)) for name in ("silu", "sigmoid", "tanh")},
        f"z {narrow}": (changed(base, "head", output_dim=narrow), Variant()),
        f"width {narrow}": (changed(base, "head", hidden_dim=narrow), Variant()),
        "z-score": (base, Variant(standardise=True)),
    }


def claims(arms: Sequence[str]) -> list[Claim]:
    """Return claims over the mean of the paired grid, never over its best."""
    of = {kind: tuple(a for a in arms if a.startswith(kind)) for kind in (LEARNED, AUTOENCODER)}
    sigmoid, relu = (f"{LEARNED}, sigmoid", f"{AUTOENCODER}, sigmoid"), (LEARNED, AUTOENCODER)
    z_score = (f"{LEARNED}, z-score", f"{AUTOENCODER}, z-score")
    return [
        Claim(
            "a frozen layer of an autoencoder is better at h than a learned one, over the grid",
            of[AUTOENCODER],
            of[LEARNED],
        ),
        Claim(
            "an autoencoder's layer is better at h than other frozen ones",
            (AUTOENCODER,),
            (*CONTROLS,),
        ),
        Claim("freezing the autoencoder's layer is better at h", (AUTOENCODER,), (FREE,)),
        Claim(
            "sigmoid is better at h than ReLU",
            sigmoid,
            relu,
            not_judged="the source finds it in maxima of grids and not in their means",
        ),
        Claim(
            "inputs of mean 0 and deviation 1 are better at h",
            z_score,
            relu,
            not_judged="the source's paired means show no effect",
        ),
    ]


STUDY = Study(
    title="Heads that begin as an autoencoder",
    question=(
        "The first layer of the head is the embedding of an autoencoder of raw images, frozen or "
        "not. The source has no other frozen layer beside it; here are three: random, orthogonal, "
        "and the principal axes of the untrained encoder's h. The autoencoder's hidden layer is as "
        "wide as h. The source starts from an encoder trained on ImageNet with labels; here all "
        "begins at random."
    ),
    source="Schliebitz, Tapken & Atzmueller 2024, arXiv 2408.14514.",
    arms=arms,
    columns={**ACCURACIES, "h, rank": "h.rank", **FOUND},
    claims=claims,
    published={
        LEARNED: "CIFAR-10: mean over the source's grid 58.6, its best 64.9",
        AUTOENCODER: "CIFAR-10: mean over the source's grid 62.0, its best 66.6",
    },
)
