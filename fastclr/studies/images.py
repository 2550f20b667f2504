"""The images of a study: the first of a training and of a test set, decoded once for all runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from fastclr import data_sets
from fastclr.config import ConfigError, DataConfig
from fastclr.data_sets import DataSet
from fastclr.studies.scales import Scale
from pipelines.decode import Pixels
from pipelines.evaluation_views import evaluation_range
from pipelines.image_set import ImageSet
from pipelines.memory import InMemory
from pipelines.order import BlockOrder, Int64

_MOST_IN_MEMORY = 100_000  # images; above, runs decode them each time
_MOST_HASHED = 10_000
_BLOCK = 256

Batches: TypeAlias = Iterator[tuple[torch.Tensor, torch.Tensor]]


class First:
    """The first images of another set, which are a sample of it where packing shuffled.

    Args:
        image_set: Images.
        num_images: How many; not more than there are.
    """

    def __init__(self, image_set: DataSet, num_images: int) -> None:
        self._set, self._num_images = image_set, num_images
        self.digest = self._digest()

    def _digest(self) -> str:
        """Hash what rows depend on: all labels, and the bytes of :data:`_MOST_HASHED` images.

        A manifest's hash would be another after every packing that is worded otherwise, and rows of
        the same images would be made anew.
        """
        digest = hashlib.sha256(self.labels(np.arange(len(self))).tobytes())
        for place in np.linspace(0, len(self) - 1, min(len(self), _MOST_HASHED)):
            digest.update(hashlib.sha256(self.read(int(place))).digest())
        return digest.hexdigest()

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, sample_id: int) -> Pixels:
        """Return a decoded image, uint8 (H, W, 3)."""
        return self._set[sample_id]

    def images(self, sample_ids: Int64) -> list[Pixels | None]:
        """Return images; None for each to be asked for by itself."""
        return self._set.images(sample_ids)

    def read(self, sample_id: int) -> bytes:
        """Return an encoded image."""
        return self._set.read(sample_id)

    def place(self, sample_id: int) -> str:
        """Name a sample for an error."""
        return self._set.place(sample_id)

    def sizes(self, sample_ids: Int64) -> npt.NDArray[np.int32]:
        """Return heights and widths in pixels, int32 (n, 2)."""
        return self._set.sizes(sample_ids)

    def labels(self, sample_ids: Int64) -> Int64:
        """Return labels, int64 (n,)."""
        return self._set.labels(sample_ids)

    def order(self, seed: int) -> BlockOrder:
        """Return a permutation of these images for each epoch."""
        return BlockOrder(np.array([self._num_images]), seed=seed)

    def prefetch(self, shards: list[int], tolerant: bool = False) -> None:
        """Take no hint: the shards of the other set are not those of this order."""


@dataclass(frozen=True)
class StudyImages:
    """What all runs of a study see.

    Attributes:
        train: Images that encoders learn from and probes are fitted on.
        test: Images that are scored.
        size: Side of the views in pixels.
        class_names: Names of the classes.
        target: Training and test images of another data set that encoders are carried to.
    """

    train: ImageSet
    test: ImageSet
    size: int
    class_names: list[str]
    target: tuple[ImageSet, ImageSet] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What a result depends on of them."""
        facts = {"train": self.train.digest, "test": self.test.digest, "size": self.size}
        return {**facts, "target": [s.digest for s in self.target]} if self.target else facts

    def batches(self, of: ImageSet, most: int | None = None) -> Batches:
        """Yield images as an evaluation sees them, uint8 (n, 3, size, size), and labels."""
        num_images = min(len(of), most or len(of))
        for start in range(0, num_images, _BLOCK):
            yield evaluation_range(of, self.size, start, min(start + _BLOCK, num_images))

    @cached_property
    def mean_and_std(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the training images' channels, in 0..1, each (3, 1, 1)."""
        total, squares, count = torch.zeros(3).double(), torch.zeros(3).double(), 0
        for images_NCHW, _ in self.batches(self.train):
            pixels = images_NCHW.double() / 255
            total += pixels.sum((0, 2, 3))
            squares += pixels.square().sum((0, 2, 3))
            count += pixels.numel() // 3
        mean = total / count
        std = (squares / count - mean.square()).sqrt()
        return mean.float().view(3, 1, 1), std.float().view(3, 1, 1)


def open_images(train: str, test: str, scale: Scale) -> StudyImages:
    """Open and decode the images of a scale.

    Args:
        train: Labelled shard set; see :func:`fastclr.data_sets.open_data`.
        test: Another of the same classes.
        scale: How many of each.

    Raises:
        ConfigError: If there are fewer, or labels are missing.
        ShardError: If the data is missing or damaged.
    """
    sets = data_sets.labelled_sets((train, test), DataConfig())
    wanted = (scale.num_train, scale.num_test)
    for found, number in zip(sets, wanted, strict=True):
        if len(found) < number:
            raise ConfigError(
                f"{found.path} has {len(found)} images and this scale takes {number}: rows of "
                "fewer images would not be comparable. Pack more, or choose another --scale."
            )
    kept = [_decoded(*pair) for pair in zip(sets, wanted, strict=True)]
    return StudyImages(kept[0], kept[1], scale.base.views.size, list(sets[0].class_names))


def with_target(images: StudyImages, target: tuple[str, str] | None, scale: Scale) -> StudyImages:
    """Add another labelled data set, as many of its images as there are of the first at most.

    Args:
        images: Of the study.
        target: Training and test shard set.
        scale: How many of each.

    Raises:
        ConfigError: If there is none, or labels are missing.
        ShardError: If the data is missing or damaged.
    """
    if target is None:
        raise ConfigError(
            "the study transfer goes to another data set: name its training and test shard set "
            "behind --transfer."
        )
    train, test = data_sets.labelled_sets(target, DataConfig())
    return replace(
        images, target=(_decoded(train, scale.num_train), _decoded(test, scale.num_test))
    )


def _decoded(found: DataSet, most: int) -> ImageSet:
    """Return the first images of a set, in memory if they are few."""
    first = First(found, min(most, len(found)))
    return InMemory(first) if len(first) <= _MOST_IN_MEMORY else first
