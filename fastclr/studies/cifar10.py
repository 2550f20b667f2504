"""Appendix B.9: CIFAR-10 by learning rate and temperature, beside supervised training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastclr.config import OptimizerConfig
from fastclr.studies.scales import Scale, changed
from fastclr.studies.study import ACCURACIES, ENTROPY, Arm, Claim, Study, Variant

RATES, TEMPERATURES = (0.5, 1.0, 1.5), (0.1, 0.5, 1.0)  # rates for 256 images
LARGER = "four times the batch"
SUPERVISED = "supervised"


def _name(rate: float, temperature: float) -> str:
    return f"rate {rate}, temperature {temperature}"


def arms(scale: Scale) -> dict[str, Arm]:
    """Return the grid at one batch, its middle rate at a larger one, and supervised training."""
    base, found = scale.base, {}
    for rate in RATES:
        optimizer = OptimizerConfig(
            "LARS", base_learning_rate=rate, weight_decay=1e-6,
            warmup_epochs=min(10.0, (base.epochs or 1) / 10),
        )  # fmt: skip
        for temperature in TEMPERATURES:
            config = changed(base, "loss", temperature=temperature)
            found[_name(rate, temperature)] = Arm(replace(config, optimizer=optimizer))
    for temperature in TEMPERATURES:
        config = found[_name(1.0, temperature)].config
        larger = replace(config, global_batch_size=4 * (base.global_batch_size or 0))
        found[f"{_name(1.0, temperature)}, {LARGER}"] = Arm(larger)
    found[SUPERVISED] = Arm(found[_name(1.0, 0.5)].config, Variant(supervised=True))
    return found


def claims(arms: Sequence[str]) -> list[Claim]:
    """Return what the source says of temperatures, and the gap to labels."""
    at = {t: tuple(_name(rate, t) for rate in RATES) for t in TEMPERATURES}
    return [
        Claim("temperature 1 is worse at h than 0.1 and 0.5", (*at[0.1], *at[0.5]), at[1.0]),
        Claim(
            "temperature 0.5 is better at h than 0.1",
            at[0.5],
            at[0.1],
            not_judged="it takes more than 300 epochs of all images",
        ),
        Claim(
            "temperature 0.1 gains from the larger batch",
            (f"{_name(1.0, 0.1)}, {LARGER}",),
            (_name(1.0, 0.1),),
            not_judged="with so few epochs small batches win by taking more steps",
        ),
        Claim(
            "supervised training is better at h than SimCLR over the grid",
            (SUPERVISED,),
            tuple(name for of in at.values() for name in of),
            not_judged="the source's difference of 1 point is that of its best run after 1000 "
            "epochs",
        ),
    ]


STUDY = Study(
    title="CIFAR-10, appendix B.9",
    question=(
        "LARS with the three rates and temperatures of the source at the scale's batch, the middle "
        "rate at four times the batch, and supervised training with the same views. The source's "
        "encoder is a ResNet-50, its batches 256 to 4096, and its scores the best of its grid; "
        "scale cifar10 is that one. Accuracy in training: how often the positive is found; of the "
        "supervised one, how often the class is told."
    ),
    source="Chen et al. 2020, appendix B.9 and figure B.8, whose points are in no text.",
    arms=arms,
    columns={**ACCURACIES, "accuracy in training": "log.accuracy", **ENTROPY},
    claims=claims,
    published={
        _name(1.0, 0.5): "best of the grid, at batch 1024: 94.0",
        SUPERVISED: "95.1",
    },
)
