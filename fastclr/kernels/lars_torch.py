"""LARS in torch's own operations, on any device and in any precision.

Weights, gradients and momenta are lists of S contiguous tensors of one dtype and device, alike in
shape: layers, or pieces of layers. Nothing here waits for an accelerator. Numbers of 16 bits are
widened first, and rounded once, at the end.
"""

# torch exports its multi-tensor functions under private names only.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import torch


def sums_of_squares(
    w: list[torch.Tensor], g: list[torch.Tensor], weight_decay: float
) -> torch.Tensor:
    """Sum the squares of weights and of decayed gradients, g + weight_decay * w.

    Returns:
        ``sumsq_S2``, float64 on the tensors' device: neither overflows nor underflows where the
        values themselves do not.
    """
    w, g = _wide(w), _wide(g)
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
    """Update weights and momenta in place, in the order of ``torch.optim.SGD``.

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
    held = w, v
    w, g, v = _wide(w), _wide(g), _wide(v)
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
    for narrow, wide in zip(held, (w, v), strict=True):
        if narrow is not wide:
            torch._foreach_copy_(narrow, wide)


def _wide(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors of 16 bits in single precision, and others as they are."""
    if tensors[0].dtype.itemsize >= 4:
        return tensors
    return [tensor.float() for tensor in tensors]
