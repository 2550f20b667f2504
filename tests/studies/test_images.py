"""The images of a study: the first ones, of a set that says so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastclr.config import ConfigError, DataConfig
from fastclr.data_sets import open_data
from fastclr.studies.images import First, open_images, with_target
from fastclr.studies.scales import TOY
from pipelines.writer import write_shards


def test_only_the_first_images_are_there(toy, images):
    whole = open_data(str(toy.train), DataConfig())
    assert (len(whole), len(images.train), len(images.test)) == (128, 96, 64)
    assert all((images.train[i] == whole[i]).all() for i in (0, 50, 95))
    assert images.class_names == whole.class_names
    ids = images.train.order(0).ids(0, 0, 96)
    assert sorted(ids.tolist()) == list(range(96))
    assert (ids != images.train.order(0).ids(1, 0, 96)).any()


def test_the_number_of_images_is_a_part_of_what_they_are(toy):
    whole = open_data(str(toy.train), DataConfig())
    assert First(whole, 96).digest != First(whole, 64).digest != whole.digest


def test_how_they_were_packed_is_not(toy, images, tmp_path):
    source = toy.train.parent / "images"
    for split in ("train", "test"):
        write_shards(source / split, tmp_path / split, samples_per_shard=50)
    again = open_images(str(tmp_path / "train"), str(tmp_path / "test"), TOY)
    assert again.facts == images.facts
    write_shards(source / "train", tmp_path / "other", seed=1)
    other = open_images(str(tmp_path / "other"), str(tmp_path / "test"), TOY)
    assert other.facts["train"] != images.facts["train"]


def test_batches_are_all_images_in_order(images):
    parts = list(images.batches(images.test))
    assert torch.equal(torch.cat([label for _, label in parts]).int(),
                       torch.from_numpy(images.test.labels(np.arange(64))).int())  # fmt: skip
    assert parts[0][0].shape == (64, 3, 32, 32)
    assert len(next(iter(images.batches(images.test, 10)))[1]) == 10


def test_another_set_is_a_part_of_what_results_depend_on(images, toy):
    other = with_target(images, (str(toy.test), str(toy.train)), TOY)
    assert [len(of) for of in other.target] == [64, 64]  # all there are, and the scale's
    assert {k: v for k, v in other.facts.items() if k != "target"} == images.facts
    assert len(set(other.facts["target"])) == 2
    with pytest.raises(ConfigError, match="behind --transfer"):
        with_target(images, None, TOY)


def test_too_few_images_are_refused(toy):
    with pytest.raises(ConfigError, match="has 64 images and this scale takes 65"):
        open_images(str(toy.train), str(toy.test), replace(TOY, num_test=65))
