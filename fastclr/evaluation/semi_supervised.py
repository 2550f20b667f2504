"""A few labels: class-balanced subsets, the same for all, and how a network is tuned on them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from fastclr.config import ConfigError
from fastclr.evaluation.draws import SUBSET, Int64, place_in_class
from fastclr.evaluation.finetune import FinetuneSettings
from fastclr.files import write_json

# Share of labels -> epochs; Chen et al. 2020, B.5.
EPOCHS = {0.01: 60, 0.1: 30}
_BATCH, _IMAGENET = 4096, 1_281_167  # the paper's batch, and the images that it is a share of


def balanced_subset(label_X: Int64, fraction: float, seed: int = 0) -> Int64:
    """Choose a share of the images, equally many of each class.

    A pure function of its arguments, on every machine. With the same seed a smaller share is part
    of a larger one.

    Args:
        label_X: int64 labels; images below 0 have none and are never chosen.
        fraction: Share of all images, above 0 and at most 1. Each class gets the share of the mean
            class, at least one image; a class that has fewer gives all it has.
        seed: Seed of the choice.

    Returns:
        Rows, rising.

    Raises:
        ConfigError: If the share is out of range, or no image has a label.
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"a share of {fraction} of the labels: give more than 0, at most 1.")
    is_known_X = label_X >= 0
    if not is_known_X.any():
        raise ConfigError("no image has a label: a subset of labelled images needs some.")
    num_classes = len(np.unique(label_X[is_known_X]))
    each = max(1, round(fraction * int(is_known_X.sum()) / num_classes))
    return np.flatnonzero(is_known_X & (place_in_class(label_X, seed, SUBSET) < each))


def settings_for(fraction: float, num_images: int, *, seed: int = 0) -> FinetuneSettings:
    """Return the paper's fine-tuning schedule for a subset: rate 0.05 * batch / 256, no decay.

    The paper's batch of 4096 is a third of ImageNet's 1 % and a 31st of its 10 %. A batch here is
    the same share of the whole set, at most 4096, so that a smaller set gets as many steps an
    epoch: with fewer, larger ones its rate would be one that unlearns what was learned.

    Args:
        fraction: Share of the labels; the epochs are 60 up to 1 %, else 30.
        num_images: Images of the subset.
        seed: Seed of the order.
    """
    epochs = next((EPOCHS[share] for share in sorted(EPOCHS) if fraction <= share), EPOCHS[0.1])
    batch_size = max(2, min(_BATCH, round(num_images / fraction * _BATCH / _IMAGENET)))
    return FinetuneSettings(epochs=epochs, batch_size=batch_size, seed=seed)


def save_subset(file: Path, rows: Int64, label_X: Int64, *, fraction: float, seed: int) -> None:
    """Write which images a subset has, so that others can take the same."""
    facts = {"fraction": fraction, "seed": seed, "num_images": len(label_X)}
    write_json(file, {**facts, "labels_sha256": _digest(label_X), "ids": rows.tolist()})


def load_subset(file: Path, label_X: Int64) -> Int64:
    """Read a subset and check that it is one of these images.

    Raises:
        ConfigError: If the file is no list of images, or one of other images.
    """
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        rows, digest = np.array(facts["ids"], np.int64), facts["labels_sha256"]
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ConfigError(
            f"{file} is no list of images ({error!r}): delete it, and it is made again."
        ) from error
    in_range = rows.ndim == 1 and len(rows) > 0 and 0 <= rows.min() <= rows.max() < len(label_X)
    if digest != _digest(label_X) or not in_range or len(np.unique(rows)) != len(rows):
        raise ConfigError(
            f"{file} lists images of another set than these {len(label_X)}: their labels are not "
            "the ones it was made for. Use that set, or delete the file."
        )
    return np.sort(rows)


def _digest(label_X: Int64) -> str:
    """Return the sha256 of labels in their order."""
    return hashlib.sha256(np.ascontiguousarray(label_X, "<i8").tobytes()).hexdigest()
