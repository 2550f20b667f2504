"""The experiments of the literature: ``python tools/study.py NAME``; one file a study."""

from __future__ import annotations

from fastclr.studies import (
    alternating,
    augmentations,
    autoencoder_heads,
    color_histogram,
    color_strength,
    forgetting,
    heads,
    layers,
    losses,
    temperature,
)
from fastclr.studies.study import Study

STUDIES: dict[str, Study] = {
    "heads": heads.STUDY,
    "layers": layers.STUDY,
    "forgetting": forgetting.STUDY,
    "alternating": alternating.STUDY,
    "autoencoder_heads": autoencoder_heads.STUDY,
    "losses": losses.STUDY,
    "temperature": temperature.STUDY,
    "augmentations": augmentations.STUDY,
    "color_strength": color_strength.STUDY,
    "color_histogram": color_histogram.STUDY,
}
