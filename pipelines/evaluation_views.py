"""Images as an evaluation sees them: once each, in order, without augmentation."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from fastclr.world import World
from pipelines.decode import Pixels
from pipelines.image_set import ImageSet
from pipelines.order import Int64


def evaluation_batches(
    shard_set: ImageSet,
    size: int,
    batch_size: int = 256,
    world: World = World(),  # noqa: B008
    limit: int | None = None,
    num_threads: int = 1,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield every image of this rank's part once, in order, without augmentation.

    The authors' evaluation view: above 64 px the shorter side becomes size / 0.875, bicubic, then
    the centre is cropped; smaller images are resized but not cropped further.

    Args:
        shard_set: Images.
        size: Side of the square images in pixels.
        batch_size: Images in a batch; the last may hold fewer.
        world: Whose part: the ranks' parts, one after the other, are the images in order. They
            differ by one image at most, and may be empty.
        limit: Only the first so many images, which are a sample of all where packing shuffled.
        num_threads: Threads that decode.

    Yields:
        uint8 images (n, 3, size, size), channels-last in memory, and int64 labels (n,).
    """
    num_images = len(shard_set) if limit is None else min(limit, len(shard_set))
    start, stop = (num_images * (world.rank + k) // world.num_ranks for k in (0, 1))
    for first in range(start, stop, batch_size):
        yield evaluation_range(shard_set, size, first, min(first + batch_size, stop), num_threads)


def evaluation_range(
    shard_set: ImageSet, size: int, start: int, stop: int, num_threads: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images [start, stop), one or more, and labels, as :func:`evaluation_batches` does.

    Args:
        shard_set: Images.
        size: Side of the square images in pixels.
        start: First image.
        stop: After the last image.
        num_threads: Threads that decode.
    """
    return evaluation_rows(shard_set, size, np.arange(start, stop), num_threads)


def evaluation_rows(
    shard_set: ImageSet, size: int, ids: Int64, num_threads: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return chosen images, one or more, and labels, as :func:`evaluation_range` does."""

    def centre(sample_id: int) -> Pixels:
        return _centre(shard_set[sample_id], size)

    if num_threads > 1:
        with ThreadPoolExecutor(num_threads) as pool:
            images = list(pool.map(centre, ids.tolist()))
    else:
        images = [centre(sample_id) for sample_id in ids.tolist()]
    labels = shard_set.labels(ids)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(labels)


def _centre(image: Pixels, size: int) -> Pixels:
    """Resize the shorter side and crop the centre."""
    if image.shape[:2] == (size, size) and size <= 64:
        return image
    height, width = image.shape[:2]
    shorter = round(size / 0.875) if size > 64 else size
    scale = shorter / min(height, width)
    resized = Image.fromarray(image).resize(
        (max(size, round(width * scale)), max(size, round(height * scale))),
        Image.Resampling.BICUBIC,
    )
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return np.array(resized.crop((left, top, left + size, top + size)))
