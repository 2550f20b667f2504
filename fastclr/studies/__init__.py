"""The experiments of the literature: ``fastclr study NAME``; one file a study."""

from __future__ import annotations

from fastclr.studies import (
    alternating,
    augmentations,
    autoencoder_heads,
    batch_epochs,
    batch_statistics,
    blur_flip,
    cifar10,
    color_histogram,
    color_strength,
    encoder_size,
    forgetting,
    head_spectrum,
    heads,
    layers,
    losses,
    optimizer,
    semi_supervised,
    temperature,
    transfer,
)
from fastclr.studies.study import Study

STUDIES: dict[str, Study] = {
    "heads": heads.STUDY,
    "head_spectrum": head_spectrum.STUDY,
    "layers": layers.STUDY,
    "forgetting": forgetting.STUDY,
    "alternating": alternating.STUDY,
    "autoencoder_heads": autoencoder_heads.STUDY,
    "losses": losses.STUDY,
    "temperature": temperature.STUDY,
    "augmentations": augmentations.STUDY,
    "color_strength": color_strength.STUDY,
    "blur_flip": blur_flip.STUDY,
    "batch_epochs": batch_epochs.STUDY,
    "optimizer": optimizer.STUDY,
    "batch_statistics": batch_statistics.STUDY,
    "encoder_size": encoder_size.STUDY,
    "color_histogram": color_histogram.STUDY,
    "semi_supervised": semi_supervised.STUDY,
    "transfer": transfer.STUDY,
    "cifar10": cifar10.STUDY,
}
