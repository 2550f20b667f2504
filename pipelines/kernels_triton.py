# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportReturnType=false
# (A jit function's body is Triton's language in Python's syntax; Python's types do not hold there.)
"""The augmentation on a GPU in four launches for all views: resize, pivots, colour, blur.

A program makes one tile of one view; what the view needs it reads from a row of a table of 32-bit
numbers (the columns are below; some of them hold floats). Resize and blur are separable, but each
is one launch: a program filters the source rows that its tile needs across, a few at a time, and
adds them up down as a small matrix product. Nothing goes to memory between the passes, and the
resize still rounds there to 8 bit, as Pillow does. These two take a pixel's channels as neighbours
in a row of 3 SIZE levels, so that loads and stores are dense.

The contrast step needs the mean gray of the whole view after the steps before it: the pivots are
summed a block of pixels at a time by a launch of their own, and the blocks' sums by each program of
the colour launch in one order. No atomics: bitwise repeatable, whatever else is in the batch.

Interpreted and compiled ahead of time in the tests; ``make gpu-check`` runs them on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

# Columns of the table. Integers: where the source begins, in units of 16 bytes of the packed
# buffer; its width in pixels; the crop; switches; the steps in order; the row's place among the
# blurred ones, or -1; taps on each side of the blur's centre; in entry k, the k-th blurred row.
SOURCE, PITCH, TOP, LEFT, HEIGHT, WIDTH, FLIP, JITTER, GRAY = map(tl.constexpr, range(9))
ORDER, BLURRED, RADIUS, BLURRED_ROW = map(tl.constexpr, (9, 13, 14, 15))
# Floats: a factor for each step, not in the order; the blur's sigma.
FACTOR, SIGMA = map(tl.constexpr, (16, 20))
COLUMNS = tl.constexpr(24)

# A tile of resize and blur: rows, levels across, source rows at a time.
TILE = {"ROWS": 32, "ACROSS": 64, "AT_ONCE": 16}
BLOCK = 1024  # pixels of a program of the others
NUM_WARPS = 4
OUTPUTS = {torch.uint8: "*u8", torch.bfloat16: "*bf16"}


@triton.jit
def _number(table, view, column):
    """Return a view's entry in a column, by a 64-bit move."""
    return tl.load(table + (view * COLUMNS + column))


@triton.jit
def _centre(place, length, SIZE: tl.constexpr):
    """Where sample ``place`` of SIZE lies in ``length`` pixels: whole ones, and the rest in 0..1.

    Exact, and in 32 bits, for images of any length and SIZE below 2^14.
    """
    odd = 2 * place + 1
    scaled = odd * (length % (2 * SIZE))
    whole = odd * (length // (2 * SIZE)) + scaled // (2 * SIZE)
    return whole, tl.div_rn((scaled % (2 * SIZE)).to(tl.float32), 2.0 * SIZE)


@triton.jit
def _scale(length, SIZE: tl.constexpr):
    """Return one over the widening of the filter, and its taps on each side of the centre."""
    longer = tl.maximum(length, SIZE)
    return tl.div_rn(SIZE * 1.0, longer.to(tl.float32)), tl.cdiv(2 * longer, SIZE)


@triton.jit
def _cubic(distance):
    """Keys' cubic with a = -0.5."""
    t = tl.abs(distance)
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    return tl.where(t < 1, near, tl.where(t < 2, far, 0.0))


@triton.jit
def _levels(x):
    """Round to a level of 8 bit, halves up; still a float."""
    return tl.clamp(tl.floor(x + 0.5), 0.0, 255.0)


@triton.jit
def _tile(SIZE: tl.constexpr, ROWS: tl.constexpr, ACROSS: tl.constexpr):
    """Return this program's view (or blurred one), its first row and its levels across."""
    num_across: tl.constexpr = (3 * SIZE + ACROSS - 1) // ACROSS
    num_down: tl.constexpr = (SIZE + ROWS - 1) // ROWS
    view = (tl.program_id(0) // (num_across * num_down)).to(tl.int64)
    tile = tl.program_id(0) % (num_across * num_down)
    first = tile // num_across * ROWS
    return view, first, tile % num_across * ACROSS + tl.arange(0, ACROSS)


@triton.jit
def _store_tile(base, levels, y, e, SIZE: tl.constexpr):
    """Write the part of a tile that is in the view."""
    to = base + (y[:, None] * (3 * SIZE) + e[None, :])
    inside = (y < SIZE)[:, None] & (e < 3 * SIZE)[None, :]
    tl.store(to, _as(levels, base.dtype.element_ty), mask=inside)


@triton.jit
def _as(levels, TYPE: tl.constexpr):
    """Return levels as 8 bit, or divided by 255 as the model does it."""
    return levels.to(tl.int32).to(TYPE) if TYPE.is_int() else (levels * (1 / 255)).to(TYPE)


@triton.jit
def _resize(
    source,
    table,
    crops,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    ACROSS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Crop, resize with Pillow's antialiased bicubic, and flip."""
    view, first, e = _tile(SIZE, ROWS, ACROSS)
    pitch, height, width = (
        _number(table, view, PITCH), _number(table, view, HEIGHT), _number(table, view, WIDTH),
    )  # fmt: skip
    corner = _number(table, view, TOP).to(tl.int64) * pitch + _number(table, view, LEFT)
    base = source + (_number(table, view, SOURCE).to(tl.int64) * 16 + corner * 3)

    column = tl.minimum(e // 3, SIZE - 1)
    if _number(table, view, FLIP) != 0:
        column = SIZE - 1 - column
    x_whole, x_rest = _centre(column, width, SIZE)
    x_scale, x_reach = _scale(width, SIZE)
    y = first + tl.arange(0, ROWS)
    y_whole, y_rest = _centre(tl.minimum(y, SIZE - 1), height, SIZE)
    y_scale, y_reach = _scale(height, SIZE)
    top, _ = _centre(first, height, SIZE)
    bottom, _ = _centre(tl.minimum(first + ROWS, SIZE) - 1, height, SIZE)

    acc = tl.zeros([ROWS, ACROSS], tl.float32)
    acc_weight = tl.zeros([ROWS], tl.float32)
    end = tl.minimum(bottom + y_reach + 1, height)
    for start in range(tl.maximum(top - y_reach, 0), end, AT_ONCE):
        line = start + tl.arange(0, AT_ONCE)
        lines = base + (tl.minimum(line, height - 1).to(tl.int64) * pitch * 3)[:, None]
        across = tl.zeros([AT_ONCE, ACROSS], tl.float32)
        across_weight = tl.zeros([ACROSS], tl.float32)
        for tap in range(-x_reach, x_reach + 1):
            x = x_whole + tap
            weight = _cubic((tap + 0.5 - x_rest) * x_scale)
            weight = tl.where((x >= 0) & (x < width), weight, 0.0)
            x = tl.minimum(tl.maximum(x, 0), width - 1)  # no load needs a mask
            across += weight[None, :] * tl.load(lines + (x * 3 + e % 3)[None, :]).to(tl.float32)
            across_weight += weight
        across = _levels(across * tl.div_rn(1.0, across_weight)[None, :])
        distance = (line[None, :] - y_whole[:, None]).to(tl.float32) + 0.5 - y_rest[:, None]
        down = tl.where((line < height)[None, :], _cubic(distance * y_scale), 0.0)
        acc = tl.dot(down, across, acc, input_precision="ieee")
        acc_weight += tl.sum(down, 1)
    levels = _levels(acc * tl.div_rn(1.0, acc_weight)[:, None])
    _store_tile(crops + view * (3 * SIZE * SIZE), levels, y, e, SIZE)


@triton.jit
def _block(crops, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's view and block, which pixels are in it, and their colours in 0..1."""
    num_blocks: tl.constexpr = (SIZE * SIZE + BLOCK - 1) // BLOCK
    view = (tl.program_id(0) // num_blocks).to(tl.int64)
    block = tl.program_id(0) % num_blocks
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < SIZE * SIZE
    at = crops + view * (3 * SIZE * SIZE) + pixel * 3
    r = tl.load(at, mask=inside, other=0).to(tl.float32) * (1 / 255)
    g = tl.load(at + 1, mask=inside, other=0).to(tl.float32) * (1 / 255)
    b = tl.load(at + 2, mask=inside, other=0).to(tl.float32) * (1 / 255)
    return view, block, pixel, inside, r, g, b


@triton.jit
def _gray(r, g, b):
    return 0.2989 * r + 0.587 * g + 0.114 * b


@triton.jit
def _mix(x, other, factor):
    """Return factor parts of x and the rest of the other, clipped."""
    return tl.clamp(factor * x + (1 - factor) * other, 0.0, 1.0)


@triton.jit
def _turned(sector, value, chroma):
    """Return a channel from the hue in sixths of a turn, counted from where it is lowest."""
    k = sector - 6 * tl.floor(sector / 6)
    return value - chroma * tl.clamp(tl.minimum(k, 4 - k), 0.0, 1.0)


@triton.jit
def _hue(r, g, b, turns):
    """Turn the hue of HSV; value and saturation stay."""
    value = tl.maximum(r, tl.maximum(g, b))
    chroma = value - tl.minimum(r, tl.minimum(g, b))
    divisor = tl.where(chroma > 0, chroma, 1.0)
    sixths = tl.where(
        value == r,
        (g - b) / divisor,
        tl.where(value == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor),
    )
    sixths += 6 * turns
    return (
        _turned(sixths + 5, value, chroma),
        _turned(sixths + 3, value, chroma),
        _turned(sixths + 1, value, chroma),
    )


@triton.jit
def _step(table, view, slot, pivot, r, g, b):
    """Apply the jitter step of a slot; every pixel of a program takes the same branch."""
    step = _number(table, view, ORDER + slot).to(tl.int64)
    factor = _number(table, view, FACTOR + step % 4).to(tl.float32, bitcast=True)
    if step == 0:
        r, g, b = _mix(r, 0.0, factor), _mix(g, 0.0, factor), _mix(b, 0.0, factor)
    elif step == 1:
        r, g, b = _mix(r, pivot, factor), _mix(g, pivot, factor), _mix(b, pivot, factor)
    elif step == 2:
        gray = _gray(r, g, b)
        r, g, b = _mix(r, gray, factor), _mix(g, gray, factor), _mix(b, gray, factor)
    elif step == 3:
        r, g, b = _hue(r, g, b, factor)
    else:
        r, g, b = (
            tl.clamp(r + factor, 0.0, 1.0),
            tl.clamp(g + factor, 0.0, 1.0),
            tl.clamp(b + factor, 0.0, 1.0),
        )
    return r, g, b


@triton.jit
def _sum_gray(crops, table, sums, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Write each block's sum of the gray that the contrast step will see."""
    view, _, _, inside, r, g, b = _block(crops, SIZE, BLOCK)
    if _number(table, view, JITTER) != 0:
        slot = 0
        while _number(table, view, ORDER + slot) != 1:
            r, g, b = _step(table, view, slot, 0.0, r, g, b)
            slot += 1
        gray = tl.where(inside, _gray(r, g, b), 0.0)
        tl.store(sums + tl.program_id(0).to(tl.int64), tl.sum(gray))


@triton.jit
def _colour(
    crops,
    table,
    sums,
    unblurred,
    out,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Jitter in the drawn order, drop the colour, round; views to be blurred go elsewhere."""
    view, _, pixel, inside, r, g, b = _block(crops, SIZE, BLOCK)
    if _number(table, view, JITTER) != 0:
        num_blocks: tl.constexpr = (SIZE * SIZE + BLOCK - 1) // BLOCK
        part = tl.arange(0, SUMS)
        parts = tl.load(sums + view * num_blocks + part, mask=part < num_blocks, other=0.0)
        pivot = tl.sum(parts) / (SIZE * SIZE)
        for slot in range(4):
            r, g, b = _step(table, view, slot, pivot, r, g, b)
    if _number(table, view, GRAY) != 0:
        gray = _gray(r, g, b)
        r, g, b = gray, gray, gray
    r, g, b = _levels(r * 255), _levels(g * 255), _levels(b * 255)
    place = _number(table, view, BLURRED)
    if place < 0:
        _store_pixels(out + view * (3 * SIZE * SIZE) + pixel * 3, r, g, b, inside)
    else:
        at = unblurred + place.to(tl.int64) * (3 * SIZE * SIZE) + pixel * 3
        _store_pixels(at, r, g, b, inside)


@triton.jit
def _store_pixels(at, r, g, b, inside):
    TYPE: tl.constexpr = at.dtype.element_ty
    tl.store(at, _as(r, TYPE), mask=inside)
    tl.store(at + 1, _as(g, TYPE), mask=inside)
    tl.store(at + 2, _as(b, TYPE), mask=inside)


@triton.jit
def _mirrored(place, SIZE: tl.constexpr):
    """Reflect at the centre of the border's pixels; what is further out than one view is cut."""
    place = tl.abs(place)
    return tl.maximum(tl.where(place < SIZE, place, 2 * (SIZE - 1) - place), 0)


@triton.jit
def _blur(
    unblurred,
    table,
    out,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    ACROSS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Blur the chosen views; a Gaussian of their own sigma, reflected at the border."""
    place, first, e = _tile(SIZE, ROWS, ACROSS)
    view = _number(table, place, BLURRED_ROW).to(tl.int64)
    radius = _number(table, view, RADIUS)
    sigma = _number(table, view, SIGMA).to(tl.float32, bitcast=True)
    rate = -0.5 / (sigma * sigma)
    base = unblurred + place * (3 * SIZE * SIZE)
    y = first + tl.arange(0, ROWS)

    acc = tl.zeros([ROWS, ACROSS], tl.float32)
    weight = 0.0
    for tap in range(-radius, radius + 1):
        weight += tl.exp(rate * (tap * tap))
    for start in range(first - radius, tl.minimum(first + ROWS, SIZE) + radius, AT_ONCE):
        line = start + tl.arange(0, AT_ONCE)
        lines = base + (_mirrored(line, SIZE) * (3 * SIZE))[:, None]
        across = tl.zeros([AT_ONCE, ACROSS], tl.float32)
        for tap in range(-radius, radius + 1):
            x = _mirrored(e // 3 + tap, SIZE)
            level = tl.load(lines + (x * 3 + e % 3)[None, :]).to(tl.float32)
            across += tl.exp(rate * (tap * tap)) * level
        distance = line[None, :] - y[:, None]
        down = tl.exp(rate * (distance * distance).to(tl.float32))
        down = tl.where(tl.abs(distance) <= radius, down, 0.0)
        acc = tl.dot(down, across, acc, input_precision="ieee")
    levels = _levels(acc / (weight * weight))
    _store_tile(out + view * (3 * SIZE * SIZE), levels, y, e, SIZE)


def interpreted() -> bool:
    """Whether Triton interprets the kernels, on the CPU."""
    return not isinstance(_resize, triton.JITFunction)


_OPTIONS = {"num_warps": NUM_WARPS, "num_stages": 1, "enable_fp_fusion": True}


def _num_tiles(size: int) -> int:
    return triton.cdiv(3 * size, TILE["ACROSS"]) * triton.cdiv(size, TILE["ROWS"])


def resize(source: torch.Tensor, table: torch.Tensor, crops: torch.Tensor) -> None:
    """Crop, resize and flip: one launch.

    Args:
        source: uint8, packed images.
        table: int32 (N, COLUMNS).
        crops: uint8 (N, size, size, 3), written.
    """
    num_views, size = crops.shape[:2]
    _resize[(num_views * _num_tiles(size),)](source, table, crops, size, **TILE, **_OPTIONS)


def colour(
    crops: torch.Tensor, table: torch.Tensor, unblurred: torch.Tensor, out: torch.Tensor
) -> None:
    """Apply jitter and grayscale: two launches.

    Args:
        crops: uint8 (N, size, size, 3).
        table: int32 (N, COLUMNS).
        unblurred: uint8 (K, size, size, 3), written: the views that are to be blurred.
        out: uint8, or bfloat16 in 0..1, (N, size, size, 3), written: the others.
    """
    num_views, size = crops.shape[:2]
    num_blocks = triton.cdiv(size * size, BLOCK)
    sums = torch.empty(num_views, num_blocks, device=crops.device)
    grid = (num_views * num_blocks,)
    _sum_gray[grid](crops, table, sums, size, BLOCK, **_OPTIONS)
    at_once = triton.next_power_of_2(num_blocks)
    _colour[grid](crops, table, sums, unblurred, out, size, BLOCK, at_once, **_OPTIONS)


def blur(unblurred: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
    """Blur the chosen views: one launch, or none; arguments as above."""
    num_views, size = unblurred.shape[:2]
    if num_views:
        _blur[(num_views * _num_tiles(size),)](unblurred, table, out, size, **TILE, **_OPTIONS)


def configurations() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Yield what the launchers above ask of the compiler, at the usual sizes of views.

    Each is (name, jit function, Triton type of every argument, constants, warps, stages).
    """
    types = {"source": "*u8", "crops": "*u8", "unblurred": "*u8", "table": "*i32", "sums": "*fp32"}
    for size in (32, 96, 224):
        num_sums = triton.next_power_of_2(triton.cdiv(size * size, BLOCK))
        filters = {"SIZE": size, **TILE}
        blocks = {"SIZE": size, "BLOCK": BLOCK}
        variants = [("resize", _resize, filters, "*u8"), ("pivots", _sum_gray, blocks, "*u8")]
        for dtype, out in OUTPUTS.items():
            name = str(dtype).removeprefix("torch.")
            variants.append((f"colour {name}", _colour, {**blocks, "SUMS": num_sums}, out))
            variants.append((f"blur {name}", _blur, filters, out))
        for name, kernel, constexprs, out in variants:
            given = {**types, "out": out}
            signature = {n: given.get(n, "constexpr") for n in kernel.arg_names}
            yield f"augment {name} {size}", kernel, signature, constexprs, NUM_WARPS, 1
