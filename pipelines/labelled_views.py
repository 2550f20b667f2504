"""Crops and flips of chosen labelled images: what classifiers are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from pipelines.augment_threads import Threads
from pipelines.evaluation_views import evaluation_rows
from pipelines.image_set import ImageSet
from pipelines.order import Int64
from pipelines.policy import SimCLRPolicy

_CHUNK = 64  # images a thread makes at a time


def crops_and_flips(
    shard_set: ImageSet,
    size: int,
    epoch: int,
    batches: Sequence[Int64],
    *,
    seed: int = 0,
    num_threads: int = 1,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield random crops, flipped half of the time, of given images, a batch each.

    An image's crop is a function of seed, epoch and image; the batch does not matter. The next
    batch is made while the last is used.

    Args:
        shard_set: Images.
        size: Side of the views in pixels.
        epoch: Epoch from 0.
        batches: Images of each batch.
        seed: Seed of the crops.
        num_threads: Threads that decode and crop.

    Yields:
        uint8 views (n, 3, size, size), channels-last in memory, and int64 labels (n,).

    Raises:
        DamagedSample: If an image is damaged.
    """
    policy = SimCLRPolicy(size=size, jitter_prob=0, grayscale_prob=0, blur_prob=0)
    augment = Threads([policy])

    def make(ids: Int64) -> torch.Tensor:
        sizes_N2 = shard_set.sizes(ids)
        # 2 keeps these crops apart from the two views of a pre-training with the same seed.
        params = policy.draw(seed=seed, epoch=epoch, positions=ids, view=2, sizes_N2=sizes_N2)
        return augment([shard_set[int(i)] for i in ids], [params])[0]

    with ThreadPoolExecutor(num_threads, thread_name_prefix="fastclr-crops") as pool:

        def start(ids: Int64) -> list[Future[torch.Tensor]]:
            return [pool.submit(make, ids[k : k + _CHUNK]) for k in range(0, len(ids), _CHUNK)]

        coming = [start(ids) for ids in batches[:1]]
        for number, ids in enumerate(batches):
            coming += [start(after) for after in batches[number + 1 : number + 2]]
            views_NHWC = torch.cat([part.result() for part in coming.pop(0)])
            yield views_NHWC.permute(0, 3, 1, 2), torch.from_numpy(shard_set.labels(ids))


def centres(
    shard_set: ImageSet, size: int, ids: Int64, batch_size: int = 256, num_threads: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield given images as an evaluation sees them, in the given order, with labels."""
    for batch in np.array_split(ids, -(-len(ids) // batch_size)):
        yield evaluation_rows(shard_set, size, batch, num_threads)
