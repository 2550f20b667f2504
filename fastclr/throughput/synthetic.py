"""Images to measure with where there are none: cut from photographs of installed packages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.photos import PHOTOS, load_photo, write_photo_tiles
from pipelines.writer import write_shards

LARGEST_TILE = 48  # pixels; above it JPEGs of ImageNet's usual size are made
JPEG_SIZE = (500, 375)


def write(folder: Path, size: int, images: int) -> Path:
    """Write and pack images; return the shard set.

    Args:
        folder: To be made.
        size: Side of the views in pixels: up to 48 the images are PNGs of that side, as in CIFAR;
            above they are JPEGs of 500 x 375 pixels, 4:2:0 at quality 90, as in ImageNet.
        images: At least so many.
    """
    each = -(-images // len(PHOTOS))
    if size <= LARGEST_TILE:
        write_photo_tiles(
            folder / "images", tile=max(8, size), train_per_photo=each, test_per_photo=1
        )
        source = folder / "images" / "train"
    else:
        source = _write_jpegs(folder / "images", each)
    write_shards(source, folder / "packed")
    return folder / "packed"


def _write_jpegs(folder: Path, each: int) -> Path:
    """Cut boxes of at least half a side out of every photograph, and enlarge them."""
    rng = np.random.default_rng(0)
    for photo in PHOTOS:
        target = folder / photo.name
        target.mkdir(parents=True)
        image = load_photo(photo)
        for k in range(each):
            width, height = (int(side * rng.uniform(0.5, 1.0)) for side in image.size)
            left = int(rng.integers(image.width - width + 1))
            top = int(rng.integers(image.height - height + 1))
            box = (left, top, left + width, top + height)
            tile = image.resize(JPEG_SIZE, Image.Resampling.BILINEAR, box=box)
            tile.save(target / f"{k:05}.jpg", quality=90, subsampling="4:2:0")
    return folder


def enough(size: int, batch: int) -> int:
    """Return how many images do for measuring: a batch, and some to choose from."""
    return max(1024, 2 * batch) if size <= LARGEST_TILE else max(512, batch)
