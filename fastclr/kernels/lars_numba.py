# pyright: basic, reportCallIssue=false, reportPrivateImportUsage=false
# (A compiled function's body is numba's language in Python's syntax; it exports without saying so.)
"""LARS on the CPU in two passes over memory, each one call over all tensors.

Tensors are cut into blocks, found by address; threads take runs of blocks until none is left. Pass
1 sums the squares of each block in double precision, and these are added in a fixed order: any
number of threads gives the same bits. Pass 2 updates momentum and weight, and rounds where
``torch.optim.SGD`` does. Neither copies a gradient or allocates a temporary.

Takes what :mod:`fastclr.kernels.lars_torch` takes, in single or double precision. numba compiles
at the first call and keeps the result in ``__pycache__``, or where that cannot be written in the
user's cache; where neither can, every process compiles anew.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import intrinsic

from fastclr.kernels import KernelUnavailable

BLOCK = 2**14  # elements: 64 KiB of float32
TYPES = {torch.float32: np.float32, torch.float64: np.float64}
# Fewer elements than this are done before another thread has woken up.
WORTH_THREADS = 2**17
# Of a thread, at equal speed: one that another process holds up leaves its runs to the rest.
RUNS = 8


def _compiled(function: Callable[..., None], **options: Any) -> Callable[..., None]:
    """Compile at the first call, and keep the result on disk where there is a place."""
    try:
        return njit(function, nogil=True, cache=True, **options)
    except RuntimeError:  # neither __pycache__ nor the user's cache can be written
        return njit(function, nogil=True, **options)


@intrinsic
def _pointer(context, address, like):
    """Turn an address into a pointer to numbers of the type of another."""
    pointer = types.CPointer(like)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address, like), generate


@intrinsic
def _fma(context, a, b, c):
    """Compute a * b + c in one rounding."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return a(a, b, c), generate


@njit
def _array(address, start, stop, like):
    """Return part of a tensor."""
    return carray(_pointer(address, like), (stop,))[start:stop]


# Double precision costs nothing where memory is what one waits for. "reassoc": a sum in lanes.
@functools.partial(_compiled, fastmath={"reassoc", "contract"})
def _sum_blocks(address_KS, segment_C, start_C, stop_C, weight_decay, sums_2C, first, end):
    """Pass 1 over some blocks."""
    for c in range(first, end):
        s, start, stop = segment_C[c], start_C[c], stop_C[c]
        w = _array(address_KS[0, s], start, stop, weight_decay)
        g = _array(address_KS[1, s], start, stop, weight_decay)
        w_sum = d_sum = 0.0
        for i in range(len(w)):
            x = np.float64(w[i])
            d = np.float64(g[i]) + np.float64(weight_decay) * x
            w_sum += x * x
            d_sum += d * d
        sums_2C[0, c] = w_sum
        sums_2C[1, c] = d_sum


# No fast mathematics: torch's add(a, b, alpha) rounds once, its products are rounded themselves.
@_compiled
def _update_blocks(
    address_KS, segment_C, start_C, stop_C, scale_S, rate, weight_decay, momentum, nesterov,
    first, end,
):  # fmt: skip
    """Pass 2 over some blocks."""
    for c in range(first, end):
        s, start, stop = segment_C[c], start_C[c], stop_C[c]
        w = _array(address_KS[0, s], start, stop, rate)
        g = _array(address_KS[1, s], start, stop, rate)
        v = _array(address_KS[2, s], start, stop, rate)
        scale = scale_S[s]
        for i in range(len(w)):
            d = _fma(weight_decay, w[i], g[i])
            step = _fma(scale, d, momentum * v[i])
            v[i] = step
            if nesterov:
                step = _fma(momentum, step, scale * d)
            w[i] = _fma(-rate, step, w[i])


class _Blocks(NamedTuple):
    """Where tensors lie and how they are cut, all int64; C blocks of S segments.

    Attributes:
        address_KS: First byte of weights, gradients and momenta.
        segment_C: Segment of each block.
        start_C: First element of each block in its segment.
        stop_C: The one after its last.
    """

    address_KS: np.ndarray
    segment_C: np.ndarray
    start_C: np.ndarray
    stop_C: np.ndarray


def check(tensor: torch.Tensor) -> None:
    """Check that the kernels can take a tensor.

    Raises:
        KernelUnavailable: If it does not lie on the CPU, or is of another type.
    """
    if tensor.device.type != "cpu" or tensor.dtype not in TYPES:
        raise KernelUnavailable(
            f"LARS(impl='numba') was given weights in {tensor.dtype} on {tensor.device}: it "
            "takes float32 and float64 on the CPU. Use impl='auto'."
        )


def _cut(*kinds: list[torch.Tensor]) -> _Blocks:
    """Cut tensors into blocks; none straddles two."""
    check(kinds[0][0])
    address_KS = np.array([[tensor.data_ptr() for tensor in kind] for kind in kinds])
    numel_S = np.array([tensor.numel() for tensor in kinds[0]])
    blocks_S = -(-numel_S // BLOCK)
    segment_C = np.repeat(np.arange(len(numel_S)), blocks_S)
    first_S = blocks_S.cumsum() - blocks_S
    start_C = BLOCK * (np.arange(len(segment_C)) - first_S[segment_C])
    return _Blocks(address_KS, segment_C, start_C, np.minimum(start_C + BLOCK, numel_S[segment_C]))


@functools.lru_cache(maxsize=1)
def _helpers(process: int, threads: int) -> ThreadPoolExecutor:
    """Return threads beside the calling one; those from before a fork are not in the child."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="lars")


def _run(kernel: Callable[..., None], blocks: _Blocks, *arguments: Any) -> None:
    """Run a kernel over all blocks, on as many threads as torch uses."""
    num_blocks = len(blocks.segment_C)
    elements = (blocks.stop_C - blocks.start_C).sum()
    threads = torch.get_num_threads() if elements >= WORTH_THREADS else 1
    size = max(1, num_blocks // (threads * RUNS))
    firsts = iter(range(0, num_blocks, size))  # shared: a thread that is free takes the next run

    def work() -> None:
        for first in firsts:
            kernel(*blocks, *arguments, first, min(first + size, num_blocks))

    others = [_helpers(os.getpid(), threads).submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:  # memory stays while anyone is at it
        for other in others:
            other.result()


def sums_of_squares(
    w: list[torch.Tensor], g: list[torch.Tensor], weight_decay: float
) -> torch.Tensor:
    """Sum the squares of weights and decayed gradients; see :mod:`fastclr.kernels.lars_torch`."""
    blocks = _cut(w, g)
    sums_2C = np.empty((2, len(blocks.segment_C)))
    _run(_sum_blocks, blocks, TYPES[w[0].dtype](weight_decay), sums_2C)
    sums_2S = np.stack([np.bincount(blocks.segment_C, sums_C, len(w)) for sums_C in sums_2C])
    return torch.from_numpy(sums_2S).T


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
    blocks = _cut(w, g, v)
    scale_S = torch.empty(len(w), dtype=w[0].dtype)
    scale_S[:] = scale
    numbers = map(TYPES[w[0].dtype], (rate, weight_decay, momentum))
    _run(_update_blocks, blocks, scale_S.numpy(), *numbers, nesterov)
    torch.autograd.graph.increment_version([*w, *v])  # as torch's own operations in place do
