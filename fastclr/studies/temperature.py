"""Temperature, with and without scaling z to length 1."""

from __future__ import annotations

from collections.abc import Sequence

from fastclr.studies.scales import Scale, changed
from fastclr.studies.study import ACCURACIES, ENTROPY, FOUND, Arm, Claim, Study

UNIT, RAW = (0.05, 0.1, 0.2, 0.5, 1.0), (10.0, 100.0)


def _name(value: float, is_unit: bool) -> str:
    return f"{'cosine' if is_unit else 'dot product'}, {value:g}"


def arms(scale: Scale) -> dict[str, Arm]:
    """Return the temperatures of table 5 and the pilots' 0.2."""
    return {
        _name(value, is_unit): Arm(
            changed(scale.base, "loss", temperature=value, normalize=is_unit)
        )
        for is_unit, values in ((True, UNIT), (False, RAW))
        for value in values
    }


def claims(arms: Sequence[str]) -> list[Claim]:
    """Return what table 5 shows."""
    unit = tuple(_name(value, True) for value in UNIT)
    raw = tuple(_name(value, False) for value in RAW)
    return [
        Claim("of cosines, temperature 1 is worse at h than the others", unit[:-1], unit[-1:]),
        Claim(
            "the entropy at temperature 1 is higher than at 0.05",
            unit[-1:],
            unit[:1],
            score="log.entropy",
        ),
        Claim("cosines are better at h than dot products", unit, raw),
        Claim(
            "dot products find more positives than cosines",
            raw,
            unit,
            score="log.accuracy",
        ),
        Claim(
            "0.1 is better at h than 0.5",
            (_name(0.1, True),),
            (_name(0.5, True),),
            not_judged="short trainings favour small temperatures, long ones on CIFAR-10 0.5",
        ),
    ]


STUDY = Study(
    title="Temperature and length",
    question=(
        "NT-Xent on cosines and on dot products, by temperature; entropy (nats) of the softmax "
        "over the other view's images, and how often the positive is found there, in the last "
        "tenth of the training."
    ),
    source="Chen et al. 2020, section 5.1 and table 5.",
    arms=arms,
    columns={**ACCURACIES, **FOUND, **ENTROPY},
    claims=claims,
    published={
        _name(0.05, True): "59.7; found 90.5, entropy 1.0",
        _name(0.1, True): "64.4; found 87.8, entropy 4.5",
        _name(0.5, True): "60.7; found 68.2, entropy 8.2",
        _name(1.0, True): "58.0; found 59.1, entropy 8.3",
        _name(10.0, False): "57.2; found 91.7, entropy 0.5",
        _name(100.0, False): "57.0; found 92.1, entropy 0.5",
    },
)
