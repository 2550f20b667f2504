"""Changes of views that no policy has: rotation, cutout, noise, Sobel; random by a hash.

They come after the augmentation, so every back-end can be used, and no number of it changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fastclr.batch import Batch
from fastclr.contracts import BatchSource
from pipelines.distortions import DISTORTIONS
from pipelines.order import Int64, hash64, uniforms

_SALT = 0x5649  # keeps the hashes apart from those of samples, views and noise
CUTOUT = 0.5  # side of the square in sides of the image; the paper does not publish its own
PROBABILITY = 0.5  # of noise and Sobel; likewise

# Uint8 views (n, 3, S, S), and a word of 63 random bits for each; a new tensor is returned.
Change = Callable[[torch.Tensor, Int64], torch.Tensor]


def _rotate(views_NCHW: torch.Tensor, word_N: Int64) -> torch.Tensor:
    """Turn by 0, 90, 180 or 270 degrees, equally often."""
    return _by_kind(
        views_NCHW, word_N, word_N % 4, ("original", "rotated 90", "rotated 180", "rotated 270")
    )


def _cutout(views_NCHW: torch.Tensor, word_N: Int64) -> torch.Tensor:
    """Blacken a square at a random place, of which the border may cut off a half."""
    side = views_NCHW.shape[-1]
    half = round(side * CUTOUT / 2)
    centre_N2 = (uniforms(_SALT, word_N[:, None], np.arange(2)) * side).astype(int)
    views = views_NCHW.clone()
    for view_CHW, (y, x) in zip(views, centre_N2.tolist(), strict=True):
        view_CHW[:, max(0, y - half) : y + half, max(0, x - half) : x + half] = 0
    return views


def _sometimes(name: str) -> Change:
    """Return a change by a distortion that is made with :data:`PROBABILITY`."""

    def change(views_NCHW: torch.Tensor, word_N: Int64) -> torch.Tensor:
        kind_N = (uniforms(_SALT, word_N) < PROBABILITY).astype(int)
        return _by_kind(views_NCHW, word_N, kind_N, ("original", name))

    return change


def _by_kind(
    views_NCHW: torch.Tensor, word_N: Int64, kind_N: Int64, names: Sequence[str]
) -> torch.Tensor:
    """Apply to each view the distortion of its kind."""
    views = views_NCHW.clone()
    for kind, name in enumerate(names):
        rows = np.flatnonzero(kind_N == kind)
        if len(rows) and name != "original":
            views[rows] = DISTORTIONS[name](views_NCHW[rows], word_N[rows])
    return views


CHANGES: dict[str, Change] = {
    "rotate": _rotate,
    "cutout": _cutout,
    "noise": _sometimes("noise"),
    "sobel": _sometimes("sobel"),
}


class ChangedViews:
    """A loader whose views are changed besides; see :class:`~fastclr.contracts.BatchSource`.

    A change is a function of seed, epoch, image and view alone: it depends neither on the batch nor
    on where a run was interrupted.

    Args:
        loader: Source of batches; its ``state_dict`` has the epoch of the last one.
        changes: For each view the names of its changes, in order: keys of :data:`CHANGES`.
        seed: Seed of the run.
    """

    def __init__(self, loader: BatchSource, changes: Sequence[Sequence[str]], seed: int) -> None:
        self._loader, self._changes, self._seed = loader, changes, seed
        self.micro_batch_size = loader.micro_batch_size
        self.batches_per_epoch = loader.batches_per_epoch
        self.wait_seconds = 0.0

    @property
    def num_views(self) -> int:
        """Views V of each image."""
        return self._loader.num_views

    @property
    def num_damaged(self) -> int:
        """Damaged samples replaced so far."""
        return self._loader.num_damaged

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch handed out."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after a position."""
        self._loader.load_state_dict(state)

    def __iter__(self) -> Iterator[Batch]:
        """Yield changed batches without end."""
        for batch in self._loader:
            self.wait_seconds = self._loader.wait_seconds
            yield self._changed(batch, self._loader.state_dict()["epoch"])

    def _changed(self, batch: Batch, epoch: int) -> Batch:
        """Change the views of a batch."""
        views = []
        for view, (views_NCHW, names) in enumerate(
            zip(batch.views_VBCHW, self._changes, strict=True)
        ):
            for place, name in enumerate(names):
                word_N = hash64(_SALT, self._seed, epoch, view, place, batch.sample_id_B.numpy())
                views_NCHW = CHANGES[name](views_NCHW, (word_N >> np.uint64(1)).astype(np.int64))
            views.append(views_NCHW.permute(0, 2, 3, 1))  # channels-last, as batches are
        views_VBCHW = torch.stack(views).permute(0, 1, 4, 2, 3)
        return dataclasses.replace(batch, views_VBCHW=views_VBCHW).check()
