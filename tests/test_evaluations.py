"""Shard sets and models composed to tables."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fastclr import evaluations
from fastclr.encoders import create
from fastclr.evaluation import forgetting
from fastclr.evaluation.features import extract
from fastclr.evaluation.layers import Layers
from fastclr.evaluations import features_of, forgetting_table, images_of, joined, layers_table
from fastclr.heads import mlp
from fastclr.simclr import SimCLR
from pipelines.distortions import DISTORTIONS
from pipelines.evaluation_views import evaluation_batches
from pipelines.photos import write_photo_tiles
from pipelines.shards import ShardSet
from pipelines.writer import write_shards


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ShardSet]]:
    folder = tmp_path_factory.mktemp("sets")
    write_photo_tiles(folder / "images", train_per_photo=4, test_per_photo=2)
    for name in ("train", "test"):
        write_shards(folder / "images" / name, folder / name)
    return [ShardSet.open(folder / name) for name in ("train", "test")]


@pytest.fixture(scope="module")
def model() -> SimCLR:
    torch.manual_seed(0)
    encoder = create("resnet10", 0.125, "small_stride2")
    return SimCLR(encoder, mlp(64, 32, 16))


def test_features_are_those_of_a_plain_pass(sets, model, tmp_path):
    found = features_of(model, sets[1], 16, tmp_path, layers=("h",))["h"]
    wanted = extract(model.encoder, evaluation_batches(sets[1], 16))
    np.testing.assert_array_equal(found.h_XF, wanted.h_XF)
    np.testing.assert_array_equal(found.label_X, sets[1].label_N)
    few = features_of(model, sets[1], 16, tmp_path, layers=("h",), most=5)["h"]
    np.testing.assert_allclose(few.h_XF, wanted.h_XF[:5], atol=1e-5)


def test_how_shards_are_cut_changes_nothing(sets, model, tmp_path):
    folder = sets[0].path.parent
    write_shards(folder / "images" / "test", tmp_path / "cut", samples_per_shard=7)
    cut = ShardSet.open(tmp_path / "cut")
    assert cut.digest != sets[1].digest
    one, other = (
        features_of(model, s, 16, tmp_path / "cache", layers=("h",))["h"] for s in (sets[1], cut)
    )
    np.testing.assert_array_equal(one.h_XF, other.h_XF)
    np.testing.assert_array_equal(one.label_X, other.label_X)
    assert len(list((tmp_path / "cache").glob("h-*"))) == 2


def test_views_are_distorted_by_their_ids(sets):
    images = images_of(sets[1], 16, view="noise")
    plain = images_of(sets[1], 16)
    assert images.view == "centre 16, noise 0.1" and plain.view == "centre 16, original"
    x_NCHW, label_N = images.read(3, 9)
    original, _ = plain.read(3, 9)
    assert torch.equal(x_NCHW, DISTORTIONS["noise"](original, np.arange(3, 9)))
    assert torch.equal(label_N, torch.from_numpy(sets[1].label_N[3:9]))
    assert "key" in images.place(3)


def test_the_table_of_layers(sets, model, tmp_path):
    said, done = [], []
    table = layers_table(model, *sets, 16, tmp_path, say=said.append, progress=done.append)
    assert [row.layer for row in table] == Layers(model.encoder, model.projection_head).names
    assert [row.num_discarded for row in table] == [None] * 5 + [4, 3, 2, 1, 0]
    assert sum(done) == len(sets[0]) + len(sets[1])
    assert all(0 <= row.ridge_top1 <= 1 and 0 <= row.knn_top1 <= 1 for row in table)
    assert max(row.knn_top1 for row in table) > 2 / sets[0].num_classes
    assert len(said) == 2 + len(table)


def test_the_table_of_what_is_forgotten(sets, model, tmp_path, monkeypatch):
    monkeypatch.setattr(forgetting, "EPOCHS", 4)
    table = forgetting_table(model, *sets, 16, tmp_path, most=24)
    assert [row.task for row in table] == list(forgetting.TASKS)
    assert [row.chance for row in table] == [0.8, 0.25, 0.5, 0.5]
    assert all(list(row.top1) == ["h", "projection_head.fc2"] for row in table)
    assert table[3].top1["h"] > 0.8  # edges alone look like nothing else
    assert set(forgetting.VIEWS) == set(DISTORTIONS)


def test_one_process_joins_nobody(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with joined() as world:
        assert world.num_ranks == 1 and not evaluations.dist.is_initialized()
