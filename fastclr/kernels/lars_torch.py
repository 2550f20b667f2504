"""LARS in torch's own operations, on any device; written for the cache on the CPU.

Weights, gradients and momenta are lists of S one-dimensional contiguous tensors of one dtype and
device: layers, or pieces of layers. On an accelerator nothing here waits for it.
"""

# torch exports its multi-tensor functions under private names only.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import torch

# Elements of a chunk: norms are right to 6e-7 on one thread, whose sums are longest (2^19: 1.6e-6,
# and a tenth faster). What is read twice stays in the cache (1 MiB each).
CHUNK = 2**18
# Sums of squares in this range lost nothing to the ends of single precision.
SAFE_SUMS = (1e-24, 1e37)
# 1 - (1 - scale) keeps single precision down to here.
SMALLEST_FUSED_SCALE = 1e-8


def sums_of_squares(
    w: list[torch.Tensor], g: list[torch.Tensor], weight_decay: float
) -> torch.Tensor:
    """Sum the squares of weights and of decayed gradients, g + weight_decay * w.

    Returns:
        ``sumsq_S2``, float64 on the tensors' device: neither overflows nor underflows where the
        values themselves do not.
    """
    if w[0].device.type == "cpu":
        sums = [_sums_on_cpu(*pair, weight_decay) for pair in zip(w, g, strict=True)]
        return torch.tensor(sums, dtype=torch.float64)
    d = torch._foreach_add(g, w, alpha=weight_decay) if weight_decay else g
    norms = [torch._foreach_norm(x, 2, dtype=torch.float64) for x in (w, d)]
    return torch.stack([torch.stack(list(norm)) for norm in norms], 1).square()


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
    """Update weights and momenta in place.

    d = g + weight_decay * w; v <- momentum * v + scale * d; w <- w - rate * v, or with Nesterov
    w <- w - rate * (scale * d + momentum * v).

    Args:
        w: Weights.
        g: Gradients; unchanged.
        v: Momenta.
        scale: Of the decayed gradients: ``scale_S``, or one for all.
        rate: Of the step.
        weight_decay: L2 decay.
        momentum: Of the buffer.
        nesterov: Whether the step looks ahead.
    """
    if isinstance(scale, torch.Tensor) and scale.device.type == "cpu" and not nesterov:
        for piece, s in zip(zip(w, g, v, strict=True), scale.tolist(), strict=True):
            _update_on_cpu(*piece, s, rate, weight_decay, momentum)
        return
    _update_multi_tensor(w, g, v, scale, rate, weight_decay, momentum, nesterov)


def _update_multi_tensor(
    w: list[torch.Tensor],
    g: list[torch.Tensor],
    v: list[torch.Tensor],
    scale: torch.Tensor | float,
    rate: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
) -> None:
    """Do the update one operation at a time, in the order of ``torch.optim.SGD``."""
    d = torch._foreach_add(g, w, alpha=weight_decay) if weight_decay else g
    torch._foreach_mul_(v, momentum)
    if isinstance(scale, torch.Tensor):
        d, scale = torch._foreach_mul(d, list(scale.to(w[0].dtype).unbind())), 1.0
    torch._foreach_add_(v, d, alpha=scale)
    if nesterov:
        step = torch._foreach_mul(d, scale) if scale != 1 else d
        torch._foreach_add_(w, torch._foreach_add(step, v, alpha=momentum), alpha=-rate)
    else:
        torch._foreach_add_(w, v, alpha=-rate)


def _update_on_cpu(
    w: torch.Tensor,
    g: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    rate: float,
    weight_decay: float,
    momentum: float,
) -> None:
    """Do the update in one pass over memory: torch's fused SGD, whose dampening is the scale."""
    if 0 < scale < SMALLEST_FUSED_SCALE:
        _update_multi_tensor([w], [g], [v], scale, rate, weight_decay, momentum, nesterov=False)
        return
    torch._fused_sgd_(
        [w],
        [g],
        [v],
        lr=rate,
        weight_decay=weight_decay,
        momentum=momentum,
        dampening=1 - scale,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def _sums_on_cpu(w: torch.Tensor, g: torch.Tensor, weight_decay: float) -> tuple[float, float]:
    """Sum the squares of one piece, chunk by chunk."""
    many = w.numel() > CHUNK
    parts = zip(w.split(CHUNK), g.split(CHUNK), strict=True) if many else ((w, g),)
    w_sum = d_sum = 0.0
    for w_part, g_part in parts:
        w_part_sum, d_part_sum = _sums_of_chunk(w_part, g_part, weight_decay)
        w_sum += w_part_sum
        d_sum += d_part_sum
    return w_sum, d_sum


def _sums_of_chunk(w: torch.Tensor, g: torch.Tensor, weight_decay: float) -> tuple[float, float]:
    """Sum the squares of one chunk by products, which write nothing, or exactly."""
    if w.dtype.itemsize < 4:
        w, g = w.float(), g.float()
    # Reading a number on the CPU waits for nothing.
    ww, gg = torch.dot(w, w).item(), torch.dot(g, g).item()
    if SAFE_SUMS[0] < ww < SAFE_SUMS[1] and SAFE_SUMS[0] < gg < SAFE_SUMS[1]:
        if not weight_decay:
            return ww, gg
        uncorrelated = gg + weight_decay**2 * ww
        dd = uncorrelated + 2 * weight_decay * torch.dot(w, g).item()
        if dd > uncorrelated / 2:  # else gradient and decay cancel, and rounding is what is left
            return ww, dd
    d = torch.add(g, w, alpha=weight_decay)
    return _exact_sum(w), _exact_sum(d)


def _exact_sum(x: torch.Tensor) -> float:
    """Sum squares in double precision."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2
