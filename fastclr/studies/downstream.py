"""What a trained encoder is worth to others: tuned on a few labels, carried to another set."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fastclr import data_sets
from fastclr.evaluation import finetune, semi_supervised, transfer
from fastclr.evaluation.scoring import top1
from fastclr.simclr import SimCLR
from fastclr.studies.images import StudyImages
from fastclr.studies.scales import Scale
from pipelines.image_set import ImageSet

JSON = dict[str, Any]
Say = Callable[[str], None]

SHARES = (0.01, 0.1)  # of labels


def tuned(
    model: SimCLR, images: StudyImages, scale: Scale, seed: int, device: torch.device, say: Say
) -> JSON:
    """Tune the encoder on shares of the labels; see :mod:`fastclr.evaluation.semi_supervised`.

    Args:
        model: Its encoder is copied for each share.
        images: Labelled images.
        scale: Says how long.
        seed: Seed of the choice of images and of their order.
        device: Where to train.
        say: Told what is being done.

    Returns:
        Share of right answers to the test images, 0..1, by per cent of labels; ``lost``, how much
        less it is with the smallest share than with the largest.

    Raises:
        FloatingPointError: If a loss is not finite.
    """
    train, test = (_labelled(of, images.size, seed) for of in (images.train, images.test))
    found = {}
    for share in SHARES:
        rows = semi_supervised.balanced_subset(train.label_X, share, seed)
        settings = semi_supervised.settings_for(share, len(rows), seed=seed)
        if scale.tuning_epochs:
            settings = replace(settings, epochs=scale.tuning_epochs)
        say(f"{settings.epochs} epochs of tuning on {len(rows)} labelled images")
        known_C = np.unique(train.label_X[rows])
        network = _network(model)
        classifier = finetune.Classifier(network.make(), network.feature_dim, len(known_C))
        finetune.finetune(classifier, train, rows, known_C, settings, device)
        every = np.arange(len(test.label_X))
        answer_X = finetune.answers(classifier, test, every, known_C, device)
        found[f"{100 * share:g}"] = top1(answer_X, test.label_X)
    scores = list(found.values())
    return {**found, "lost": scores[-1] - scores[0]}


def transferred(
    model: SimCLR,
    images: StudyImages,
    scale: Scale,
    seed: int,
    is_trained: bool,
    device: torch.device,
    say: Say,
) -> JSON:
    """Carry the encoder to another data set; see :mod:`fastclr.evaluation.transfer`.

    Args:
        model: Its encoder is copied for each training.
        images: Has the other set as ``target``.
        scale: Says how many steps of fine-tuning, if any.
        seed: Seed of splits and orders.
        is_trained: Whether the encoder is; else the grid and length for random weights are taken.
        device: Where to train.
        say: Told what is being done.

    Returns:
        ``linear`` and, where there is fine-tuning, ``tuned``: shares of right answers to the other
        set's test images, 0..1.

    Raises:
        ConfigError: If the other set cannot be used.
        FloatingPointError: If a feature is not finite.
    """
    assert images.target is not None, "with_target gives it"
    chosen = transfer.TransferSet(
        "target", "top1", *(_labelled(of, images.size, seed) for of in images.target)
    )
    rows: dict[str, tuple[str, int | None]] = {"linear": ("linear", None)}
    if scale.transfer_steps:
        row, times = ("finetune", 1) if is_trained else ("random_init", 2)
        rows["tuned"] = (row, times * scale.transfer_steps)
    network = _network(model)
    return {
        name: transfer.transfer_row(
            row, chosen, network, network, steps=steps, seed=seed, device=device, say=say
        ).score
        for name, (row, steps) in rows.items()
    }


def _network(model: SimCLR) -> transfer.Network:
    """Return what makes copies of the encoder."""
    encoder = copy.deepcopy(model.encoder)
    width: int = model.encoder.feature_dim  # pyright: ignore[reportAssignmentType]
    return transfer.Network(lambda: copy.deepcopy(encoder), width)


def _labelled(of: ImageSet, size: int, seed: int) -> finetune.LabelledImages:
    """Describe images to what trains on them."""
    return data_sets.labelled_images("the study's images", of, size, seed, torch.get_num_threads())
