"""Gradient caching: the loss over a whole batch, the memory of one chunk (Gao et al. 2021).

Plain gradient accumulation contrasts each image with its own micro-batch only. Here all chunks are
projected first without a graph, the loss and its gradient with respect to every projection are
computed once over all of them, and each chunk is projected again with a graph to carry its part of
that gradient into the parameters: the gradient is that of the whole batch, for one more forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gradient_cache(
    module: nn.Module,
    project: Callable[[torch.Tensor], torch.Tensor],
    chunks: Sequence[torch.Tensor],
    loss: Loss,
    backward: Callable[[torch.Tensor], object],
) -> torch.Tensor:
    """Put the gradient of the loss over all chunks into the parameters.

    Both passes run under the caller's autocast and with the same random state for each chunk, so
    that dropout is the same; BatchNorm's statistics are those of a chunk (another function than
    those of the whole batch), and its running statistics are updated by the second pass alone.

    Args:
        module: What holds the parameters and the BatchNorms.
        project: Maps a chunk to its projections (views * b, D), view-major.
        chunks: Both views of b images each, (views, b, C, H, W); every rank has the same number.
        loss: Maps two projections (B, D), B the sum of all b, to a scalar.
        backward: Called once a chunk, with a scalar whose gradient is the chunk's part;
            ``torch.Tensor.backward`` where no engine is in the way.

    Returns:
        The loss, detached.
    """
    num_views = chunks[0].shape[0]
    states = []
    with torch.no_grad(), _frozen_running_statistics(module):
        parts = []
        for chunk in chunks:
            states.append(_random_state(chunk.device))
            parts.append(project(chunk).unflatten(0, (num_views, -1)))
    # At least float32: half-precision rows would lose the small entries of the gradient.
    z_VBD = torch.cat(parts, dim=1)
    z_VBD = z_VBD.to(torch.promote_types(z_VBD.dtype, torch.float32)).requires_grad_()
    value = loss(*z_VBD)
    (grad_VBD,) = torch.autograd.grad(value, z_VBD)
    grads = grad_VBD.split([part.shape[1] for part in parts], dim=1)
    for chunk, state, grad_VbD in zip(chunks, states, grads, strict=True):
        _restore(chunk.device, state)
        backward((project(chunk).to(grad_VbD.dtype) * grad_VbD.flatten(0, 1)).sum())
    return value.detach()


@contextmanager
def _frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """Let BatchNorms normalise by the chunk without remembering it."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracking = [norm for norm in norms if norm.training and norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the state of the generators that a forward on this device draws from."""
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device


def _restore(device: torch.device, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    """Set the generators back."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
