"""Linear evaluation as in the SimCLR paper: a classifier trained by SGD on views of the images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastclr.config import ConfigError
from fastclr.evaluation.draws import Int64, epoch_batches
from fastclr.evaluation.features import Features, check_pair, refuse_non_finite
from fastclr.evaluation.linear import check_labels
from fastclr.evaluation.scoring import metric as metric_by_name
from fastclr.optim.schedules import Schedule, scaled_learning_rate

RATE, MOMENTUM = 0.1, 0.9  # the rate is for 256 images


@dataclass(frozen=True)
class SGDSettings:
    """How a linear classifier is trained.

    Attributes:
        epochs: Times each training image is seen.
        batch_size: Images in a step; all of them if there are fewer.
        rate: Peak learning rate for 256 images; in proportion to the batch.
        seed: Seed of the order of images.
    """

    epochs: int = 90
    batch_size: int = 4096
    rate: float = RATE
    seed: int = 0


# The paper's for ImageNet (B.6), and its authors' commands for images of at most 64 pixels. Their
# epochs are for 50,000 images and more: on a few thousand the classifier is far from its optimum.
LARGE_IMAGES, SMALL_IMAGES = SGDSettings(), SGDSettings(epochs=100, batch_size=512)
PROTOCOL = (
    "Linear classifier from zero on the frozen encoder (BatchNorm with running statistics): SGD "
    f"with Nesterov momentum {MOMENTUM}, rate {RATE} * batch / 256 with a cosine to 0, no warm-up, "
    "no weight decay, on random crops and flips; scored on un-augmented images. Chen et al. 2020, "
    "B.6."
)

# Features of one batch's views, float (n, F), and int64 labels (n,).
FeatureBatches = Iterable[tuple[torch.Tensor, torch.Tensor]]


class SGDProbe(NamedTuple):
    """Result of the probe.

    Attributes:
        score: Test score in the metric, 0..1.
        answer_X: int64 answers to the test images.
        losses: Mean cross-entropy of each epoch.
    """

    score: float
    answer_X: Int64
    losses: tuple[float, ...]


def sgd_probe(
    train_batches: Callable[[int], FeatureBatches],
    train_label_X: Int64,
    test: Features,
    settings: SGDSettings,
    *,
    metric: str = "top1",
    device: torch.device = torch.device("cpu"),  # noqa: B008
    progress: Callable[[int], object] = lambda _: None,
) -> SGDProbe:
    """Train the classifier on batches of features and score it; see :data:`PROTOCOL`.

    Args:
        train_batches: Given an epoch from 0, the features of its views, in batches as
            :func:`~fastclr.evaluation.draws.epoch_batches` makes them: :func:`cached_views`, or
            :func:`encoded` on the fly.
        train_label_X: Labels of the training images.
        test: Labelled features of un-augmented images.
        settings: Epochs, batch and rate.
        metric: Key of :data:`~fastclr.evaluation.scoring.METRICS`.
        device: Where the classifier is trained.
        progress: Told every finished epoch.

    Raises:
        ConfigError: If labels are missing, too few or of one class.
        FloatingPointError: If a feature or the loss is not finite.
    """
    check_pair(test, test)
    check_labels(train_label_X)
    known_C = np.unique(train_label_X)
    classifier = zero_linear(test.h_XF.shape[1], len(known_C)).to(device)
    trainer = _Trainer(classifier, known_C, len(train_label_X), settings)
    losses = []
    for epoch in range(settings.epochs):
        losses.append(trainer.epoch(train_batches(epoch)))
        progress(epoch)
    with torch.inference_mode():
        parts = [
            classifier(torch.from_numpy(np.array(block)).to(device)).argmax(1).cpu()
            for block in np.array_split(test.h_XF, -(-len(test.h_XF) // 8192))
        ]
    answer_X = known_C[torch.cat(parts).numpy()]
    return SGDProbe(metric_by_name(metric)(answer_X, test.label_X), answer_X, tuple(losses))


def cached_views(
    views: Sequence[Features], settings: SGDSettings
) -> Callable[[int], FeatureBatches]:
    """Return batches of features that were taken before: epoch e sees view e modulo their number.

    On the fly every epoch has crops of its own; here an image has as many as there are views, and
    one view is no augmentation. The encoder runs V times instead of once an epoch.

    Args:
        views: Features of the same images in the same order, each in other crops and flips.
        settings: Batch and seed.

    Raises:
        ConfigError: If the views are not of the same images.
        FloatingPointError: If a feature is not finite.
    """
    for view in views:
        if not np.array_equal(view.label_X, views[0].label_X):
            raise ConfigError(
                "the cached views are of other images, or in another order: give views of the same."
            )
        refuse_non_finite(view.h_XF, "a cached view")

    def batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        h_XF, label_X = views[epoch % len(views)]
        for rows in epoch_batches(len(label_X), settings.batch_size, settings.seed, epoch):
            yield torch.from_numpy(h_XF[rows]), torch.from_numpy(label_X[rows])

    return batches


def encoded(
    encoder: nn.Module,
    views: Callable[[int, Sequence[Int64]], FeatureBatches],
    num_images: int,
    settings: SGDSettings,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Callable[[int], FeatureBatches]:
    """Return batches of features taken on the fly, from views that every epoch draws anew.

    Args:
        encoder: Maps float images in 0..1 to features, on ``device``; runs in evaluation mode.
        views: Given an epoch and the images of its batches: uint8 views (n, 3, H, W) and labels.
        num_images: Training images.
        settings: Batch and seed.
        device: Where the encoder is.
    """

    def batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        encoder.eval()
        rows = epoch_batches(num_images, settings.batch_size, settings.seed, epoch)
        for images_NCHW, label_N in views(epoch, rows):
            with torch.no_grad():  # not around the yield: the classifier is trained there
                h_NF = encoder(images_NCHW.to(device).float() / 255)
            yield h_NF, label_N

    return batches


def zero_linear(feature_dim: int, num_classes: int) -> nn.Linear:
    """Return a linear layer of zeros, as the authors' classifiers start."""
    layer = nn.Linear(feature_dim, num_classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class _Trainer:
    """Trains a classifier for as many epochs as the settings say."""

    def __init__(
        self, classifier: nn.Linear, known_C: Int64, num_images: int, settings: SGDSettings
    ) -> None:
        batch_size = min(settings.batch_size, num_images)
        self._classifier, self._known_C = classifier, torch.from_numpy(known_C)
        self._rate = scaled_learning_rate(settings.rate, batch_size, "linear")
        self._steps = settings.epochs * -(-num_images // batch_size)
        self._schedule, self._step = Schedule(0, "cosine"), 0
        self._optimizer = torch.optim.SGD(
            classifier.parameters(), self._rate, momentum=MOMENTUM, nesterov=True
        )

    def epoch(self, batches: FeatureBatches) -> float:
        """Take an epoch's steps; return the mean loss."""
        total, count = 0.0, 0
        for h_NF, label_N in batches:
            device = self._classifier.weight.device
            class_N = torch.searchsorted(self._known_C, label_N.contiguous()).to(device)
            rate = self._rate * self._schedule.factor(self._step, self._steps)
            self._optimizer.param_groups[0]["lr"] = rate
            loss = F.cross_entropy(self._classifier(h_NF.to(device).float()), class_N)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            self._step += 1
            total, count = total + loss.item() * len(class_N), count + len(class_N)
        mean = total / max(count, 1)
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the linear classifier's loss is {mean} at step {self._step}: a feature is not "
                f"finite, or the features are too large for rate {self._rate:g}. Lower the rate, "
                "or take the L-BFGS protocol, which has none."
            )
        return mean
