"""The contact sheet shows the views of a run and the numbers they were made with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastclr.config import ConfigError
from fastclr.world import World
from pipelines.loader import make_loader
from pipelines.photos import write_photo_tiles
from pipelines.policy import SimCLRPolicy
from pipelines.shards import ShardSet
from pipelines.view_sheet import describe, view_sheet
from pipelines.writer import write_shards

ROOT = Path(__file__).parents[2]
POLICY = SimCLRPolicy(size=32, color_strength=0.5)


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("photos")
    write_photo_tiles(folder / "images", train_per_photo=2, test_per_photo=1)
    return write_shards(folder / "images" / "train", folder / "train")


def tile(sheet: Image.Image, row: int, column: int) -> np.ndarray:
    """A 32-pixel picture, drawn five times as large."""
    left, top = 8 + 168 * column, 168 * row + 4
    return np.array(sheet)[top : top + 160 : 5, left : left + 160 : 5]


def test_it_shows_what_a_run_sees(shard_set: ShardSet) -> None:
    sheet = view_sheet(shard_set, POLICY, num_images=4, seed=5, epoch=2)
    loader = make_loader(shard_set, POLICY, micro_batch_size=4, seed=5, world=World())
    loader.load_state_dict({**loader.state_dict(), "epoch": 2})
    batch = next(iter(loader))
    for row, sample_id in enumerate(batch.sample_id_B.tolist()):
        assert np.array_equal(tile(sheet, row, 0), shard_set[sample_id])
        for view in (0, 1):
            expected = batch.views_VBCHW[view, row].permute(1, 2, 0).numpy()
            assert np.array_equal(tile(sheet, row, 1 + view), expected)
    texts = np.array(sheet.convert("L"))[:, 3 * 168 + 8 :]
    assert ((texts < 100).reshape(4, 168, -1).mean((1, 2)) > 0.01).all(), "rows without text"


def test_it_takes_any_number_of_views_and_images(shard_set: ShardSet) -> None:
    wide = view_sheet(shard_set, [POLICY] * 4, num_images=2)
    assert wide.size[0] == view_sheet(shard_set, POLICY, num_images=1).size[0] + 2 * 168
    assert view_sheet(shard_set, POLICY, num_images=99).size[1] == 32 * 168


def test_an_unknown_back_end_is_refused(shard_set: ShardSet) -> None:
    with pytest.raises(ConfigError, match="backend 'dahli' is unknown"):
        view_sheet(shard_set, POLICY, backend="dahli")


def test_the_text_has_every_number() -> None:
    sizes_N2 = np.array([[300, 400]] * 64, np.int32)
    params = POLICY.draw(seed=0, epoch=0, positions=np.arange(64), view=0, sizes_N2=sizes_N2)
    for row in range(64):
        text = describe(params, row)
        top, left, height, width = params.box_N4[row]
        assert f"crop {height} x {width} at top {top}, left {left}" in text
        assert ("flip yes" in text) == params.flip_N[row]
        assert ("gray yes" in text) == params.gray_N[row]
        assert (f"blur sigma {params.sigma_N[row]:.3f}" in text) == params.blur_N[row]
        names = ["brightness", "contrast", "saturation", "hue"]
        found = sorted((text.find(name), step) for step, name in enumerate(names))
        if params.jitter_N[row]:
            assert [step for _, step in found] == params.order_N4[row].tolist()
            for name, factor in zip(names, params.factors_N4[row], strict=True):
                assert f"{name} {factor:.3f}" in text
        else:
            assert "jitter no" in text and found[-1][0] == -1


def test_the_text_tells_brightness_that_is_added() -> None:
    policy = SimCLRPolicy(brightness="additive", jitter_prob=1)
    sizes_N2 = np.array([[300, 400]], np.int32)
    params = policy.draw(seed=0, epoch=0, positions=np.arange(1), view=0, sizes_N2=sizes_N2)
    text = describe(params, 0)
    assert f"brightness plus {params.factors_N4[0, 0]:.3f}" in text
    assert f"hue {params.factors_N4[0, 3]:.3f}" in text


def test_the_command(shard_set: ShardSet, tmp_path: Path) -> None:
    out = tmp_path / "views.png"
    command = [sys.executable, "tools/show_views.py", str(shard_set.path), "--out", str(out)]
    command += ["--views.size", "32", "--num-images", "3", "--seed", "5", "--views.blur-prob", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    policy = SimCLRPolicy(size=32, blur_prob=0)
    expected = view_sheet(shard_set, policy, num_images=3, seed=5)
    with Image.open(out) as sheet:
        assert np.array_equal(np.array(sheet), np.array(expected))
    assert [file.name for file in tmp_path.iterdir()] == ["views.png"]
