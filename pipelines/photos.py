"""The embedded smoke data set: small tiles of 16 photographs that ship in two Python wheels.

Nothing is downloaded: the photographs are files of scikit-image and scikit-learn. A class is a
photo. Each photo is divided into a grid of cells, a cell belongs to train or to test, and a tile
lies inside one cell, so no pixel of a photo is seen on both sides of the split.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastclr.config import ConfigError
from pipelines.writer import atomic_folder

Box = tuple[int, int, int, int]
"""A rectangle of pixels: left, top, right, bottom; the last two are exclusive."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many units are done, and how many there are."""


class Photo(NamedTuple):
    """A photograph inside an installed package, and who made it.

    Attributes:
        package: Import name of the package that ships the file.
        path: Path of the file inside the package.
        credit: Origin and terms, as far as the package states them.
    """

    package: str
    path: str
    credit: str

    @property
    def name(self) -> str:
        """Class name of the photo's tiles."""
        return Path(self.path).stem


PHOTOS = (
    Photo("skimage", "data/astronaut.png", "NASA, public domain"),
    Photo("skimage", "data/brick.png", "CC0Textures, CC0"),
    Photo("skimage", "data/camera.png", "Lav Varshney, CC0"),
    Photo("skimage", "data/chelsea.png", "Stefan van der Walt, CC0"),
    Photo("sklearn", "datasets/images/china.jpg", "danielbuechele (Flickr), CC BY 2.0"),
    Photo("skimage", "data/coffee.png", "Rachel Michetti, Pikolo Espresso Bar, CC0"),
    Photo("skimage", "data/coins.png", "Brooklyn Museum, no known copyright restrictions"),
    Photo("sklearn", "datasets/images/flower.jpg", "vultilion (Flickr), CC BY 2.0"),
    Photo("skimage", "data/grass.png", "linolafett (DeviantArt), CC0"),
    Photo("skimage", "data/gravel.png", "CC0Textures, CC0"),
    Photo("skimage", "data/hubble_deep_field.jpg", "NASA (HubbleSite), public domain"),
    Photo("skimage", "data/ihc.png", "colonic glands, no known copyright restrictions"),
    Photo("skimage", "data/moon.png", "origin and terms: see skimage.data.moon"),
    Photo("skimage", "data/motorcycle_left.png", "Middlebury Stereo 2014 (Scharstein et al.)"),
    Photo("skimage", "data/retina.jpg", "Mikael Haggstrom, CC0"),
    Photo("skimage", "data/rocket.jpg", "SpaceX, public domain"),
)

CLASS_NAMES = sorted(photo.name for photo in PHOTOS)
NOTE = (
    "Smoke data: tiles of 16 photographs, and the class of a tile is the photo it was cut from. "
    "The numbers below say that everything works; they say nothing about a method."
)

LONG_SIDE = 600  # photos are shrunk to about this many pixels, so that a tile shows an object
MIN_STD = 4.0  # grey levels; below this a tile is bare sky, or the black rim of the retina
TEST_COLUMN = (1, 3, 0, 2)  # four queens: 1 cell in 4 is test, and no two of them touch by a side

README = """Photo tiles: a SMOKE data set
=============================

{train} train and {test} test tiles ({tile}x{tile} RGB PNG) cut from {classes} photographs. The
class of a tile is the photo that it was cut from. Train and test tiles come from disjoint cells
of each photo and never share a pixel of the photo.

Good for: checking that a training run works from end to end without a download, that the
loss falls, and that features beat chance.
Not good for: comparing methods or quoting accuracy. Colour alone tells many of the photos
apart, the tiles of a photo overlap within a split, and {classes} photos are not a benchmark.

Sources (files that ship in the scikit-image and scikit-learn wheels) and terms, as stated there:
{sources}

The two CC BY 2.0 photos require attribution: keep this file with the tiles.
"""


def load_photo(photo: Photo) -> Image.Image:
    """Read a photo from its installed package, in RGB, shrunk to about `LONG_SIDE` pixels.

    The shrinking averages whole blocks of pixels, so it mixes no pixels across cell borders.

    Raises:
        ConfigError: The package is not installed, or ships no such readable file.
    """
    spec = importlib.util.find_spec(photo.package)
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"package {photo.package} is not installed, and the photo {photo.name} is part of it: "
            "pip install scikit-image scikit-learn."
        )
    path = Path(spec.origin).parent / photo.path
    try:
        with Image.open(path, formats=["PNG", "JPEG"]) as image:
            rgb = image.convert("RGB")
    except OSError as error:
        raise ConfigError(
            f"photo {path} cannot be read ({error}), so its class would be missing: "
            "reinstall scikit-image and scikit-learn."
        ) from error
    return rgb.reduce(max(1, round(max(rgb.size) / LONG_SIDE)))


def photo_cells(width: int, height: int, tile: int) -> dict[str, list[Box]]:
    """Divide a photo into disjoint cells of at least 3 x `tile` pixels a side, by split.

    Args:
        width: Width of the photo, pixels; at least 6 x `tile`.
        height: Height of the photo, pixels; at least 6 x `tile`.
        tile: Side of a tile, pixels.

    Returns:
        The cells of "train" and of "test" (about 1 in 4, spread by a fixed pattern).
    """
    columns, rows = width // (3 * tile), height // (3 * tile)
    xs = [column * width // columns for column in range(columns + 1)]
    ys = [row * height // rows for row in range(rows + 1)]
    cells: dict[str, list[Box]] = {"train": [], "test": []}
    for row in range(rows):
        for column in range(columns):
            split = "test" if column % 4 == TEST_COLUMN[row % 4] else "train"
            cells[split].append((xs[column], ys[row], xs[column + 1], ys[row + 1]))
    return cells


def cut(image: Image.Image, box: Box, tile: int) -> Image.Image:
    """Cut a box and shrink it to `tile` x `tile`; no pixel outside the box has an influence."""
    return image.crop(box).resize((tile, tile), Image.Resampling.BOX)


def draw_boxes(
    image: Image.Image, cells: Sequence[Box], count: int, tile: int, rng: np.random.Generator
) -> list[Box]:
    """Draw distinct boxes of 2 x `tile` pixels a side, each inside one cell and not bare.

    Args:
        image: RGB photo.
        cells: Cells of one split; each at least 2 x `tile` pixels a side.
        count: How many boxes.
        tile: Side of the tile that a box is shrunk to, pixels.
        rng: Source of the positions.

    Raises:
        ConfigError: The cells do not hold `count` boxes that show something.
    """
    side = 2 * tile
    boxes: dict[Box, None] = {}  # not a set: the order of drawing is the order of the files
    for _ in range(100 * count):
        if len(boxes) == count:
            break
        left, top, right, bottom = cells[int(rng.integers(len(cells)))]
        x = left + int(rng.integers(right - left - side + 1))
        y = top + int(rng.integers(bottom - top - side + 1))
        box = (x, y, x + side, y + side)
        if np.asarray(cut(image, box, tile)).std(axis=(0, 1)).mean() >= MIN_STD:
            boxes[box] = None
    if len(boxes) < count:
        raise ConfigError(
            f"only {len(boxes)} of {count} distinct tiles were found in a photo, and classes must "
            "have equal counts: ask for fewer tiles per photo."
        )
    return list(boxes)


def write_photo_tiles(
    out: Path,
    *,
    tile: int = 32,
    train_per_photo: int = 250,
    test_per_photo: int = 62,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> dict[str, int]:
    """Write the tiles as `out/train/<photo>/<00000>.png`, `out/test/...`, and `out/README.txt`.

    The positions depend on the arguments alone. The pixels depend also on Pillow's JPEG decoder,
    the bytes of the files on its zlib.

    Args:
        out: Folder to create; it appears whole or not at all.
        tile: Side of a tile, pixels, 8 to 48.
        train_per_photo: Train tiles of each class, at least 1.
        test_per_photo: Test tiles of each class, at least 1.
        seed: Seed of the positions, not negative.
        progress: Called after each photo.

    Returns:
        The numbers of "classes", "train" tiles and "test" tiles.

    Raises:
        ConfigError: An argument is out of range, `out` is not empty, or a photo is missing.
    """
    _check_arguments(tile, train_per_photo, test_per_photo, seed)
    counts = {"train": train_per_photo, "test": test_per_photo}
    summary = {"classes": len(PHOTOS)} | {name: n * len(PHOTOS) for name, n in counts.items()}
    with atomic_folder(out) as folder:
        for index, photo in enumerate(PHOTOS):
            _write_photo(folder, photo, tile, counts, [seed, index])
            progress("cutting photo tiles", index + 1, len(PHOTOS))
        sources = "\n".join(f"- {p.name} ({p.package}/{p.path}): {p.credit}" for p in PHOTOS)
        text = README.format(tile=tile, sources=sources, **summary)
        (folder / "README.txt").write_text(text, encoding="utf-8")
    return summary


def _check_arguments(tile: int, train_per_photo: int, test_per_photo: int, seed: int) -> None:
    """Refuse arguments that give no data set."""
    if not 8 <= tile <= 48 or min(train_per_photo, test_per_photo) < 1 or seed < 0:
        raise ConfigError(
            f"tile={tile}, train_per_photo={train_per_photo}, test_per_photo={test_per_photo}, "
            f"seed={seed}: a tile below 8 pixels shows nothing, above 48 the smallest photo has no "
            "room for both splits, and both need tiles. Choose a tile of 8 to 48, counts of at "
            "least 1 and a seed of at least 0."
        )


def _write_photo(
    folder: Path, photo: Photo, tile: int, counts: Mapping[str, int], entropy: Sequence[int]
) -> None:
    """Write the tiles of one photo, `counts` of each split."""
    image = load_photo(photo)
    width, height = image.size
    rng = np.random.Generator(np.random.PCG64(entropy))
    for split, cells in photo_cells(width, height, tile).items():
        target = folder / split / photo.name
        target.mkdir(parents=True)
        for number, box in enumerate(draw_boxes(image, cells, counts[split], tile, rng)):
            cut(image, box, tile).save(target / f"{number:05d}.png")
