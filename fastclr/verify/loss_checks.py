"""Losses over ranks against the dense formula over all rows in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from fastclr import losses
from fastclr.kernels import reference
from fastclr.kernels.tiles import Keys
from fastclr.losses import LOSSES
from fastclr.losses.contrastive import choose_implementation
from fastclr.losses.kernels import KERNELS
from fastclr.verify import data
from fastclr.verify.case import LOSS, Case
from fastclr.verify.rows import Row, compared, distance, limit_for, worst

NUM_IMAGES, DIM = 5, 12
EXCHANGES = ("gather", "ring")

# The proof of each entry of LOSSES: similarities are rows' dot products.
DENSE: dict[str, Callable[[torch.Tensor, Keys], torch.Tensor]] = {
    "nt_xent": reference.nt_xent,
    "nt_logistic": reference.nt_logistic,
    "margin_triplet": lambda rows_ND, keys: reference.margin_triplet(rows_ND, keys, margin=0.8),
}


def dense_loss(
    name: str, z0_BD: torch.Tensor, z1_BD: torch.Tensor, rounded_to: torch.dtype | None = None
) -> torch.Tensor:
    """Return the mean of a loss over all rows of one process; no collectives, no tiles.

    Args:
        name: Key of :data:`DENSE`.
        z0_BD: Projections of view 0; their precision is that of everything.
        z1_BD: Projections of view 1.
        rounded_to: Precision that normalised rows are rounded to first, their gradient is not.
    """
    rows_ND = F.normalize(torch.cat([z0_BD, z1_BD])) * _own(name).get("temperature", 1.0) ** -0.5
    if rounded_to is not None:
        rows_ND = rows_ND + (rows_ND.to(rounded_to).to(rows_ND.dtype) - rows_ND).detach()
    return DENSE[name](rows_ND, Keys(rows_ND, [len(z0_BD)], 0)).mean()


def rounding(name: str, device: torch.device, dim: int) -> torch.dtype | None:
    """Return what the kernels that a run takes on a device round normalised rows to, if at all."""
    impl, _ = choose_implementation(torch.empty(2, dim, device=device), name)
    return KERNELS[f"{name} triton"].wire_dtype if impl == "triton" else None


def _own(name: str) -> dict[str, Any]:
    """Return the settings of a loss that not all have."""
    return {} if name == "margin_triplet" else {"temperature": LOSS.temperature}


def measure(case: Case) -> dict[str, Any]:
    """Return this rank's loss and gradient of its projections, for every loss and exchange."""
    found = {}
    for name in LOSSES:
        for exchange in EXCHANGES:
            loss = losses.from_config(replace(LOSS, name=name, exchange=exchange))
            z_VBD = data.projections(case.world.rank, NUM_IMAGES, DIM).to(case.device)
            value, grad_VBD = _value_and_gradient(loss, z_VBD)
            found[f"{name}, {exchange}"] = {"value": value, "grad": grad_VBD.tolist()}
    return found


def judge(case: Case, found: list[dict[str, Any]]) -> Iterator[Row]:
    """Compare with the whole batch in float64; the kernels' precision sets the limit."""
    num_ranks = len(found)
    z_VGD = torch.cat([data.projections(r, NUM_IMAGES, DIM) for r in range(num_ranks)], dim=1)
    for name in LOSSES:
        expected, grad_VGD = _value_and_gradient(
            lambda *z, name=name: dense_loss(name, *z), z_VGD.double()
        )
        rounded_to = rounding(name, case.device, DIM)
        own, own_VGD = _value_and_gradient(
            lambda *z, name=name, to=rounded_to: dense_loss(name, *z, rounded_to=to), z_VGD
        )
        lowest = rounded_to or torch.float32
        value_limit = limit_for(abs(own - expected) / abs(expected), lowest)
        own_error = max(map(distance, own_VGD.chunk(num_ranks, 1), grad_VGD.chunk(num_ranks, 1)))
        for exchange in EXCHANGES:
            parts = [rank[f"{name}, {exchange}"] for rank in found]
            value = sum(part["value"] for part in parts) / num_ranks
            what = f"{name}, {exchange}"
            yield compared(
                "loss value",
                f"{what}: mean over ranks",
                abs(value - expected) / abs(expected),
                value_limit,
            )
            # The engine averages over ranks, and each rank's gradient is scaled for that.
            deviations = [
                distance(torch.tensor(part["grad"], dtype=torch.float64) / num_ranks, grad_VBD)
                for part, grad_VBD in zip(parts, grad_VGD.chunk(num_ranks, 1), strict=True)
            ]
            rank = worst(deviations)
            yield compared(
                "loss gradient",
                f"{what}: by each rank's projections",
                deviations[rank],
                limit_for(own_error, lowest),
                f"most on rank {rank}",
            )


def _value_and_gradient(
    loss: Callable[..., torch.Tensor], z_VBD: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Return a loss and its gradient by the projections, on the CPU."""
    z_VBD = z_VBD.detach().requires_grad_()
    value = loss(*z_VBD)
    (grad_VBD,) = torch.autograd.grad(value, z_VBD)
    return value.item(), grad_VBD.cpu()
