"""The pictures of a run: maps of layers, nearest neighbours, confusions, spectra; made once."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastclr import data_sets
from fastclr.evaluation import knn, linear, projection_2d, spectra
from fastclr.evaluation.draws import Int64
from fastclr.evaluation.features import Features
from fastclr.evaluation.layers import H, Layers
from fastclr.evaluation.picture_file import (
    LayerPictures,
    Pictures,
    confusion,
    save,
    spread_queries,
)
from fastclr.subject import Subject
from fastclr.world import World

NUM_PAIRS, NUM_QUERIES, NUM_NEAREST = 1000, 10, 8
THUMBNAIL = 48  # pixels, the most
PROTOCOL = (
    "Maps of un-augmented test images (standardised features, PCA to 50 dimensions, then the named "
    f"method), the {NUM_NEAREST} nearest training images of {NUM_QUERIES} test images by cosine "
    "similarity, the confusions of the quick protocol's linear probe on h, singular values of "
    "covariances (all test images) and of the head's weights. Silhouette and ranks on the mapped "
    f"images; alignment and uniformity on two views, as in training, of {NUM_PAIRS} test images."
)


@dataclass(frozen=True)
class PictureSettings:
    """Which pictures are made.

    Attributes:
        layers: Layers, as :class:`~fastclr.evaluation.layers.Layers` names them.
        methods: Keys of :data:`~fastclr.evaluation.projection_2d.METHODS`.
        num_points: Test images in a map.
        seed: Seed of the maps and of the linear probe's split.
    """

    layers: tuple[str, ...]
    methods: tuple[str, ...]
    num_points: int
    seed: int


def settings_of(subject: Subject) -> PictureSettings:
    """Return a subject's settings; what they leave open is what this machine has."""
    options = subject.options
    return PictureSettings(
        layers=chosen_layers(subject),
        methods=options.maps or installed_methods(),
        num_points=min(options.map_points, len(subject.test)),
        seed=options.seed,
    )


def chosen_layers(subject: Subject) -> tuple[str, ...]:
    """Return the layers that were asked for; h and z by default.

    Raises:
        ConfigError: If the model has no such layer.
    """
    model, wanted = subject.model, subject.options.layers or (H, _projection(subject))
    return tuple(Layers(model.encoder, model.projection_head, wanted).names)


def _projection(subject: Subject) -> str:
    """Return the layer that is z; h itself where there is no head."""
    return Layers(subject.model.encoder, subject.model.projection_head).names[-1]


def installed_methods() -> tuple[str, ...]:
    """Return t-SNE, by openTSNE where that is installed, and UMAP where it is."""
    has = {name: importlib.util.find_spec(name) is not None for name in ("openTSNE", "umap")}
    return ("opentsne" if has["openTSNE"] else "tsne", *(("umap",) if has["umap"] else ()))


def make(subject: Subject) -> Pictures:
    """Make a run's pictures and keep them in its folder.

    Args:
        subject: The run; the features at its layers are taken already.

    Raises:
        ConfigError: If a method is unknown or not installed.
        FloatingPointError: If a feature is not finite.
        ShardError: If data is damaged.
    """
    settings = settings_of(subject)
    train, test = subject.layer_features(settings.layers)
    row_N = _rows(len(subject.test), settings.num_points)
    label_N = subject.test.label_N[row_N]
    query_Q = spread_queries(label_N, NUM_QUERIES)
    # What may not be installed comes first.
    maps = {name: _maps(subject, name, test[name], row_N, settings) for name in settings.layers}
    near = {
        name: _nearest(subject, name, train[name], test[name], row_N[query_Q])
        for name in settings.layers
    }
    found_M = np.unique(np.concatenate([row_QK.ravel() for _, row_QK in near.values()]))
    views = _views(subject, settings.layers)
    layers = {}
    for name in settings.layers:
        subject.say(f"{name}: spectrum and numbers")
        similarity_QK, row_QK = near[name]
        numbers = spectra.numbers(test[name].h_XF[row_N], label_N, views[name])
        layers[name] = LayerPictures(
            points=maps[name],
            near_QK=np.searchsorted(found_M, row_QK),
            similarity_QK=similarity_QK,
            spectrum_F=spectra.covariance_spectrum(test[name].h_XF),
            numbers={k: v if np.isfinite(v) else None for k, v in numbers._asdict().items()},
        )
    facts, confusion_CC = _linear(subject, settings.seed)
    pictures = Pictures(
        facts=facts,
        image_NHWC=_thumbnails(subject, subject.test, row_N),
        label_N=label_N,
        query_Q=query_Q,
        found_MHWC=_thumbnails(subject, subject.train, found_M),
        found_label_M=subject.train.label_N[found_M],
        layers=layers,
        weights=spectra.weight_spectra(cast(nn.Module, subject.model.projection_head)),
        confusion_CC=confusion_CC,
    )
    save(subject.run_dir, pictures)
    return pictures


def _rows(num_images: int, most: int) -> Int64:
    """Return rows from all over the set: others' tars may be sorted by class."""
    return np.linspace(0, num_images - 1, min(num_images, most)).round().astype(np.int64)


def _maps(
    subject: Subject, name: str, test: Features, row_N: Int64, settings: PictureSettings
) -> dict[str, np.ndarray]:
    """Return a layer's positions by method."""
    found = {}
    for method in settings.methods:
        subject.say(f"{name}: {projection_2d.NAMES.get(method, method)} of {len(row_N)} images")
        found[method] = projection_2d.embed(
            test.h_XF[row_N], method, seed=settings.seed, max_points=len(row_N)
        )
    return found


def _nearest(
    subject: Subject, name: str, train: Features, test: Features, query_Q: Int64
) -> tuple[np.ndarray, Int64]:
    """Return similarities and rows of the training images nearest to some test images."""
    subject.say(f"{name}: nearest neighbours of {len(query_Q)} images")
    queries = Features(test.h_XF[query_Q], test.label_X[query_Q])
    impl = subject.options.neighbours_by
    return knn.nearest(train, queries, NUM_NEAREST, impl=impl, device=subject.device)


@torch.no_grad()
def _views(subject: Subject, layers: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the layers' features of two views, as in training, of some test images."""
    subject.say("two views of test images")
    config, model = subject.config, subject.model
    exact = all(policy.colour_model == "exact" for policy in data_sets.policies_of(config))
    backend = "threads" if exact else config.data.backend
    num_images = min(NUM_PAIRS, len(subject.test))
    batch = data_sets.first_batch(config, subject.test, backend, num_images, World())
    seen = Layers(model.encoder, model.projection_head, layers)
    parts: list[dict[str, torch.Tensor]] = [
        seen(images_NCHW.to(subject.device).float() / 255)
        for images_NCHW in batch.views_VBCHW.flatten(0, 1).split(256)
    ]
    return {name: torch.cat([part[name].float().cpu() for part in parts]) for name in layers}


def _linear(subject: Subject, seed: int) -> tuple[dict[str, Any], Int64]:
    """Return what the pictures are of, and the confusions of the linear probe on h."""
    subject.say("confusions of the linear probe")
    train, test = subject.features
    score, answer_X = linear.linear_answers(train, test, seed=seed)
    names = subject.train.class_names
    facts = {
        "checkpoint": subject.checkpoint.name,
        "class_names": names,
        "z": _projection(subject),
        "linear": linear.PROTOCOL,
        "linear_top1": score.top1,
        "num_train": len(subject.train),
        "num_test": len(subject.test),
    }
    return facts, confusion(test.label_X, answer_X, len(names))


def _thumbnails(subject: Subject, shard_set: data_sets.DataSet, rows: Int64) -> np.ndarray:
    """Return images as the encoder sees them, uint8 (n, H, W, 3), shrunk if they are large."""
    images = torch.cat([part for part, _ in subject.images(shard_set).plain(rows)])
    image_NHWC = images.permute(0, 2, 3, 1).numpy()
    if image_NHWC.shape[1] <= THUMBNAIL:
        return np.ascontiguousarray(image_NHWC)
    size = (THUMBNAIL, THUMBNAIL)
    return np.stack([np.asarray(Image.fromarray(i).resize(size)) for i in image_NHWC])
