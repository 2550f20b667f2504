"""A contact sheet: source images beside their augmented views, with the numbers drawn for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fastclr.world import World
from pipelines.decode import Pixels
from pipelines.image_set import ImageSet
from pipelines.loader import make_loader
from pipelines.policy import SimCLRPolicy, ViewParams

_STEPS = ("brightness", "contrast", "saturation", "hue", "brightness plus")
_SIDE, _GAP, _TEXT_WIDTH, _FONT_SIZE = 160, 8, 300, 11
_SHADES = ("#ffffff", "#f2f2f2")  # of every other row


def view_sheet(
    shard_set: ImageSet,
    policy: SimCLRPolicy | Sequence[SimCLRPolicy],
    *,
    num_images: int = 8,
    seed: int = 0,
    epoch: int = 0,
    backend: str = "auto",
) -> Image.Image:
    """Draw the first positions of an epoch as a run of that seed sees them.

    Args:
        shard_set: Images.
        policy: Augmentation of both views, or one policy a view.
        num_images: Rows; no more than there are images.
        seed: Seed of the run.
        epoch: Epoch from 0.
        backend: Key of :data:`~pipelines.backends.BACKENDS`, or ``auto``.

    Returns:
        An RGB picture; a row an image: the source, each view, and what was drawn for each.

    Raises:
        ConfigError: If a setting is unknown or out of range.
        ShardError: If an image is damaged or cannot be read.
    """
    num_images = min(num_images, len(shard_set))
    loader = make_loader(
        shard_set, policy, micro_batch_size=num_images, seed=seed, backend=backend, world=World()
    )
    positions = np.arange(num_images)
    sample_ids = shard_set.order(seed).ids(epoch, 0, num_images)
    views, _ = loader.make_views(epoch, positions, sample_ids)
    params = loader.draw(epoch, positions, sample_ids)
    tiles = views.to(torch.device("cpu")).numpy()
    rows = []
    for row, sample_id in enumerate(sample_ids.tolist()):
        source = shard_set[sample_id]
        height, width = source.shape[:2]
        head = [f"position {row}, sample {sample_id}, {height} x {width} pixels"]
        texts = [f"view {v}: {describe(p, row)}" for v, p in enumerate(params)]
        rows.append(([source, *tiles[:, row]], "\n".join(head + texts)))
    return _draw(rows)


def describe(params: ViewParams, row: int) -> str:
    """Say what was drawn for one view; colour steps in the order they are applied."""
    top, left, height, width = params.box_N4[row].tolist()
    factors = params.factors_N4[row].tolist()
    order = params.order_N4[row].tolist()
    steps = [f"{_STEPS[step]} {factors[step % 4]:.3f}" for step in order]
    jitter = [", ".join(steps[:2]) + ",", ", ".join(steps[2:])] if params.jitter_N[row] else ["no"]
    blur = f"sigma {params.sigma_N[row]:.3f}" if params.blur_N[row] else "no"
    return "\n".join(
        [
            f"crop {height} x {width} at top {top}, left {left}; flip {_yes(params.flip_N[row])}",
            "jitter " + "\n  ".join(jitter),
            f"gray {_yes(params.gray_N[row])}; blur {blur}",
        ]
    )


def _yes(value: np.bool_) -> str:
    return "yes" if value else "no"


def _draw(rows: list[tuple[list[Pixels], str]]) -> Image.Image:
    """Put the rows below each other: pictures, then text."""
    step = _SIDE + _GAP
    num_tiles = len(rows[0][0])
    font = ImageFont.load_default(_FONT_SIZE)
    sheet = Image.new("RGB", (num_tiles * step + _GAP + _TEXT_WIDTH, len(rows) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (tiles, text) in enumerate(rows):
        top = number * step
        draw.rectangle((0, top, sheet.width, top + step - 1), fill=_SHADES[number % 2])
        for column, tile in enumerate(tiles):
            picture = _fit(tile)
            left = _GAP + column * step + (_SIDE - picture.width) // 2
            sheet.paste(picture, (left, top + (step - picture.height) // 2))
        draw.multiline_text(
            (num_tiles * step + _GAP, top + _GAP), text, fill="black", font=font, spacing=2
        )
    return sheet


def _fit(pixels: Pixels) -> Image.Image:
    """Scale a picture to the tile: small ones by whole numbers, so that their pixels stay crisp."""
    image = Image.fromarray(pixels)
    longer = max(image.size)
    if longer > _SIDE:
        image.thumbnail((_SIDE, _SIDE))
        return image
    times = _SIDE // longer
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
