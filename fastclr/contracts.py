"""What the trainer needs of others, and what it gives back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from fastclr.batch import Batch


class BatchSource(Protocol):
    """What the trainer needs of a loader: endless batches and an exact position.

    Attributes:
        micro_batch_size: Images of this rank in a batch.
        batches_per_epoch: Batches in an epoch, on every rank.
        wait_seconds: Time spent waiting for batches so far.
        num_views: Views V of each image.
        num_damaged: Damaged samples this rank has replaced so far.
    """

    micro_batch_size: int
    batches_per_epoch: int
    wait_seconds: float

    @property
    def num_views(self) -> int: ...  # noqa: D102

    @property
    def num_damaged(self) -> int: ...  # noqa: D102

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the current position on, without end."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch handed out."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after a position; refuse one of other data."""
        ...


class Evaluation(Protocol):
    """Scores the encoder while it is trained; see :mod:`fastclr.evaluation.online`."""

    def check(self) -> None:
        """Refuse data that cannot be scored, before any device is touched."""
        ...

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Return the same scores on every rank, ``knn_top1`` among them; changes nothing."""
        ...


@dataclass(frozen=True)
class Summary:
    """What a finished run was.

    Attributes:
        steps: Optimizer steps.
        images: Source images seen over all ranks; each gave two views.
        epochs: The same in epochs.
        training_seconds: Time in training over all starts, without the next two.
        checkpoint_seconds: Time of this start spent in saving.
        evaluation_seconds: Time of this start spent in online evaluation.
        program_seconds: Time of the last start, from the trainer's creation.
        images_per_second: images / training_seconds.
        data_wait_fraction: Part of this start's training time spent waiting for the loader.
        num_ranks: Processes.
        skipped_steps: Batches left out because their loss was not finite.
        damaged_samples: Damaged samples replaced in this start, each counted once on every rank
            that met it.
        checkpoint: Folder of the last checkpoint.
    """

    steps: int
    images: int
    epochs: float
    training_seconds: float
    checkpoint_seconds: float
    evaluation_seconds: float
    program_seconds: float
    images_per_second: float
    data_wait_fraction: float
    num_ranks: int
    skipped_steps: int
    damaged_samples: int
    checkpoint: str
