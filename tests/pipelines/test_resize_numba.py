"""The resize is Pillow's bit for bit, and reads nothing outside its crops."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.decode import Pixels
from pipelines.resize_numba import resize

Picture = Callable[..., Pixels]
Box = tuple[int, int, int, int]


def run(images: list[Pixels], boxes: list[Box], flips: list[bool], size: int) -> Pixels:
    out = np.full((len(images), size, size, 3), 77, np.uint8)
    resize(images, np.array(boxes, np.int32).reshape(-1, 4), np.array(flips, bool), out)
    return out


def pillow(image: Pixels, box: Box, flip: bool, size: int) -> Pixels:
    top, left, height, width = box
    crop = Image.fromarray(np.ascontiguousarray(image[top : top + height, left : left + width]))
    across = crop.resize((size, height), Image.Resampling.BICUBIC)
    view = np.array(across.resize((size, size), Image.Resampling.BICUBIC))
    return view[:, ::-1] if flip else view


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_crop_of_noise_is_pillows(data: st.DataObject) -> None:
    """Noise of 0 and 255 overshoots; every rounding and clipping shows."""
    height, width = data.draw(st.tuples(st.integers(1, 130), st.integers(1, 130)))
    h, w = data.draw(st.tuples(st.integers(1, height), st.integers(1, width)))
    box = (data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w)), h, w)
    size, flip = data.draw(st.integers(6, 70)), data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    if data.draw(st.booleans()):
        pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
    assert np.array_equal(run([pixels], [box], [flip], size)[0], pillow(pixels, box, flip, size))


@pytest.mark.parametrize("shape", [(500, 375), (1, 900), (900, 1), (2, 3), (17, 16), (1200, 40)])
@pytest.mark.parametrize("size", [6, 32, 224])
def test_large_narrow_and_tiny_images_are_pillows(
    picture: Picture, shape: tuple[int, int], size: int
) -> None:
    image, box = picture(*shape), (0, 0, *shape)
    assert np.array_equal(run([image], [box], [True], size)[0], pillow(image, box, True, size))


def test_images_of_many_sizes_in_one_call(picture: Picture) -> None:
    """What a large image leaves in the memory of the work must not reach the next."""
    shapes = [(300, 200), (5, 9), (64, 64), (1, 1), (40, 300), (33, 20)]
    images = [picture(h, w, k) for k, (h, w) in enumerate(shapes)]
    boxes = [(0, 0, h, w) for h, w in shapes]
    flips = [True, False, True, True, False, False]
    found = run(images, boxes, flips, 30)
    for i in range(len(images)):
        assert np.array_equal(found[i], pillow(images[i], boxes[i], flips[i], 30))
        assert np.array_equal(found[i], run(images[i : i + 1], boxes[i : i + 1], [flips[i]], 30)[0])


def test_threads_at_once_change_nothing(picture: Picture) -> None:
    images = [picture(60, 50, k) for k in range(12)]
    boxes = [(k, k, 40 - k, 25 + k) for k in range(12)]
    whole = run(images, boxes, [True, False] * 6, 32)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: run(images, boxes, [True, False] * 6, 32), range(40)):
            assert np.array_equal(found, whole)


def test_images_need_not_be_contiguous_or_writable(picture: Picture) -> None:
    image = picture(40, 60)
    kept = image.copy()
    views = [image[::2, ::-1], image.transpose(1, 0, 2), np.asfortranarray(image)]
    image.flags.writeable = False
    boxes: list[Box] = [(0, 0, *view.shape[:2]) for view in views]
    for found, view, box in zip(run(views, boxes, [False] * 3, 20), views, boxes, strict=True):
        assert np.array_equal(found, pillow(view, box, False, 20))
    assert np.array_equal(image, kept)


@pytest.mark.parametrize("width", [1, 5, 6, 40])
def test_nothing_behind_the_last_pixel_is_read(width: int, picture: Picture) -> None:
    """The image ends with the file that is mapped, on a page's last byte; behind it is a fault."""
    page = mmap.PAGESIZE
    height = 20
    with mmap.mmap(-1, 2 * page) as memory:
        size = height * width * 3
        image = np.frombuffer(memory, np.uint8, size, page - size).reshape(height, width, 3)
        image[:] = picture(height, width)
        found = run([image], [(1, 0, height - 1, width)], [False], 24)[0]
        behind = np.frombuffer(memory, np.uint8, page, page)
        behind[:] = 255
        again = run([image], [(1, 0, height - 1, width)], [False], 24)[0]
        assert np.array_equal(found, again)
        assert np.array_equal(found, pillow(image, (1, 0, height - 1, width), False, 24))
        del image, behind


@pytest.mark.parametrize(
    "box",
    [(-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 0, 5), (0, 0, 5, 0), (6, 0, 5, 5), (0, 16, 5, 5),
     (0, 0, 11, 5), (0, 0, 5, 21), (2**31 - 1, 0, 5, 5), (0, 0, 2**31 - 1, 1)],
)  # fmt: skip
def test_a_crop_outside_its_image_is_refused(box: Box) -> None:
    """The kernel works on addresses: such a crop would read foreign memory."""
    images = [np.zeros((30, 30, 3), np.uint8), np.zeros((10, 20, 3), np.uint8)]
    with pytest.raises(ValueError, match=r"image 1 has 10 x 20 pixels.*a crop must lie inside"):
        run(images, [(0, 0, 5, 5), box], [False] * 2, 8)


def test_what_is_no_image_is_refused() -> None:
    good = np.zeros((10, 10, 3), np.uint8)
    for bad in (good[..., :2], good[..., 0], good.astype(np.float32)):
        with pytest.raises(ValueError, match="an image is"):
            run([good, bad], [(0, 0, 5, 5)] * 2, [False] * 2, 8)
    for images, boxes, flips in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        with pytest.raises(ValueError, match="do not belong together"):
            run([good] * images, [(0, 0, 5, 5)] * boxes, [False] * flips, 8)
    with pytest.raises(ValueError, match="give uint8"):
        run([good], [(0, 0, 5, 5)], [False], 5)


def test_no_images() -> None:
    assert run([], [], [], 8).shape == (0, 8, 8, 3)
