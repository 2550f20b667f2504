"""A small SimCLR model, and its gradient as one process computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from fastclr.simclr import SimCLR

OUTPUT_DIM = 5
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make_model(*, batch_norm: bool, dropout: float = 0.0, seed: int = 0) -> SimCLR:
    """Return a model with sizes that no number of ranks divides: layers are cut across ranks.

    It is smooth: at a kink one bit of rounding decides whether a neuron learns, and deviations
    would tell that instead.

    Args:
        batch_norm: BatchNorm, or LayerNorm over all of an image's activations.
        dropout: Before the head.
        seed: Seed of the weights.
    """

    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels) if batch_norm else nn.GroupNorm(1, channels)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = nn.Sequential(
            nn.Conv2d(3, 7, 3, padding=1, bias=False),
            norm(7),
            nn.Tanh(),
            nn.Conv2d(7, 13, 3, stride=2, bias=False),
            norm(13),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
        )
        head = nn.Sequential(nn.Linear(52, 11), nn.Tanh(), nn.Linear(11, OUTPUT_DIM, bias=False))
        return SimCLR(encoder, head)


def gradients(
    model: SimCLR, chunks: Sequence[torch.Tensor], loss_of: Loss, *, scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """Return every parameter's gradient in float64 on the CPU, of one process and one graph.

    Args:
        model: In the precision and on the device that compute.
        chunks: Views (2, b, 3, H, W) that go through the model together; the loss is over all.
        loss_of: Maps two projections (B, D) to the mean loss.
        scale: Multiplies the loss and divides the gradients: what fp16 needs.
    """
    z_VBD = torch.cat([model(chunk).z_ND.unflatten(0, (2, -1)) for chunk in chunks], dim=1)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss_of(*z_VBD) * scale, parameters)
    return {n: g.double().cpu() / scale for n, g in zip(names, found, strict=True)}


def whole(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return tensors as one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors.values()])
