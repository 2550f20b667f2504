"""Evaluation sees every image once, in order; the authors' centre crop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastclr.world import World
from pipelines.evaluation_views import evaluation_batches
from pipelines.shards import ShardSet


@pytest.mark.parametrize("batch_size", [1, 8, 21, 256])
def test_evaluation_sees_every_image_once_in_order(shard_set: ShardSet, batch_size: int) -> None:
    batches = list(evaluation_batches(shard_set, 16, batch_size))
    full, rest = divmod(21, batch_size)
    assert [len(x) for x, _ in batches] == [batch_size] * full + [rest] * (rest > 0)
    x_NCHW, label_N = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert x_NCHW.shape == (21, 3, 16, 16) and x_NCHW.dtype == torch.uint8
    assert label_N.dtype == torch.int64 and label_N.tolist() == shard_set.label_N.tolist()
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)
    ((whole, _),) = evaluation_batches(shard_set, 16, 21)
    assert torch.equal(x_NCHW, whole)


@pytest.mark.parametrize("limit", [None, 1, 2, 13, 21, 99])
@pytest.mark.parametrize("ranks", [2, 3, 5, 30])
def test_the_ranks_together_evaluate_every_image_once_in_order(
    shard_set: ShardSet, ranks: int, limit: int | None
) -> None:
    whole = list(evaluation_batches(shard_set, 16, 21, limit=limit))
    x_NCHW, label_N = (torch.cat(parts) for parts in zip(*whole, strict=True))
    assert len(label_N) == min(limit or 21, 21)
    parts = [
        list(evaluation_batches(shard_set, 16, 2, World(r, ranks, r, ranks), limit))
        for r in range(ranks)
    ]
    sizes = [sum(len(labels) for _, labels in part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    batches = [batch for part in parts for batch in part]
    assert torch.equal(torch.cat([x for x, _ in batches]), x_NCHW)
    assert torch.cat([y for _, y in batches]).tolist() == label_N.tolist()


def test_a_rank_reads_its_own_part_only(picture: Any) -> None:
    class Noted(list):
        def labels(self, sample_ids: Any) -> Any:
            return np.zeros(len(sample_ids), np.int64)

        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return super().__getitem__(index)

    read: list[int] = []
    images = Noted([picture(16, 16, k) for k in range(11)])
    list(evaluation_batches(images, 16, 3, World(1, 3, 1, 3), limit=10))  # type: ignore[arg-type]
    assert read == [3, 4, 5]


def evaluated(pixels: np.ndarray, size: int) -> np.ndarray:
    """The view of one image; a list is as good as a shard set."""

    class One(list):
        def labels(self, sample_ids: Any) -> Any:
            return np.zeros(len(sample_ids), np.int64)

    ((x_NCHW, _),) = evaluation_batches(One([pixels]), size)  # type: ignore[arg-type]
    return x_NCHW[0].permute(1, 2, 0).numpy()


def test_evaluation_of_small_sizes_is_the_centre(picture: Any) -> None:
    image = picture(32, 32)
    assert np.array_equal(evaluated(image, 32), image)
    wide = picture(32, 48)
    assert np.array_equal(evaluated(wide, 32), wide[:, 8:40])
    tall = picture(50, 32)
    assert np.array_equal(evaluated(tall, 32), tall[9:41])


@pytest.mark.parametrize(("height", "width"), [(70, 70), (96, 96), (120, 96), (1, 9)])
def test_evaluation_above_64_pixels_crops_seven_eighths(
    picture: Any, height: int, width: int
) -> None:
    image = picture(height, width)
    scale = 110 / min(height, width)
    resized = Image.fromarray(image).resize(
        (round(width * scale), round(height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (resized.width - 96) // 2, (resized.height - 96) // 2
    expected = np.array(resized.crop((left, top, left + 96, top + 96)))
    assert np.array_equal(evaluated(image, 96), expected)
