"""A folder of a newcomer: what is found in it, what is held out, what is told."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastclr.config import ConfigError
from pipelines.hold_out import divide, write_table
from pipelines.sources import SourceOptions
from pipelines.writer import Packing, Settings


def fill(folder: Path, count: int, size: tuple[int, int] = (9, 8), first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    for k in range(first, first + count):
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{k:03d}.{'jpg' if k % 2 else 'PNG'}")
    return folder


def names(images) -> set[str]:
    return {image.name for image in images}


def test_a_tenth_of_each_class_is_held_out(tmp_path: Path) -> None:
    for name, count in (("cats", 40), ("dogs", 11), ("emus", 3)):
        fill(tmp_path / name, count)
    (tmp_path / "README.txt").write_text("mine")
    (tmp_path / ".DS_Store").write_text("x")
    found = divide(tmp_path)
    assert Counter(i.class_name for i in found.test) == {"cats": 4, "dogs": 1, "emus": 1}
    assert len(found.train) == 48 and not names(found.train) & names(found.test)
    assert found.num_classes == 3 and found.why.startswith("6 of them are held out")
    assert [*found.left_out] == ["README.txt"] and found.shorter_side() == 8
    again = divide(tmp_path)
    assert names(again.test) == names(found.test) and again.digest == found.digest
    fill(tmp_path / "cats", 10, first=100)
    grown = divide(tmp_path)
    assert grown.digest != found.digest
    assert len(names(grown.test) & names(found.test)) >= 4, "what was held out stays so, mostly"


def test_a_touched_image_is_another_folder(tmp_path: Path) -> None:
    fill(tmp_path, 20)
    before = divide(tmp_path).digest
    os.utime(tmp_path / "000.PNG", (1, 1))
    assert divide(tmp_path).digest != before


def test_the_most_that_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.hold_out.MOST_HELD_OUT", 4)
    for name in ("a", "b"):
        fill(tmp_path / name, 50)
    assert len(divide(tmp_path).test) == 4


@pytest.mark.parametrize(
    ("classes", "why"),
    [
        ({"": 30}, "that takes two class folders"),
        ({"only": 30}, "that takes two class folders"),
        ({"a": 30, "rare": 2}, "class rare has 2 images, and 3 are needed"),
        ({"a": 6, "b": 6}, "12 images are too few, a linear probe takes 20"),
    ],
)
def test_nothing_is_scored_and_why(tmp_path: Path, classes: dict[str, int], why: str) -> None:
    for name, count in classes.items():
        fill(tmp_path / name, count)
    found = divide(tmp_path)
    assert not found.test and len(found.train) == sum(classes.values())
    assert found.why.startswith("Nothing is scored: ") and why in found.why


def test_parts_that_are_there_are_taken(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fill(tmp_path / "train" / name, 12)
        fill(tmp_path / "val" / name, 2)
    found = divide(tmp_path)
    assert (len(found.train), len(found.test)) == (24, 4) and found.why.startswith("val is held")
    assert {i.class_name for i in found.train} == {"a", "b"}
    fill(tmp_path / "val" / "c", 1)
    other = divide(tmp_path)
    assert not other.test and "need two classes" in other.why and len(other.train) == 24


def test_what_cannot_be_trained_on(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere is no folder"):
        divide(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"has no file|has no image"):
        divide(tmp_path)
    (tmp_path / "set.tar").write_text("x")
    with pytest.raises(ConfigError, match=r"no image: .*\.webp \(set\.tar.*`fastclr shards`"):
        divide(tmp_path)
    fill(tmp_path / "a", 2)
    fill(tmp_path, 1)
    with pytest.raises(ConfigError, match="class folders and files beside them"):
        divide(tmp_path)


def test_files_that_only_look_like_images(tmp_path: Path) -> None:
    for k in range(20):
        (tmp_path / f"{k}.jpg").write_text("no image")
    with pytest.raises(ConfigError, match="cannot be read as images"):
        divide(tmp_path).shorter_side()


def test_a_table_is_packed_as_the_folder_would_be(tmp_path: Path) -> None:
    outside = fill(tmp_path / "elsewhere", 3)
    for name in ("a b", "ü"):
        fill(tmp_path / "images" / name, 12)
    (tmp_path / "images" / "ü" / "link.png").symlink_to(outside / "000.PNG")
    found = divide(tmp_path / "images")
    write_table(found.train, tmp_path / "train.jsonl")
    options = SourceOptions(allow_outside=True)
    settings = Settings(str(tmp_path / "train.jsonl"), "train", options)
    summary = Packing(settings, tmp_path / "train").run()
    assert summary.num_samples == len(found.train) and summary.num_classes == 2
