"""The embedded photo tiles: disjoint splits, equal classes, same bytes for a seed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastclr.config import ConfigError
from pipelines import photos
from pipelines.photos import PHOTOS, draw_boxes, load_photo, photo_cells, write_photo_tiles

COUNTS = {"train_per_photo": 6, "test_per_photo": 3}


def digests(folder: Path) -> dict[str, str]:
    """Map every file of a folder to the hash of its bytes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


def overlap(a: photos.Box, b: photos.Box) -> bool:
    """Say whether two boxes share a pixel."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def inside(box: photos.Box, cell: photos.Box) -> bool:
    """Say whether a box lies in a cell."""
    return cell[0] <= box[0] and cell[1] <= box[1] and box[2] <= cell[2] and box[3] <= cell[3]


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small data set once."""
    out = tmp_path_factory.mktemp("photos") / "tiles"
    write_photo_tiles(out, **COUNTS)
    return out


@pytest.mark.parametrize("tile", [8, 32, 48])
@pytest.mark.parametrize("size", [(512, 512), (451, 300), (384, 303), (741, 500)])
def test_cells_are_disjoint_and_cover_the_photo(size: tuple[int, int], tile: int) -> None:
    cells = photo_cells(*size, tile)
    every = cells["train"] + cells["test"]
    assert cells["train"] and cells["test"]
    assert not any(overlap(a, b) for i, a in enumerate(every) for b in every[:i])
    assert sum((c[2] - c[0]) * (c[3] - c[1]) for c in every) == size[0] * size[1]
    assert min(min(c[2] - c[0], c[3] - c[1]) for c in every) >= 3 * tile


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda photo: photo.name)
def test_every_tile_lies_in_a_cell_of_its_split_and_shows_something(photo: photos.Photo) -> None:
    image = load_photo(photo)
    cells = photo_cells(*image.size, 32)
    drawn = {}
    for split in ("train", "test"):
        boxes = draw_boxes(image, cells[split], 20, 32, np.random.Generator(np.random.PCG64(3)))
        assert len(set(boxes)) == 20
        assert all(any(inside(box, cell) for cell in cells[split]) for box in boxes)
        assert all(np.asarray(photos.cut(image, box, 32)).std() > 2 for box in boxes)
        drawn[split] = boxes
    assert not any(overlap(a, b) for a in drawn["train"] for b in drawn["test"])


def test_a_tile_depends_on_its_box_alone() -> None:
    image = load_photo(PHOTOS[0])
    box = (96, 96, 160, 160)
    blank = Image.new("RGB", image.size, "white")
    blank.paste(image.crop(box), box)
    assert np.array_equal(photos.cut(image, box, 32), photos.cut(blank, box, 32))


def test_counts_classes_and_format(tiles: Path) -> None:
    for split, count in (("train", 6), ("test", 3)):
        folders = sorted((tiles / split).iterdir())
        assert [folder.name for folder in folders] == sorted(photo.name for photo in PHOTOS)
        for folder in folders:
            files = sorted(file.name for file in folder.iterdir())
            assert files == [f"{number:05d}.png" for number in range(count)]
    with Image.open(tiles / "test" / "chelsea" / "00000.png") as image:
        assert (image.size, image.mode) == ((32, 32), "RGB")


def test_readme_says_what_it_is(tiles: Path) -> None:
    text = (tiles / "README.txt").read_text(encoding="utf-8")
    assert "SMOKE" in text and "96 train and 48 test" in text
    assert all(photo.name in text and photo.credit in text for photo in PHOTOS)


def test_summary_and_default_counts_are_about_4000_and_1000(tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    summary = write_photo_tiles(
        tmp_path / "a", **COUNTS, progress=lambda *report: reports.append(report)
    )
    assert summary == {"classes": 16, "train": 96, "test": 48}
    assert [done for _, done, _ in reports] == list(range(1, 17))
    defaults = write_photo_tiles.__kwdefaults__
    assert (16 * defaults["train_per_photo"], 16 * defaults["test_per_photo"]) == (4000, 992)


def test_same_seed_same_bytes_other_seed_other_tiles(tiles: Path, tmp_path: Path) -> None:
    write_photo_tiles(tmp_path / "same", **COUNTS)
    write_photo_tiles(tmp_path / "other", **COUNTS, seed=1)
    assert digests(tmp_path / "same") == digests(tiles)
    first, other = digests(tiles), digests(tmp_path / "other")
    assert first.keys() == other.keys()
    assert sum(first[name] == other[name] for name in first) == 1  # the README


def test_bare_cells_are_an_error_not_an_endless_loop() -> None:
    black = Image.new("RGB", (192, 192))
    with pytest.raises(ConfigError, match="only 0 of 2 distinct tiles"):
        draw_boxes(black, [(0, 0, 192, 192)], 2, 32, np.random.Generator(np.random.PCG64(0)))


@pytest.mark.parametrize(
    "wrong", [{"tile": 7}, {"tile": 49}, {"test_per_photo": 0}, {"seed": -1}], ids=str
)
def test_arguments_out_of_range_are_refused(wrong: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        write_photo_tiles(tmp_path / "out", **wrong)
    assert not list(tmp_path.iterdir())


def test_used_target_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        write_photo_tiles(tmp_path, **COUNTS)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ConfigError])
def test_nothing_is_left_after_a_failure(
    failure: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_at_the_third(photo: photos.Photo) -> Image.Image:
        if photo == PHOTOS[2]:
            raise failure
        return load_photo(photo)

    monkeypatch.setattr(photos, "load_photo", fail_at_the_third)
    with pytest.raises(failure):
        write_photo_tiles(tmp_path / "out", **COUNTS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("photo", "message"),
    [
        (photos.Photo("no_such_package_here", "data/x.png", ""), "not installed"),
        (photos.Photo("skimage", "data/no_such.png", ""), "cannot be read"),
        (photos.Photo("skimage", "__init__.py", ""), "cannot be read"),
    ],
)
def test_missing_photo_names_the_remedy(photo: photos.Photo, message: str) -> None:
    with pytest.raises(ConfigError, match=f"{message}(?s:.*)install"):
        load_photo(photo)
