# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# (A jit function's body is Triton's language in Python's syntax; Python's types do not hold there.)
"""LARS on a GPU in two passes over memory, each one launch over all tensors.

Tensors are cut into chunks; a program takes one, and finds weights, gradient and momentum by their
addresses. Pass 1 sums the squares of each chunk, and a small launch those of each tensor's chunks,
in a fixed order and in double precision: no atomics, bitwise repeatable, nothing over- or
underflows. Pass 2 decays, scales, and updates momentum and weight.

Takes what :mod:`fastclr.kernels.lars_torch` takes. Interpreted and compiled ahead of time in the
tests; ``make gpu-check`` runs it on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastclr.kernels import KernelUnavailable

CHUNK = 4096  # elements of a program; 16 a thread
NUM_WARPS = 8
CHUNKS_AT_ONCE = 1024  # that the second level of a sum takes in one round
TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


@triton.jit
def _address(address_KS, kind, segment, num_segments):
    """Return where weights (kind 0), gradient (1) or momentum (2) of a segment begin."""
    return tl.load(address_KS + (kind * num_segments + segment))


@triton.jit
def _sums(w_base, g_base, left, weight_decay, WHOLE: tl.constexpr, CHUNK: tl.constexpr):
    """Sum the squares of a chunk of weights and of its decayed gradient, in double precision."""
    offset = tl.arange(0, CHUNK)
    if WHOLE:  # without a mask, and aligned: 16 bytes a load
        w = tl.load(tl.multiple_of(w_base + offset, 16))
        g = tl.load(tl.multiple_of(g_base + offset, 16))
    else:
        w = tl.load(w_base + offset, mask=offset < left, other=0.0)
        g = tl.load(g_base + offset, mask=offset < left, other=0.0)
    w = w.to(tl.float32)
    d = (g.to(tl.float32) + weight_decay * w).to(tl.float64)
    w = w.to(tl.float64)
    return tl.sum(w * w), tl.sum(d * d)


@triton.jit(do_not_specialize=["num_segments"])
def _sum_chunks(
    address_KS,
    numel_S,
    segment_C,
    start_C,
    sums_C2,
    num_segments,
    weight_decay,
    TYPE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Pass 1: program c writes the two sums of chunk c."""
    chunk = tl.program_id(0).to(tl.int64)
    segment = tl.load(segment_C + chunk)
    start = tl.load(start_C + chunk)
    left = tl.load(numel_S + segment) - start
    w_address = _address(address_KS, 0, segment, num_segments)
    g_address = _address(address_KS, 1, segment, num_segments)
    w_base = w_address.to(tl.pointer_type(TYPE)) + start
    g_base = g_address.to(tl.pointer_type(TYPE)) + start
    if (left >= CHUNK) & ((w_address | g_address) % 16 == 0):
        w_sum, d_sum = _sums(w_base, g_base, left, weight_decay, True, CHUNK)
    else:
        w_sum, d_sum = _sums(w_base, g_base, left, weight_decay, False, CHUNK)
    tl.store(sums_C2 + 2 * chunk, w_sum)
    tl.store(sums_C2 + 2 * chunk + 1, d_sum)


@triton.jit
def _sum_segments(first_S, sums_C2, sumsq_S2, AT_ONCE: tl.constexpr):
    """Between the passes: program (s, j) sums column j over the chunks of segment s, in order."""
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64)
    first = tl.load(first_S + segment)
    end = tl.load(first_S + (segment + 1))
    total = tl.zeros([AT_ONCE], tl.float64)
    for begin in range(first, end, AT_ONCE):
        chunk = begin + tl.arange(0, AT_ONCE)
        total += tl.load(sums_C2 + 2 * chunk + column, mask=chunk < end, other=0.0)
    tl.store(sumsq_S2 + 2 * segment + column, tl.sum(total))


@triton.jit
def _step(
    w_base,
    g_base,
    v_base,
    left,
    scale,
    rate,
    weight_decay,
    momentum,
    NESTEROV: tl.constexpr,
    WHOLE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Update one chunk."""
    offset = tl.arange(0, CHUNK)
    if WHOLE:
        w_at = tl.multiple_of(w_base + offset, 16)
        g_at = tl.multiple_of(g_base + offset, 16)
        v_at = tl.multiple_of(v_base + offset, 16)
        w, g, v = tl.load(w_at), tl.load(g_at), tl.load(v_at)
    else:
        mask = offset < left
        w_at, g_at, v_at = w_base + offset, g_base + offset, v_base + offset
        w, g, v = tl.load(w_at, mask=mask), tl.load(g_at, mask=mask), tl.load(v_at, mask=mask)
    w = w.to(tl.float32)
    d = scale.to(tl.float32) * (g.to(tl.float32) + weight_decay * w)
    v = momentum * v.to(tl.float32) + d
    w -= rate * (d + momentum * v if NESTEROV else v)
    if WHOLE:
        tl.store(v_at, v)
        tl.store(w_at, w)
    else:
        tl.store(v_at, v, mask=mask)
        tl.store(w_at, w, mask=mask)


@triton.jit(do_not_specialize=["num_segments"])
def _update_chunks(
    address_KS,
    numel_S,
    segment_C,
    start_C,
    scale_S,
    num_segments,
    rate,
    weight_decay,
    momentum,
    NESTEROV: tl.constexpr,
    TYPE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Pass 2: program c updates chunk c."""
    chunk = tl.program_id(0).to(tl.int64)
    segment = tl.load(segment_C + chunk)
    start = tl.load(start_C + chunk)
    left = tl.load(numel_S + segment) - start
    scale = tl.load(scale_S + segment)
    w_address = _address(address_KS, 0, segment, num_segments)
    g_address = _address(address_KS, 1, segment, num_segments)
    v_address = _address(address_KS, 2, segment, num_segments)
    w_base = w_address.to(tl.pointer_type(TYPE)) + start
    g_base = g_address.to(tl.pointer_type(TYPE)) + start
    v_base = v_address.to(tl.pointer_type(TYPE)) + start
    if (left >= CHUNK) & ((w_address | g_address | v_address) % 16 == 0):
        _step(
            w_base, g_base, v_base, left, scale, rate, weight_decay, momentum,
            NESTEROV, True, CHUNK,
        )  # fmt: skip
    else:
        _step(
            w_base, g_base, v_base, left, scale, rate, weight_decay, momentum,
            NESTEROV, False, CHUNK,
        )  # fmt: skip


class Chunks(NamedTuple):
    """How tensors of given sizes are cut; C chunks of S segments, all int64 on the device.

    Attributes:
        numel_S: Elements.
        first_S: First chunk of each segment, and after the last the number of all: S + 1.
        segment_C: Segment of each chunk.
        start_C: First element of each chunk in its segment.
    """

    numel_S: torch.Tensor
    first_S: torch.Tensor
    segment_C: torch.Tensor
    start_C: torch.Tensor


@functools.lru_cache(maxsize=64)  # a handful of groups and buffers
def cut(numels: tuple[int, ...], device: torch.device) -> Chunks:
    """Cut tensors into chunks."""
    with torch.device("cpu"):  # whatever the default is
        numel_S = torch.tensor(numels)
        first_S = torch.nn.functional.pad(((numel_S + CHUNK - 1) // CHUNK).cumsum(0), (1, 0))
        segment_C = torch.repeat_interleave(torch.arange(len(numels)), first_S.diff())
        start_C = (torch.arange(len(segment_C)) - first_S[segment_C]) * CHUNK
    return Chunks(*(_to(t, device) for t in (numel_S, first_S, segment_C, start_C)))


@functools.lru_cache(maxsize=64)  # gradients mostly come back to where they were
def _addresses(addresses: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """Put addresses of tensors, (kind, segment), on the device."""
    return _to(torch.tensor(addresses, device="cpu"), device)


def _to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device without waiting for it."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def check(tensor: torch.Tensor) -> None:
    """Check that the kernels can take a tensor.

    Raises:
        KernelUnavailable: If it lies where none of them runs, or is of another type.
    """
    interpreted = not isinstance(_sum_chunks, triton.JITFunction)
    reason = None
    if tensor.device.type != ("cpu" if interpreted else "cuda"):
        reason = f"weights on {tensor.device}: Triton's kernels run on CUDA"
    elif tensor.dtype not in TYPES:
        reason = f"weights in {tensor.dtype}: its kernels compute in single precision"
    if reason:
        raise KernelUnavailable(f"LARS(impl='triton') was given {reason}. Use impl='auto'.")


def _table(*kinds: list[torch.Tensor]) -> tuple[torch.Tensor, Chunks]:
    """Return addresses and chunks of tensors."""
    check(kinds[0][0])
    device = kinds[0][0].device
    addresses = tuple(tuple(tensor.data_ptr() for tensor in kind) for kind in kinds)
    numels = tuple(tensor.numel() for tensor in kinds[0])
    return _addresses(addresses, device), cut(numels, device)


def sums_of_squares(
    w: list[torch.Tensor], g: list[torch.Tensor], weight_decay: float
) -> torch.Tensor:
    """Sum the squares of weights and decayed gradients; see :mod:`fastclr.kernels.lars_torch`."""
    address_KS, chunks = _table(w, g)
    num_chunks, num_segments = len(chunks.segment_C), len(w)
    double = {"dtype": torch.float64, "device": w[0].device}
    sums_C2 = torch.empty(num_chunks, 2, **double)
    sumsq_S2 = torch.empty(num_segments, 2, **double)
    if num_chunks:
        _sum_chunks[(num_chunks,)](
            address_KS, chunks.numel_S, chunks.segment_C, chunks.start_C, sums_C2,
            num_segments, weight_decay, TYPES[w[0].dtype], CHUNK,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    _sum_segments[(num_segments, 2)](
        chunks.first_S, sums_C2, sumsq_S2, CHUNKS_AT_ONCE,
        num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return sumsq_S2


def update(
    w: list[torch.Tensor],
    g: list[torch.Tensor],
    v: list[torch.Tensor],
    *,
    scale: torch.Tensor | float,
    rate: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
) -> None:
    """Update weights and momenta in place; see :mod:`fastclr.kernels.lars_torch`."""
    address_KS, chunks = _table(w, g, v)
    scale_S = torch.empty(len(w), dtype=torch.float64, device=w[0].device)
    scale_S[:] = scale
    if num_chunks := len(chunks.segment_C):
        _update_chunks[(num_chunks,)](
            address_KS, chunks.numel_S, chunks.segment_C, chunks.start_C, scale_S,
            len(w), rate, weight_decay, momentum, nesterov, TYPES[w[0].dtype], CHUNK,
            num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def configurations() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Yield what the launchers above can ask of the compiler.

    Each is (name, jit function, Triton type of every argument, constants, warps, stages).
    """
    types = {
        **dict.fromkeys(("address_KS", "numel_S", "segment_C", "start_C", "first_S"), "*i64"),
        **dict.fromkeys(("sums_C2", "sumsq_S2", "scale_S"), "*fp64"),
        **dict.fromkeys(("rate", "weight_decay", "momentum"), "fp32"),
        "num_segments": "i32",
    }
    for dtype, type_ in TYPES.items():
        constants = {"TYPE": type_, "CHUNK": CHUNK}
        variants = [("sums", _sum_chunks, constants)]
        for nesterov in (False, True):
            name = "update nesterov" if nesterov else "update"
            variants.append((name, _update_chunks, {"NESTEROV": nesterov, **constants}))
        if dtype == torch.float32:
            variants.append(("sums of sums", _sum_segments, {"AT_ONCE": CHUNKS_AT_ONCE}))
        for name, kernel, constexprs in variants:
            signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
            suffix = str(dtype).removeprefix("torch.")
            yield f"lars {name} {suffix}", kernel, signature, constexprs, NUM_WARPS, 3
