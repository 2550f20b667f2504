# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# (A jit function's body is Triton's language in Python's syntax; Python's types do not hold there.)
"""NT-Xent on tensor cores: row sums and gradient in two passes over tiles, O(N D) memory.

Rows v are unit rows / sqrt(temperature); similarities s_ik = v_i.v_k are in nats and symmetric, so
the gradient needs no transposed pass, no atomics and, given all Z, no collective:

    Z_i = sum over k != i of exp(s_ik)          loss_i = ln Z_i - s_ip
    dL/dv = (W v - 2 v_p) / M,                  W_ik = exp(s_ik) (1/Z_i + 1/Z_k)

Each program owns a tile of anchors and walks over tiles of keys. Unit rows bound s by
1/temperature, so no running maximum is needed unless exp(-2/temperature) leaves float32. Masks live
in a branch that a whole program takes only where a tile holds the anchors themselves, their
positives or the end of the keys.

Every result is bitwise repeatable: tiles and splits are functions of shapes alone, and nothing is
added atomically.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

LARGEST_DIM = 512

# exp2 is the hardware's; the factor that makes nats bits joins the subtraction in one FFMA.
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
# W <= 2 is scaled into float16's range before it meets the tensor cores: 2^15 fits, and an average
# W of 2/M keeps all its bits up to a hundred million keys.
_SCALE_BITS = tl.constexpr(14)
_SIZES = ("N", "M", "first", "chunk")  # one program for all
_LOWEST = tl.constexpr(-1e30)  # a running maximum of nothing; infinite, it would make NaN of 0


@triton.jit
def _meets(key, first, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Whether keys [key, key + KEYS) hold any of [first, first + ROWS)."""
    return (key < first + ROWS) & (key + KEYS > first)


@triton.jit
def _tile(place, count, D: tl.constexpr, HEIGHT: tl.constexpr):
    """Return offsets from row ``place`` of a (count, D) matrix to HEIGHT rows, and which exist.

    32 bits hold these; the pointer to the row itself moves by 64.
    """
    height = tl.arange(0, HEIGHT)
    return height[:, None] * D + tl.arange(0, D)[None, :], (place + height < count)[:, None]


@triton.jit
def _rise(peak, x):
    """Return the maximum of peak and x, what it shrinks sums by, and the powers of two of x."""
    risen = tl.maximum(peak, tl.max(x, 1))
    return risen, tl.exp2(peak - risen), tl.exp2(x - risen[:, None])


@triton.jit(do_not_specialize=_SIZES)
def _forward(
    rows,
    keys,
    bound,
    views,
    stat,
    ranking,
    N,
    M,
    first,
    chunk,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write Z (with a bound) or ln Z of ROWS anchors over ``chunk`` keys; see forward()."""
    place = tl.program_id(0) * ROWS
    start = tl.program_id(1) * chunk
    row = place + tl.arange(0, ROWS)
    own = first + row
    half = N // 2
    row_offsets, row_inside = _tile(place, N, D, ROWS)
    anchors = tl.load(rows + place.to(tl.int64) * D + row_offsets, mask=row_inside, other=0.0)
    base = keys + start.to(tl.int64) * D
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], _LOWEST, tl.float32)
    shift = 0.0
    if bound is not None:
        shift = tl.load(bound) * _LOG2E
    if views is not None:
        positive = tl.where(row < half, own + half, own - half)
        other_view = tl.where(row < half, 1, 0)
        candidates_total = tl.zeros([ROWS], tl.float32)
        candidates_dot = tl.zeros([ROWS], tl.float32)
        candidates_peak = tl.full([ROWS], _LOWEST, tl.float32)
        rival = tl.full([ROWS], float("-inf"), tl.float32)
    for key in range(start, tl.minimum(start + chunk, M), KEYS):
        column = key + tl.arange(0, KEYS)
        offsets, inside = _tile(key, M, D, KEYS)
        tile = tl.load(base + offsets, mask=inside, other=0.0)
        base += KEYS * D
        s = tl.dot(anchors, tl.trans(tile), input_precision="ieee")
        x = s * _LOG2E - shift
        if _meets(key, first + place, ROWS, KEYS) | (key + KEYS > M):
            keep = (own[:, None] != column[None, :]) & (column < M)[None, :]
            x = tl.where(keep, x, float("-inf"))
        if bound is not None:
            total += tl.sum(tl.exp2(x), 1)
        else:
            peak, shrink, e = _rise(peak, x)
            total = total * shrink + tl.sum(e, 1)
        if views is not None:
            # Its own maximum: all candidates may lie far below the largest similarity.
            view = tl.load(views + column, mask=column < M, other=2)
            candidate = view[None, :] == other_view[:, None]
            x = tl.where(candidate, s * _LOG2E, float("-inf"))
            candidates_peak, shrink, e = _rise(candidates_peak, x)
            candidates_total = candidates_total * shrink + tl.sum(e, 1)
            candidates_dot = candidates_dot * shrink + tl.sum(e * s, 1)
            rivals = candidate & (column[None, :] != positive[:, None])
            rival = tl.maximum(rival, tl.max(tl.where(rivals, s, float("-inf")), 1))
    out = tl.program_id(1) * N + row
    if bound is None:
        total = (peak + tl.log2(total)) * _LN2
    tl.store(stat + out, total, mask=row < N)
    if views is not None:
        empty = candidates_total == 0
        lse = (candidates_peak + tl.log2(candidates_total)) * _LN2
        mean = tl.where(empty, 0.0, candidates_dot / tl.where(empty, 1.0, candidates_total))
        # A maximum passes over NaN; the sum does not.
        rival = tl.where(candidates_total == candidates_total, rival, candidates_total)
        tl.store(ranking + out * 3, lse, mask=row < N)
        tl.store(ranking + out * 3 + 1, mean, mask=row < N)
        tl.store(ranking + out * 3 + 2, rival, mask=row < N)


@triton.jit(do_not_specialize=_SIZES)
def _gradient(
    rows,
    row_weight,
    keys,
    key_weight,
    bound,
    out,
    N,
    M,
    first,
    chunk,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write W v - 2 v_p of ROWS anchors over ``chunk`` keys; see gradient().

    Weights are 1/Z with a bound; without, log2 of Z less the bits of the scale.
    """
    place = tl.program_id(0) * ROWS
    start = tl.program_id(1) * chunk
    row = place + tl.arange(0, ROWS)
    own = first + row
    half = N // 2
    row_offsets, row_inside = _tile(place, N, D, ROWS)
    anchors = tl.load(rows + place.to(tl.int64) * D + row_offsets, mask=row_inside, other=0.0)
    weight = tl.load(row_weight + row, mask=row < N, other=0.0)
    base = keys + start.to(tl.int64) * D
    result = tl.zeros([ROWS, D], tl.float32)
    if bound is not None:
        shift = tl.load(bound) * _LOG2E - _SCALE_BITS
    for key in range(start, tl.minimum(start + chunk, M), KEYS):
        column = key + tl.arange(0, KEYS)
        offsets, inside = _tile(key, M, D, KEYS)
        tile = tl.load(base + offsets, mask=inside, other=0.0)
        base += KEYS * D
        other = tl.load(key_weight + column, mask=column < M, other=0.0)
        s = tl.dot(anchors, tl.trans(tile), input_precision="ieee")
        if bound is not None:
            w = tl.exp2(s * _LOG2E - shift) * (weight[:, None] + other[None, :])
        else:
            w = tl.exp2(s * _LOG2E - weight[:, None]) + tl.exp2(s * _LOG2E - other[None, :])
        special = _meets(key, first + place, ROWS, KEYS) | (key + KEYS > M)
        special |= _meets(key, first + place + half, ROWS, KEYS)
        special |= _meets(key, first + place - half, ROWS, KEYS)
        if special:
            w = tl.where((own[:, None] != column[None, :]) & (column < M)[None, :], w, 0.0)
            positive = tl.where(row < half, own + half, own - half)
            # In float32: after the rounding to float16, 2 - W_ip of a converged pair is noise.
            w = tl.where(positive[:, None] == column[None, :], w - 2.0 * 2**_SCALE_BITS, w)
        result = tl.dot(w.to(tile.dtype), tile, result, input_precision="ieee")
    base = out + (tl.program_id(1) * N + place).to(tl.int64) * D
    tl.store(base + row_offsets, result * 2**-_SCALE_BITS, mask=row_inside)


class Tiling(NamedTuple):
    """How one program is cut and run.

    Attributes:
        rows: Anchors of a program, a power of two >= 16.
        keys: Keys of one step, a power of two >= 16.
        num_warps: Warps of a program.
        num_stages: Key tiles in flight.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


# By pass and columns, chosen by compiling (benchmarks/kernels_aot.py): large tiles that spill
# nothing on sm_80, 89, 90, 100 and 120 and fit the 99 KiB of shared memory of the smallest chips.
# Fixed rather than autotuned, so that a run repeats bit by bit.
TILINGS: dict[str, dict[int, Tiling]] = {
    "forward": {
        **dict.fromkeys((16, 32, 64, 128), Tiling(256, 64, 8, 3)),
        256: Tiling(128, 64, 8, 2),
        512: Tiling(64, 32, 8, 2),
    },
    "ranking": {
        **dict.fromkeys((16, 32, 64, 128), Tiling(128, 64, 8, 3)),
        256: Tiling(64, 64, 8, 2),
        512: Tiling(64, 32, 8, 2),
    },
    "gradient": {
        **dict.fromkeys((16, 32, 64), Tiling(128, 128, 8, 3)),
        128: Tiling(128, 64, 8, 3),
        256: Tiling(64, 64, 8, 2),
        512: Tiling(64, 16, 8, 3),
    },
}

# Fewer programs than this leave a chip of 108 to 148 multiprocessors idle: keys are split.
_FULL_CHIP = 128


def unavailable(device: torch.device) -> str | None:
    """Return why these kernels cannot run on a device, or None if they can."""
    if not isinstance(_forward, triton.JITFunction):
        return None  # TRITON_INTERPRET=1 was set before the import: any device, slowly
    if device.type != "cuda":
        return f"rows are on {device.type}, and Triton compiles for CUDA devices"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


def prepare(rows_ND: torch.Tensor, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Return rows as the kernels take them, (N, D'): contiguous, zero columns up to a power of two.

    Args:
        rows_ND: Unit rows / sqrt(temperature), D <= :data:`LARGEST_DIM`.
        dtype: float16, or float32 for validation. bfloat16 is refused: at the same speed its
            gradient is eight times less exact.

    Raises:
        ValueError: On more columns or another dtype.
    """
    dim = rows_ND.shape[1]
    if dim > LARGEST_DIM:
        raise ValueError(
            f"rows have {dim} columns and the kernels hold {LARGEST_DIM} on a chip: "
            "use impl='blocked', or a narrower projection."
        )
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(f"kernels multiply float16 or float32, not {dtype}.")
    padded = max(16, triton.next_power_of_2(dim))
    return F.pad(rows_ND.to(dtype), (0, padded - dim)).contiguous()


class _Launch(NamedTuple):
    """Grid and last arguments of one launch.

    Attributes:
        grid: Row tiles and splits of the keys.
        scalars: N, M, first and chunk.
        options: Tile sizes and what the compiler is told.
    """

    grid: tuple[int, int]
    scalars: tuple[int, int, int, int]
    options: dict[str, Any]


def _plan(
    tilings: dict[int, Tiling], rows_ND: torch.Tensor, keys_MD: torch.Tensor, first: int
) -> _Launch:
    """Cut the work: a function of shapes alone, so the same on every device and in every run."""
    (num_rows, dim), num_keys = rows_ND.shape, len(keys_MD)
    assert num_rows % 2 == 0, "rows are two views of the same images"
    assert keys_MD.shape[1] == dim and keys_MD.dtype == rows_ND.dtype, "prepare() both alike"
    assert first == -1 or 0 <= first <= num_keys - num_rows, "the rows are among the keys, or not"
    tiling = tilings[dim]
    # A rank may have no image: one program then finds nothing.
    row_tiles = max(1, triton.cdiv(num_rows, tiling.rows))
    key_tiles = max(1, triton.cdiv(num_keys, tiling.keys))
    splits = max(1, min(_FULL_CHIP // row_tiles, key_tiles // 2))
    chunk = triton.cdiv(key_tiles, splits) * tiling.keys
    if first == -1:
        first = -num_rows  # the rows, and with them their positives, end before key 0
    options = {
        "D": dim,
        "ROWS": tiling.rows,
        "KEYS": tiling.keys,
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
        "enable_fp_fusion": True,  # the default changes with Triton's version
    }
    grid = (row_tiles, triton.cdiv(key_tiles * tiling.keys, chunk))
    return _Launch(grid, (num_rows, num_keys, first, chunk), options)


def forward(
    rows_ND: torch.Tensor,
    keys_MD: torch.Tensor,
    first: int,
    bound: torch.Tensor | None,
    view_M: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return each anchor's Z over these keys, and how its positive ranks if views are given.

    Args:
        rows_ND: Anchors from :func:`prepare`, view-major: row j's positive is (j + N/2) mod N.
        keys_MD: Rows to compare them with, prepared alike.
        first: The anchors are keys first .. first + N, each left out for itself; -1 if none is.
        bound: 0-d float32 on the device, at least every similarity (1/temperature) and at most
            40 nats (temperature 0.025), or exp(-2 bound) is 0; None for any similarities, at the
            price of a running maximum.
        view_M: int8, 0 or 1: view of each key. Candidates of an anchor are keys of the other view.

    Returns:
        stat_N: float32. Sum over k of exp(s_ik - bound), or its natural logarithm (of exp(s_ik))
            without a bound. Of keys in parts: sums add, logarithms by logaddexp.
        ranking_N3: None without views. float32: ln sum over candidates of exp(s), their mean s
            weighted by exp(s), and the largest s but the positive's; (-inf, 0, -inf) of none. The
            first minus the second is the entropy.
    """
    tilings = TILINGS["forward" if view_M is None else "ranking"]
    grid, scalars, options = _plan(tilings, rows_ND, keys_MD, first)
    num_rows, splits = scalars[0], grid[1]
    stat_SN = torch.empty(splits, num_rows, dtype=torch.float32, device=rows_ND.device)
    ranking_SN3 = None if view_M is None else stat_SN.new_empty(splits, num_rows, 3)
    with torch.cuda.device_of(rows_ND):
        _forward[grid](rows_ND, keys_MD, bound, view_M, stat_SN, ranking_SN3, *scalars, **options)
    stat_N = stat_SN.logsumexp(0) if bound is None else stat_SN.sum(0)
    return stat_N, None if ranking_SN3 is None else merge_rankings(ranking_SN3)


def merge_rankings(ranking_SN3: torch.Tensor) -> torch.Tensor:
    """Return the ranking over all keys, (N, 3), from those over S parts; see :func:`forward`."""
    lse_SN, mean_SN, rival_SN = ranking_SN3.unbind(2)
    lse_N = lse_SN.logsumexp(0)
    # Of no candidate at all the weights are 0/0: exp(-inf - -inf).
    weight_SN = torch.where(lse_N == float("-inf"), 0.0, (lse_SN - lse_N).exp())
    return torch.stack([lse_N, (weight_SN * mean_SN).sum(0), rival_SN.amax(0)], 1)


def gradient(
    rows_ND: torch.Tensor,
    stat_N: torch.Tensor,
    keys_MD: torch.Tensor,
    stat_M: torch.Tensor,
    first: int,
    bound: torch.Tensor | None,
) -> torch.Tensor:
    """Return W v - 2 v_p of each anchor over these keys, float32 (N, D').

    The 2 v_p is there where the anchors are among the keys; the results of keys in parts add.

    Args:
        rows_ND: Anchors, as for :func:`forward`.
        stat_N: Of the anchors, over all keys of all parts, from :func:`forward`.
        keys_MD: Rows to compare them with.
        stat_M: Of the keys, over all keys of all parts.
        first: As for :func:`forward`.
        bound: As for :func:`forward`.
    """
    grid, scalars, options = _plan(TILINGS["gradient"], rows_ND, keys_MD, first)
    row_weight, key_weight = (
        stat * _LOG2E.value - _SCALE_BITS.value if bound is None else 1 / stat
        for stat in (stat_N, stat_M)
    )
    shape_SND = (grid[1], *rows_ND.shape)
    result_SND = torch.empty(shape_SND, dtype=torch.float32, device=rows_ND.device)
    with torch.cuda.device_of(rows_ND):
        _gradient[grid](
            rows_ND, row_weight, keys_MD, key_weight, bound, result_SND, *scalars, **options
        )
    return result_SND[0] if len(result_SND) == 1 else result_SND.sum(0)


def configurations() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Yield what the launchers above can ask of the compiler for float16 rows.

    Each is (name, jit function, Triton type of every argument, constants, warps, stages). One
    program serves all N and M: integers are not specialised.
    """
    for kind, tilings in TILINGS.items():
        kernel = _gradient if kind == "gradient" else _forward
        types = {
            **dict.fromkeys(("rows", "keys"), "*fp16"),
            "views": "*i8",
            **dict.fromkeys(_SIZES, "i32"),
            **dict.fromkeys(("D", "ROWS", "KEYS"), "constexpr"),
        }
        signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
        for dim, tiling in tilings.items():
            sizes = {"D": dim, "ROWS": tiling.rows, "KEYS": tiling.keys}
            for variant, absent in (("bounded", ()), ("online", ("bound",))):
                if kind == "forward":
                    absent = (*absent, "views", "ranking")
                constants = {**sizes, **dict.fromkeys(absent)}
                present = signature | dict.fromkeys(absent, "constexpr")
                name = f"nt_xent {kind} {variant} D={dim}"
                yield name, kernel, present, constants, tiling.num_warps, tiling.num_stages
