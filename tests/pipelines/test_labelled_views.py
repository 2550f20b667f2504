"""Crops and flips of chosen images: the same whatever the batch, labels beside their images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.augment_reference import augment
from pipelines.evaluation_views import evaluation_batches
from pipelines.labelled_views import centres, crops_and_flips
from pipelines.photos import write_photo_tiles
from pipelines.policy import SimCLRPolicy
from pipelines.shards import ShardSet
from pipelines.writer import write_shards


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("photos")
    write_photo_tiles(folder / "images", train_per_photo=6, test_per_photo=1)
    return write_shards(folder / "images" / "train", folder / "train")


def views(shard_set: ShardSet, epoch: int, batches, **settings):
    batches = [np.array(batch) for batch in batches]
    return list(crops_and_flips(shard_set, 16, epoch, batches, **settings))


def test_the_batch_does_not_matter_and_labels_stay_with_images(shard_set: ShardSet) -> None:
    ids = [5, 3, 80, 7, 7]
    (whole, label_N), *_ = views(shard_set, 2, [ids], num_threads=2)
    assert whole.shape == (5, 3, 16, 16) and whole.dtype == torch.uint8
    assert label_N.tolist() == shard_set.label_N[ids].tolist() and torch.equal(whole[3], whole[4])
    parts = views(shard_set, 2, [ids[:1], ids[1:2], ids[2:]])
    assert [len(label_N) for _, label_N in parts] == [1, 1, 3]
    assert torch.equal(torch.cat([images for images, _ in parts]), whole)
    many = list(range(90))
    (of_chunks, _), *_ = views(shard_set, 2, [many])
    assert torch.equal(of_chunks[[5, 3, 80, 7, 7]], whole)


def test_epochs_and_seeds_have_crops_of_their_own(shard_set: ShardSet) -> None:
    first = views(shard_set, 0, [range(20)])[0][0]
    for settings in ({"epoch": 1}, {"epoch": 0, "seed": 1}):
        other = views(shard_set, batches=[range(20)], **settings)[0][0]
        assert (first != other).flatten(1).any(1).all()


def test_they_are_crops_and_flips_alone(shard_set: ShardSet) -> None:
    ids = np.arange(24)
    policy = SimCLRPolicy(size=16, jitter_prob=0, grayscale_prob=0, blur_prob=0)
    sizes_N2 = shard_set.sizes(ids)
    params = policy.draw(seed=7, epoch=3, positions=ids, view=2, sizes_N2=sizes_N2)
    expected = augment([shard_set[int(i)] for i in ids], params, policy).permute(0, 3, 1, 2)
    found = views(shard_set, 3, [ids], seed=7)[0][0]
    assert (found.int() - expected.int()).abs().max() <= 1
    assert not params.jitter_N.any() and not params.gray_N.any() and not params.blur_N.any()
    assert 0.2 < params.flip_N.mean() < 0.8


def test_centres_are_the_evaluations_in_any_order(shard_set: ShardSet) -> None:
    images, labels = map(torch.cat, zip(*evaluation_batches(shard_set, 16), strict=True))
    ids = np.array([90, 1, 44, 1, 0])
    found = list(centres(shard_set, 16, ids, batch_size=2))
    assert [len(label_N) for _, label_N in found] == [2, 2, 1]
    assert torch.equal(torch.cat([part for part, _ in found]), images[ids])
    assert torch.equal(torch.cat([part for _, part in found]), labels[ids])
