"""Scores of a trained model: every layer of the head, ranks, and what the log says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastclr.evaluation.collapse import effective_rank
from fastclr.evaluation.features import Features, extract_layers
from fastclr.evaluation.forgetting import VIEWS, forgetting_scores
from fastclr.evaluation.knn import PROTOCOL as KNN_PROTOCOL
from fastclr.evaluation.knn import knn_accuracy
from fastclr.evaluation.layers import Layers
from fastclr.evaluation.ridge import PROTOCOL as RIDGE_PROTOCOL
from fastclr.evaluation.ridge import ridge_probe
from fastclr.metrics import read_rows
from fastclr.simclr import SimCLR
from fastclr.studies.images import StudyImages
from pipelines.distortions import DISTORTIONS
from pipelines.image_set import ImageSet

JSON = dict[str, Any]
Say = Callable[[str], None]

PROTOCOL = (
    f"linear: {RIDGE_PROTOCOL} kNN: {KNN_PROTOCOL} Both are fitted on the training images and "
    "scored on the test images. rank: effective rank of the test features, without their mean."
)
_HEAD = "projection_head."
_RANKED = 2048  # test images whose features' rank is taken
LOGGED = {"loss": "loss", "accuracy": "contrastive_accuracy", "entropy": "contrastive_entropy"}


def layer_scores(model: SimCLR, images: StudyImages, device: torch.device, say: Say) -> JSON:
    """Score h and the output of every module of the head; the last of them is also ``z``.

    Returns:
        By layer: ``linear``, ``knn`` and ``validation`` (a linear probe of four fifths of the
        training images on the fifth that is left: for choices, so that no test image makes one),
        all 0..1, and ``rank``. Under ``weights``, by layer of the head, the effective rank.
    """
    layers = Layers(model.encoder, model.projection_head)
    layers = layers.only([name for name in layers.names if not name.startswith("encoder.")])
    train, test = (
        extract_layers(layers, images.batches(of), device) for of in (images.train, images.test)
    )
    scores: JSON = {}
    for name in layers.names:
        say(f"scoring {name.removeprefix(_HEAD)}")
        scores[name.removeprefix(_HEAD)] = _layer(train[name], test[name])
    scores["z"] = scores[layers.names[-1].removeprefix(_HEAD)]
    scores["weights"] = head_ranks(model)
    return scores


def head_ranks(model: SimCLR) -> dict[str, float]:
    """Return the effective rank of each linear layer of the head, by its name."""
    return {
        name: effective_rank(module.weight.detach().cpu())
        for name, module in model.projection_head.named_children()
        if isinstance(module, nn.Linear)
    }


def _layer(train: Features, test: Features) -> JSON:
    """Score one layer."""
    rows = len(train.label_X) * 4 // 5
    fitting = Features(train.h_XF[:rows], train.label_X[:rows])
    held_out = Features(train.h_XF[rows:], train.label_X[rows:])
    ranked = test.h_XF[:_RANKED]
    return {
        "linear": ridge_probe(train, test).top1,
        "knn": knn_accuracy(train, test),
        "validation": ridge_probe(fitting, held_out).top1,
        "rank": effective_rank(torch.from_numpy(ranked - ranked.mean(0))),
    }


def ends(model: SimCLR) -> Layers:
    """Return the model seen at h and at z, or at h alone where there is no head."""
    layers = Layers(model.encoder, model.projection_head)
    of_head = [name for name in layers.names if not name.startswith("encoder.")]
    return layers.only([*dict.fromkeys((of_head[0], of_head[-1]))])


def logged_means(run_dir: Path, share: float = 0.1) -> JSON:
    """Return means over the last log rows of a run: loss, contrastive accuracy and entropy.

    Args:
        run_dir: Folder of the run.
        share: Of its length that is averaged over, at least one row.
    """
    rows = read_rows(run_dir / "metrics.jsonl")
    last = rows[-1]["step"]
    rows = [row for row in rows if row["step"] > last * (1 - share)]
    names = {**LOGGED, "head_gain": "head_gain"}
    return {
        name: float(np.mean([row[key] for row in rows if key in row]))
        for name, key in names.items()
        if any(key in row for row in rows)
    }


def changes_told(
    model: SimCLR, images: StudyImages, most: int, device: torch.device, say: Say
) -> JSON:
    """Tell from h and z how test images were changed; see :mod:`fastclr.evaluation.forgetting`.

    Args:
        model: Encoder and head, on ``device``.
        images: Training images, of which probes see ``most``, and all test images.
        most: Training images of the probes.
        device: Where the model is.
        say: Told what is being done.

    Returns:
        By task, with words joined by underscores: ``h``, ``z`` and ``chance``, 0..1.
    """
    seen = ends(model)
    say("features of changed images")
    train, test = (
        {view: _changed(seen, images, of, view, number, device) for view in VIEWS}
        for of, number in ((images.train, most), (images.test, len(images.test)))
    )
    return {
        found.task.replace(" ", "_"): {
            "h": found.top1[seen.names[0]],
            "z": found.top1[seen.names[-1]],
            "chance": found.chance,
        }
        for found in forgetting_scores(train, test, device, say)
    }


def _changed(
    layers: Layers, images: StudyImages, of: ImageSet, view: str, most: int, device: torch.device
) -> dict[str, Features]:
    """Return the features of images that were all changed in one way."""

    def batches():
        start = 0
        for images_NCHW, label_N in images.batches(of, most):
            ids = np.arange(start, start + len(label_N))
            yield DISTORTIONS[view](images_NCHW, ids), label_N
            start += len(label_N)

    return extract_layers(layers, batches(), device)
