"""Width by depth of the encoder, beside supervised training with the same views."""

from __future__ import annotations

from collections.abc import Sequence

from fastclr.studies.scales import Scale, changed
from fastclr.studies.study import ACCURACIES, Arm, Claim, Study, Variant

WIDTHS = {"half width": 0.5, "full width": 1.0, "double width": 2.0}  # of the scale's encoder
DEEPER = {"resnet8": "resnet14", "resnet18": "resnet34", "resnet50": "resnet101"}
SIMCLR, SUPERVISED = "SimCLR", "supervised"


def arms(scale: Scale) -> dict[str, Arm]:
    """Return two depths in three widths, without and with labels."""
    encoder, found = scale.base.encoder, {}
    for name in (encoder.name, DEEPER[encoder.name]):
        for width, factor in WIDTHS.items():
            config = changed(scale.base, "encoder", name=name, width=encoder.width * factor)
            found[f"{SIMCLR}, {name}, {width}"] = Arm(config)
            found[f"{SUPERVISED}, {name}, {width}"] = Arm(config, Variant(supervised=True))
    return found


def claims(arms: Sequence[str]) -> list[Claim]:
    """Return what widths do; gaps need larger encoders."""
    narrow, _, double = WIDTHS
    of = {
        (kind, width): tuple(a for a in arms if a.startswith(kind) and a.endswith(width))
        for kind in (SIMCLR, SUPERVISED)
        for width in (narrow, double)
    }
    return [
        *(
            Claim(
                f"{kind}: {double} is better at h than {narrow}", of[kind, double], of[kind, narrow]
            )
            for kind in (SIMCLR, SUPERVISED)
        ),
        Claim(
            "the gap to supervised training shrinks with width (half of what it loses)",
            (*of[SUPERVISED, narrow], *of[SIMCLR, double]),
            (*of[SUPERVISED, double], *of[SIMCLR, narrow]),
            not_judged="it takes larger encoders than a pilot's",
        ),
    ]


STUDY = Study(
    title="Size of the encoder",
    question=(
        "SimCLR and supervised training of the same encoders with the same augmentation and "
        "optimizer, scored by the same probe at h; for the supervised ones z is the classifier. "
        "In the source the gap between the two shrinks from about 7 points for ResNet-50 to 2 for "
        "one four times as wide."
    ),
    source="Chen et al. 2020, section 4.1, figure 7 and table B.3.",
    arms=arms,
    columns={**ACCURACIES, "accuracy in training": "log.accuracy"},
    claims=claims,
)
