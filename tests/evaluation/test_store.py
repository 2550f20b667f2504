"""Features on disk: each image once, on any ranks, through kills, and never of something else."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastclr.config import ConfigError
from fastclr.evaluation.features import Features, extract_layers
from fastclr.evaluation.store import cached_features

SCRIPT = Path(__file__).with_name("store_ranks.py")
_spec = importlib.util.spec_from_file_location("store_ranks", SCRIPT)
ranks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ranks)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with one thread, as the ranks and children do: others sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def take(folder: Path, layers: Any = None, images: Any = None, **options: Any) -> dict:
    """Take or read features in small blocks."""
    options = {"block": ranks.BLOCK, "batch": ranks.BATCH, **options}
    return cached_features(
        folder, layers or ranks.make_layers(), images or ranks.make_images(), **options
    )


def expected(num_images: int = ranks.NUM_IMAGES) -> dict[str, Features]:
    """Return the features without a store, in the same batches."""
    images = ranks.make_images(num_images)
    starts = [k for k in range(0, num_images) if k % ranks.BLOCK % ranks.BATCH == 0]
    stops = [*starts[1:], num_images]
    batches = [images.read(a, b) for a, b in zip(starts, stops, strict=True)]
    return extract_layers(ranks.make_layers(), batches)


def assert_same(found: dict, wanted: dict) -> None:
    assert list(found) == list(wanted)
    for name, features in wanted.items():
        assert found[name].h_XF.dtype == np.float32 and found[name].label_X.dtype == np.int64
        np.testing.assert_array_equal(found[name].h_XF, features.h_XF)
        np.testing.assert_array_equal(found[name].label_X, features.label_X)


def test_features_are_those_of_a_plain_pass_and_then_come_from_the_disk(tmp_path):
    read, done = [], []
    images = ranks.make_images(told=read.append)
    assert_same(take(tmp_path, images=images, progress=done.append), expected())
    assert read == list(range(0, 53, 4))
    assert done == [8] * 6 + [5]
    found = take(tmp_path, images=images)
    assert_same(found, expected())
    assert len(read) == 14  # nothing was read again
    assert isinstance(found["h"].h_XF, np.memmap) and not found["h"].h_XF.flags.writeable
    folders = sorted(tmp_path.iterdir())
    assert [f.name[:-21] for f in folders] == sorted([*ranks.NAMES, "label"])
    assert all({p.name for p in f.iterdir()} == {"manifest.json", "features.npy"} for f in folders)
    manifest = json.loads((folders[0] / "manifest.json").read_text())
    assert (manifest["of"]["num_images"], manifest["shape"]) == (53, [53, 6])


@pytest.mark.parametrize("num_images", [1, 7, 8, 9, 16])
def test_any_number_of_images(tmp_path, num_images):
    found = take(tmp_path, images=ranks.make_images(num_images))
    assert_same(found, expected(num_images))


def test_another_layer_is_taken_alone(tmp_path):
    take(tmp_path, ranks.make_layers(names=["h"]))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npy")}
    assert_same(take(tmp_path), expected())
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.parametrize(
    "change", ["weights", "data", "view", "num_images", "head", "block", "batch"]
)
def test_another_state_is_another_folder(tmp_path, change):
    first = take(tmp_path)
    layers, options, images = ranks.make_layers(), {}, ranks.make_images()
    if change == "weights":
        layers._encoder[0].weight.data[0, 0, 0, 0] += 1e-3
    elif change == "head":
        layers._head.fc2.weight.data[0, 0] += 1e-3
    elif change in ("block", "batch"):
        options = {change: 16}
    else:
        images = {
            "data": ranks.make_images(digest="other"),
            "view": ranks.make_images(view="sobel"),
            "num_images": ranks.make_images(52),
        }[change]
    read = []
    object.__setattr__(images, "read", lambda a, b, r=images.read: (read.append(a), r(a, b))[1])
    second = take(tmp_path, layers, images, **options)
    assert read, "a cache hit mixed two states"
    assert_same(take(tmp_path), first)
    if change == "head":  # the encoder's layers are the same ones
        np.testing.assert_array_equal(second["h"].h_XF, first["h"].h_XF)
        assert not np.array_equal(second[ranks.NAMES[-1]].h_XF, first[ranks.NAMES[-1]].h_XF)
        assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("kill_at", [0, 5, 13])
def test_a_killed_extraction_loses_nothing(tmp_path, kill_at):
    def die(start: int) -> None:
        if start >= kill_at * ranks.BATCH:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        take(tmp_path, images=ranks.make_images(told=die))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not list(tmp_path.rglob("manifest.json"))
    read: list[int] = []
    assert_same(take(tmp_path, images=ranks.make_images(told=read.append)), expected())
    assert min(read) == kill_at * ranks.BATCH // ranks.BLOCK * ranks.BLOCK


def test_killed_while_joining(tmp_path, monkeypatch):
    from fastclr.evaluation import store

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        take(tmp_path)
    monkeypatch.undo()
    read: list[int] = []
    assert_same(take(tmp_path, images=ranks.make_images(told=read.append)), expected())
    assert not read


def test_a_damaged_block_is_taken_again(tmp_path):
    def stop(start: int) -> None:
        if start >= 24:
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        take(tmp_path, images=ranks.make_images(told=stop))
    blocks = sorted(tmp_path.glob("h-*/*.npy"))
    assert [b.name for b in blocks] == [f"{k:09d}-{k + 8:09d}.npy" for k in (0, 8, 16)]
    blocks[0].write_bytes(blocks[0].read_bytes()[:-9])
    np.save(blocks[1], np.zeros((7, 24), np.float32))
    np.save(blocks[2], np.array([{}] * 8), allow_pickle=True)
    assert_same(take(tmp_path), expected())


@pytest.mark.parametrize("damage", ["cut", "shape", "pickle", "of", "no json", "gone"])
def test_a_damaged_store_is_refused_by_name(tmp_path, damage):
    take(tmp_path)
    (folder,) = tmp_path.glob("h-*")
    array, manifest = folder / "features.npy", folder / "manifest.json"
    if damage == "cut":
        array.write_bytes(array.read_bytes()[:-9])
    elif damage == "shape":
        np.save(array, np.zeros((52, 24), np.float32))
    elif damage == "pickle":
        np.save(array, np.array([{}] * 53), allow_pickle=True)
    elif damage == "of":
        manifest.write_text(manifest.read_text().replace("centre", "center"))
    elif damage == "no json":
        manifest.write_text("{")
    else:
        array.unlink()
    with pytest.raises(ConfigError, match=rf"{folder.name} .*: delete it"):
        take(tmp_path)


def test_features_that_are_not_finite_name_the_first_image(tmp_path):
    class Spoiled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal seen
            h_NF = x.flatten(1)[:, :5].clone()
            if seen <= 30 < seen + len(x):
                h_NF[30 - seen :, 2] = torch.inf
            seen += len(x)
            return h_NF

    from fastclr.evaluation.layers import Layers

    seen = 0
    with pytest.raises(FloatingPointError, match="features of shard 0, key 30 at h are not finite"):
        take(tmp_path, Layers(Spoiled(), names=["h"]))
    assert not list(tmp_path.rglob("manifest.json"))


def test_no_images_and_fewer_images_than_said_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="there are no images"):
        take(tmp_path, images=ranks.make_images(0))
    with pytest.raises(ConfigError, match="images 96 to 104 came as 3"):
        take(tmp_path, images=ranks.make_images(105))


def test_ranks_share_the_work_and_all_get_the_bits_of_one(run_ranks):
    found = run_ranks(SCRIPT, 2)["ranks"]
    wanted = expected()
    for rank in found:
        for name, features in wanted.items():
            h_XF = np.array(rank["h"][name], np.float32)
            np.testing.assert_array_equal(h_XF, features.h_XF)
        assert rank["label"] == wanted["h"].label_X.tolist()
        assert rank["equal"] and not rank["again"]
    read = [start for rank in found for start in rank["read"]]
    assert sorted(read) == list(range(0, 53, 4))  # each image once
    assert [rank["done"] for rank in found] == [29, 24]
    for error, number in (rank["failures"] for rank in found):
        assert "cannot read image 9" in error
        assert number.startswith("FloatingPointError")
        assert any(f"shard 0, key {k} at encoder.0 are not finite" in number for k in (0, 8))
    assert found[1]["failures"][0].startswith("OSError")  # the rank that met it
    assert found[0]["failures"][0] == "OSError: rank 1: cannot read image 9"
