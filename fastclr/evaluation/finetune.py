"""Fine-tuning: the whole network, from the encoder or a middle layer of the head."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastclr.config import ConfigError
from fastclr.evaluation.draws import Int64, epoch_batches
from fastclr.evaluation.linear_sgd import zero_linear
from fastclr.optim.schedules import Schedule, scaled_learning_rate

RATE, MOMENTUM = 0.05, 0.9
PROTOCOL = (
    f"All weights of encoder and classifier (from zero) by SGD with Nesterov momentum {MOMENTUM}, "
    f"rate {RATE} * batch / 256 with a cosine to 0, no warm-up, no weight decay, random crops and "
    "flips alone; BatchNorm in training mode; scored on un-augmented images. Chen et al. 2020, B.5."
)

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class LabelledImages:
    """Labelled images that a network is tuned and scored on.

    Attributes:
        name: What messages call them, such as a path.
        label_X: int64 labels of all images.
        views: Given an epoch and the images of each of its batches: uint8 views (n, 3, H, W),
            crops and flips drawn for that epoch, and int64 labels, a batch each.
        plain: Given images: uint8 un-augmented ones and labels, in order, in batches.
    """

    name: str
    label_X: Int64
    views: Callable[[int, Sequence[Int64]], Batches]
    plain: Callable[[Int64], Batches]


@dataclass(frozen=True)
class FinetuneSettings:
    """How a network is tuned.

    Attributes:
        epochs: Times each image is seen; 0 where ``steps`` says how long.
        batch_size: Images in a step; all of them if there are fewer.
        rate: Peak learning rate for 256 images; in proportion to the batch.
        weight_decay: L2 penalty of all weights times the peak rate, as in Kornblith et al. 2019:
            its effect does not change with the rate.
        steps: Steps instead of epochs.
        adapt_batch_norm: Momentum of BatchNorm max(1 - 10 / steps of an epoch, 0.9), for small
            sets, instead of the encoder's own.
        seed: Seed of the order of images.
    """

    epochs: int = 30
    batch_size: int = 4096
    rate: float = RATE
    weight_decay: float = 0.0
    steps: int = 0
    adapt_batch_norm: bool = False
    seed: int = 0

    def problems(self) -> list[str]:
        """Say what cannot work."""
        found = []
        if (self.epochs > 0) == (self.steps > 0):
            found.append(
                f"{self.epochs} epochs and {self.steps} steps: give one of them, the other 0."
            )
        if self.batch_size < 2:
            found.append(f"a batch of {self.batch_size}: BatchNorm needs 2 images or more.")
        if not (0 < self.rate < math.inf and 0 <= self.weight_decay < math.inf):
            found.append(f"rate {self.rate} and decay {self.weight_decay}: give numbers above 0.")
        return found


class Classifier(nn.Module):
    """A network and a linear layer of zeros behind it.

    Args:
        network: Maps float images in 0..1 to features (n, F).
        feature_dim: Width F.
        num_classes: Classes.
    """

    def __init__(self, network: nn.Module, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.network = network
        self.classifier = zero_linear(feature_dim, num_classes)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Return logits (n, C)."""
        return self.classifier(self.network(images_NCHW))


def with_head_layers(
    encoder: nn.Module, head: nn.Sequential, feature_dim: int, num_layers: int
) -> tuple[nn.Module, int]:
    """Return the encoder with the first layers of the projection head, and its width.

    SimCLRv2 (Chen et al. 2020b, section 3) tunes from a middle layer of the head: one layer is its
    linear map with the norm and the ReLU behind it.

    Args:
        encoder: Maps images to h; copied.
        head: Its projection head.
        feature_dim: Width of h.
        num_layers: Linear layers that are kept; 0 for the encoder alone.

    Raises:
        ConfigError: If the head has no so many layers.
    """
    starts = [i for i, module in enumerate(head) if isinstance(module, nn.Linear)]
    if not 0 <= num_layers <= len(starts):
        raise ConfigError(
            f"{num_layers} layers of the projection head are to be kept: it has {len(starts)}. "
            f"Give 0 to {len(starts)}."
        )
    if num_layers == 0:
        return copy.deepcopy(encoder), feature_dim
    kept = head[: [*starts, len(head)][num_layers]]
    width = [m.out_features for m in kept if isinstance(m, nn.Linear)][-1]
    return nn.Sequential(copy.deepcopy(encoder), copy.deepcopy(kept)), width


def finetune(
    model: Classifier,
    images: LabelledImages,
    rows: Int64,
    known_C: Int64,
    settings: FinetuneSettings,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    progress: Callable[[int], object] = lambda _: None,
) -> list[float]:
    """Train all weights in place on some images; see :data:`PROTOCOL`.

    Args:
        model: Network and classifier; moved to ``device``.
        images: Where the rows are from.
        rows: Images that are trained on.
        known_C: Labels in the order of the model's classes, rising.
        settings: Schedule.
        device: Where to train.
        progress: Told every finished epoch.

    Returns:
        Mean cross-entropy of each epoch.

    Raises:
        ConfigError: If a setting cannot work, or there are fewer than 2 images.
        FloatingPointError: If the loss is not finite.
    """
    problems = settings.problems()
    if len(rows) < 2:
        problems.append(f"{images.name}: {len(rows)} images to tune on; give 2 or more.")
    if problems:
        raise ConfigError("\n".join(problems))
    batch_size = min(settings.batch_size, len(rows))
    steps_per_epoch = -(-len(rows) // batch_size)
    total = settings.steps or settings.epochs * steps_per_epoch
    rate = scaled_learning_rate(settings.rate, batch_size, "linear")
    if settings.adapt_batch_norm:
        _set_batch_norm(model, steps_per_epoch)
    model.to(device).train()
    optimizer = torch.optim.SGD(
        model.parameters(),
        rate,
        momentum=MOMENTUM,
        weight_decay=settings.weight_decay / rate,
        nesterov=True,
    )
    losses, step, schedule = [], 0, Schedule(0, "cosine")
    for epoch in range(-(-total // steps_per_epoch)):
        batches = epoch_batches(len(rows), batch_size, settings.seed, epoch)[: total - step]
        loss_sum = torch.zeros((), device=device)
        for images_NCHW, label_N in images.views(epoch, [rows[batch] for batch in batches]):
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule.factor(step, total)
            class_N = torch.from_numpy(np.searchsorted(known_C, label_N.numpy())).to(device)
            loss = F.cross_entropy(model(images_NCHW.to(device).float() / 255), class_N)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach()
            step += 1
        losses.append(loss_sum.item() / len(batches))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(
                f"{images.name}: the loss is {losses[-1]} in epoch {epoch} of fine-tuning with "
                f"rate {rate:g}: give a lower rate."
            )
        progress(epoch)
    return losses


@torch.no_grad()
def answers(
    model: Classifier,
    images: LabelledImages,
    rows: Int64,
    known_C: Int64,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Int64:
    """Return the model's answers to un-augmented images, int64 labels."""
    model.to(device).eval()
    parts = [
        model(images_NCHW.to(device).float() / 255).argmax(1).cpu()
        for images_NCHW, _ in images.plain(rows)
    ]
    return known_C[torch.cat(parts).numpy()]


def _set_batch_norm(model: nn.Module, steps_per_epoch: int) -> None:
    """Let the running statistics follow a small set; torch's momentum is 1 minus the paper's."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = min(10 / steps_per_epoch, 0.1)
