"""Tiny labelled images in memory, and a tiny encoder, for the tests of fine-tuning and transfer."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import nn

from fastclr.evaluation.finetune import LabelledImages

SIDE, FEATURES = 6, 12


def tiles(num_images: int, seed: int, classes: int = 3, noise: float = 40.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    patterns = np.random.default_rng(0).uniform(60, 200, (classes, 3, SIDE, SIDE))
    images = patterns[np.arange(num_images) % classes]
    images = images + noise * rng.normal(size=images.shape)
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8))


def labelled(name: str, num_images: int, seed: int, classes: int = 3, noise: float = 40.0):
    """Return images whose label is twice their class; a view is the image, at times flipped."""
    images = tiles(num_images, seed, classes, noise)
    label_X = np.arange(num_images) % classes * 2

    def views(epoch, batches):
        for rows in batches:
            flipped = images[rows].flip(3) if epoch % 7 == 6 else images[rows]
            yield flipped, torch.from_numpy(label_X[rows])

    def plain(rows):
        for batch in np.array_split(rows, -(-len(rows) // 50)):
            yield images[batch], torch.from_numpy(label_X[batch])

    return LabelledImages(name, label_X, views, plain)


def encoder(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, FEATURES)
    )


def head() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(FEATURES, 20, bias=False), norm1=nn.BatchNorm1d(20), relu1=nn.ReLU(),
            fc2=nn.Linear(20, 16, bias=False), norm2=nn.BatchNorm1d(16), relu2=nn.ReLU(),
            fc3=nn.Linear(16, 4, bias=False),
        )
    )  # fmt: skip
