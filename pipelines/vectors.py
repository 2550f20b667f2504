# pyright: basic, reportCallIssue=false, reportPrivateImportUsage=false
# (Bodies of intrinsics build LLVM's language; numba exports without saying so.)
"""What the CPU kernels do with vectors of 16 elements, written in LLVM's own words.

numba's compiler finds such loops by itself only where it can prove them, with tests at every
start that cost more than rows of an image. LLVM turns the vectors into what the machine has.
Nothing here checks an index. numba keeps a kernel until the kernel's own file changes: after a
change of this one delete ``pipelines/__pycache__``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

BLOCK = 16  # elements of a vector
BITS = 22  # Pillow's precision of a weight: 32 less 8 for the level and 2 for sums that overshoot

_i8, _i32, _i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_LEVELS, _PAIRS, _SUMS = (ir.VectorType(kind, BLOCK) for kind in (_i8, ir.IntType(16), _i32))
_FLOATS = ir.VectorType(ir.FloatType(), BLOCK)


def compiled(signature: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at once, for one signature; keep the result on disk where there is a place."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(signature, cache=True, **options)(function)
    except RuntimeError:  # neither __pycache__ nor the user's cache can be written
        return njit(signature, **options)(function)


@intrinsic
def fma(context, a, b, c):
    """Compute a * b + c in one rounding."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return a(a, b, c), generate


@intrinsic
def bytes_at(context, address):
    """Turn an address into a pointer to bytes."""
    pointer = types.CPointer(types.uint8)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address), generate


@intrinsic
def call_c(context, address, arguments):
    """Call a C function of up to 64-bit integers and pointers; of its answer trust what it has."""

    def generate(context, builder, signature, values):
        address, values = values
        values = cgutils.unpack_tuple(builder, values, signature.args[1].count)
        function = ir.FunctionType(_i64, [_i64] * len(values))
        return builder.call(builder.inttoptr(address, function.as_pointer()), values)

    return types.int64(types.int64, types.UniTuple(types.int64, arguments.count)), generate


def _pointer(context, builder, array_type, array, index):
    """Point at an element of an array of one dimension."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _splat(builder, value, vector):
    """Repeat a number over a vector."""
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, _i32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_SUMS, [0] * BLOCK))


def _load(builder, pointer, vector=_LEVELS):
    return builder.load(builder.bitcast(pointer, vector.as_pointer()), align=1)


def _store(builder, value, pointer):
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=1)


@intrinsic
def sum_block(context, levels, start, step, weights, first, num_taps, out, place):
    """Weigh blocks of levels, ``step`` apart, by weights from ``first`` on; write one of levels.

    In int32, as Pillow; numba's own operators would go on in int64.
    """

    def generate(context, builder, signature, arguments):
        levels, start, step, weights, first, num_taps, out, place = arguments
        types_ = signature.args
        levels = _pointer(context, builder, types_[0], levels, start)
        weights = _pointer(context, builder, types_[3], weights, first)
        sums = cgutils.alloca_once_value(builder, ir.Constant(_SUMS, [1 << (BITS - 1)] * BLOCK))
        with cgutils.for_range_slice(builder, _i64(0), num_taps, _i64(4), _i64) as (k, _):
            total = builder.load(sums)
            for more in range(4):
                tap = builder.add(k, _i64(more))
                level = _load(builder, builder.gep(levels, [builder.mul(tap, step)]))
                weight = _splat(builder, builder.load(builder.gep(weights, [tap])), _SUMS)
                total = builder.add(total, builder.mul(builder.zext(level, _SUMS), weight))
            builder.store(total, sums)
        total = builder.ashr(builder.load(sums), ir.Constant(_SUMS, [BITS] * BLOCK))
        for sign, end in ((">", 0), ("<", 255)):
            end = ir.Constant(_SUMS, [end] * BLOCK)
            total = builder.select(builder.icmp_signed(sign, total, end), total, end)
        out = _pointer(context, builder, types_[6], out, place)
        _store(builder, builder.trunc(total, _LEVELS), out)
        return context.get_dummy_value()

    return types.void(levels, start, step, weights, first, num_taps, out, place), generate


@intrinsic
def turn_block(context, source, start, stride, last, out, place, out_stride):
    """Write the columns of 16 x 16 bytes as rows; rows behind the last are repetitions of it."""

    def generate(context, builder, signature, arguments):
        source, start, stride, last, out, place, out_stride = arguments
        source = _pointer(context, builder, signature.args[0], source, start)
        out = _pointer(context, builder, signature.args[4], out, place)
        rows = []
        for r in range(BLOCK):
            row = builder.select(builder.icmp_signed("<", last, _i64(r)), last, _i64(r))
            rows.append(_load(builder, builder.gep(source, [builder.mul(row, stride)])))
        half = BLOCK // 2
        for _ in range(
            4
        ):  # each shuffles rows r and r + 8 together: a perfect shuffle of all bytes
            turned = []
            for r in range(half):
                for offset in (0, half):
                    mask = [offset + k // 2 + k % 2 * BLOCK for k in range(BLOCK)]
                    mask = ir.Constant(ir.VectorType(_i32, BLOCK), mask)
                    turned.append(builder.shuffle_vector(rows[r], rows[r + half], mask))
            rows = turned
        for r in range(BLOCK):
            _store(builder, rows[r], builder.gep(out, [builder.mul(_i64(r), out_stride)]))
        return context.get_dummy_value()

    return types.void(source, start, stride, last, out, place, out_stride), generate


def _add_weighted(builder, total, value, weight):
    value = builder.fmul(value, _splat(builder, weight, _FLOATS), flags=("contract",))
    return builder.fadd(total, value, flags=("contract",))


@intrinsic
def blur_down_block(context, levels, place, offsets, weights, radius, out):
    """Weigh blocks of levels, ``place`` behind the offsets of 2 radius + 1 rows; write floats.

    The weights are those of the first row to the middle one; the rest mirrors them.
    """

    def generate(context, builder, signature, arguments):
        levels, place, offsets, weights, radius, out = arguments
        of = signature.args
        levels = _pointer(context, builder, of[0], levels, place)
        offsets = _pointer(context, builder, of[2], offsets, _i64(0))
        weights = _pointer(context, builder, of[3], weights, _i64(0))

        def row(k):
            offset = builder.load(builder.gep(offsets, [k]))
            return builder.zext(_load(builder, builder.gep(levels, [offset])), _PAIRS)

        def weight(k):
            return builder.load(builder.gep(weights, [k]))

        middle = builder.uitofp(row(radius), _FLOATS)
        first = _add_weighted(builder, ir.Constant(_FLOATS, [0.0] * BLOCK), middle, weight(radius))
        sums = cgutils.alloca_once_value(builder, first)
        last = builder.add(radius, radius)
        with cgutils.for_range(builder, radius) as loop:
            k = loop.index
            both = builder.add(row(k), row(builder.sub(last, k)))
            both = builder.uitofp(both, _FLOATS)
            builder.store(_add_weighted(builder, builder.load(sums), both, weight(k)), sums)
        _store(builder, builder.load(sums), _pointer(context, builder, of[5], out, place))
        return context.get_dummy_value()

    return types.void(levels, place, offsets, weights, radius, out), generate


@intrinsic
def blur_across_block(context, row, place, weights, radius, out, start):
    """Weigh floats at ``place`` and 3, 6, ... behind it; write levels, halves rounded to even."""

    def generate(context, builder, signature, arguments):
        row, place, weights, radius, out, start = arguments
        of = signature.args
        row = _pointer(context, builder, of[0], row, place)
        weights = _pointer(context, builder, of[2], weights, _i64(0))

        def pixel(k):
            return _load(builder, builder.gep(row, [builder.mul(k, _i64(3))]), _FLOATS)

        def weight(k):
            return builder.load(builder.gep(weights, [k]))

        zero = ir.Constant(_FLOATS, [0.0] * BLOCK)
        first = _add_weighted(builder, zero, pixel(radius), weight(radius))
        sums = cgutils.alloca_once_value(builder, first)
        last = builder.add(radius, radius)
        with cgutils.for_range(builder, radius) as loop:
            k = loop.index
            both = builder.fadd(pixel(k), pixel(builder.sub(last, k)))
            builder.store(_add_weighted(builder, builder.load(sums), both, weight(k)), sums)
        # Beside 1.5 * 2^23 no fraction has room; the level is in the last bits.
        rounded = builder.fadd(builder.load(sums), ir.Constant(_FLOATS, [12582912.0] * BLOCK))
        level = builder.trunc(builder.bitcast(rounded, _SUMS), _LEVELS)
        _store(builder, level, _pointer(context, builder, of[4], out, builder.add(start, place)))
        return context.get_dummy_value()

    return types.void(row, place, weights, radius, out, start), generate
