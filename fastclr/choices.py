"""What ``fastclr pretrain`` chooses for images and a machine: recipe, size, batch."""

from __future__ import annotations

from typing import NamedTuple

from fastclr.config import ConfigError
from fastclr.recipes import RECIPES

LEAST_BATCH = 16  # images; with fewer there is too little to contrast with
BATCHES_AN_EPOCH = 4  # or more, where the batch can be made smaller for it
WARMUP_STEPS, SAVE_STEPS = 50, 200  # or more
SMALL = 48  # pixels: images of CIFAR's and Tiny ImageNet's kind
QUICK_NUMBERS = 200_000_000  # of pixels; CIFAR-10's 50,000 x 3,072 take a probe two minutes

# Images of a rank's batch. The GPU's are small enough for 24 GiB by what the layers keep; none of
# these runs has been made on one.
MOST_OF_A_RANK = {"cifar10-cpu": 256, "cifar10-paper": 512, "simclr-v1-paper": 64}


class Machine(NamedTuple):
    """What trains.

    Attributes:
        on_cuda: Whether it has GPUs.
        num_ranks: Processes.
        free_bytes: Free memory of the host.
    """

    on_cuda: bool
    num_ranks: int
    free_bytes: int


class Choice(NamedTuple):
    """How it is trained.

    Attributes:
        recipe: Key of ``RECIPES``.
        size: Side of the views in pixels.
        batch: Images of the contrastive batch.
        shorter_side: What larger images are shrunk to when they are packed; None for no change.
        in_memory: Whether the decoded images are kept.
        warmup_epochs: Epochs over which the rate rises.
        save_every: Steps between checkpoints.
        protocols: Of the scores.
    """

    recipe: str
    size: int
    batch: int
    shorter_side: int | None
    in_memory: bool
    warmup_epochs: int
    save_every: int
    protocols: tuple[str, ...]


def choose(num_images: int, side: int, machine: Machine) -> Choice:
    """Choose a recipe and what of it depends on the data.

    A CPU takes views of 64 pixels of photographs, and of 32 of small images; a GPU 224 and 32.
    Photographs are packed at two and a half times the side of a view: of the smallest crops, 8 % of
    the area, that leaves 70 % of the pixels a view has on a side.

    Args:
        num_images: Images to train on.
        side: Middle of their shorter sides in pixels.
        machine: What trains.

    Raises:
        ConfigError: If there are fewer images than a batch needs.
    """
    is_small = side <= SMALL
    recipe = "cifar10-paper" if is_small else "simclr-v1-paper"
    recipe = recipe if machine.on_cuda else "cifar10-cpu"
    size = 32 if is_small else 224 if machine.on_cuda else 64
    batch = _batch(num_images, machine.num_ranks, MOST_OF_A_RANK[recipe])
    batches = num_images // batch
    packed = 5 * size // 2
    shrinks = side > packed * 1.5
    num_pixels = num_images * (packed if shrinks else side) ** 2 * 1.5  # photographs are 3:2
    is_quick = num_images * 3 * size**2 <= QUICK_NUMBERS
    warmup = RECIPES[recipe]().optimizer.warmup_epochs
    return Choice(
        recipe,
        size,
        batch,
        packed if shrinks else None,
        # DALI decodes by itself, on the device.
        in_memory=not machine.on_cuda and 3 * num_pixels < machine.free_bytes / 8,
        warmup_epochs=max(int(warmup), -(-WARMUP_STEPS // batches)),
        save_every=max(batches, SAVE_STEPS),
        protocols=("quick",) if is_quick else ("ridge", "knn"),
    )


def _batch(num_images: int, num_ranks: int, most_of_a_rank: int) -> int:
    """Return the largest power of two a rank that leaves enough batches an epoch."""
    own = most_of_a_rank
    while own * num_ranks * BATCHES_AN_EPOCH > num_images and own * num_ranks >= 2 * LEAST_BATCH:
        own //= 2
    own = max(1, own)
    if own * num_ranks > num_images:
        raise ConfigError(
            f"there are {num_images} images to train on and the smallest batch is "
            f"{own * num_ranks}: an image is told from the others of its batch. Add images, "
            "thousands to learn something."
        )
    return own * num_ranks
