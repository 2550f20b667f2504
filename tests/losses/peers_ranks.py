"""What public losses do to the gradient of the whole batch, after its mean over ranks (as of DDP).

Rank 0 writes a table: by configuration the loss over that of the whole batch, the length of the
gradient over that of the true one, and the cosine between the two.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

from fastclr.losses import nt_xent
from tests.losses.formulas import Case, pair, ratio_and_cosine

NUM_IMAGES, NUM_PIXELS, DIM, TEMPERATURE = 24, 10, 8, 0.5
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def lightly(gather_distributed: bool) -> Loss:
    return NTXentLoss(TEMPERATURE, gather_distributed=gather_distributed)


def pml(efficient: bool) -> Loss:
    wrapped = DistributedLossWrapper(pml_losses.NTXentLoss(TEMPERATURE), efficient=efficient)

    def loss(z0_BD: torch.Tensor, z1_BD: torch.Tensor) -> torch.Tensor:
        images = torch.arange(len(z0_BD)) + len(z0_BD) * dist.get_rank()
        return wrapped(torch.cat([z0_BD, z1_BD]), images.repeat(2))

    return loss


def gathered_without_gradient(z0_BD: torch.Tensor, z1_BD: torch.Tensor) -> torch.Tensor:
    """Gather as is often written by hand."""
    rows_ND = F.normalize(torch.cat([z0_BD, z1_BD]), dim=1)
    parts = [torch.empty_like(rows_ND) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows_ND.detach())
    parts[dist.get_rank()] = rows_ND
    s_NM = rows_ND @ torch.cat(parts).T / TEMPERATURE
    place_N = torch.arange(len(rows_ND))
    first = dist.get_rank() * len(rows_ND)
    s_NM[place_N, first + place_N] = float("-inf")
    return F.cross_entropy(s_NM, first + place_N.roll(len(z0_BD)))


def ours(**options: str) -> Loss:
    return lambda z0_BD, z1_BD: nt_xent(z0_BD, z1_BD, temperature=TEMPERATURE, **options)


CONFIGURATIONS: dict[str, Loss] = {
    "fastclr gather": ours(),
    "fastclr ring": ours(exchange="ring"),
    "fastclr reference": ours(impl="reference"),
    "lightly gather_distributed=True": lightly(True),
    "lightly gather_distributed=False (default)": lightly(False),
    "PML DistributedLossWrapper(efficient=False)": pml(False),
    "PML DistributedLossWrapper(efficient=True)": pml(True),
    "by hand: gather without gradient": gathered_without_gradient,
}


def main(rendezvous: str, result: str) -> None:
    """Measure every configuration; rank 0 writes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    views_VGP = torch.stack(pair(NUM_IMAGES, NUM_PIXELS)).detach()
    weight_PD = pair(NUM_PIXELS, DIM, seed=1)[0]
    whole = Case("nt_xent").slow(*(views_VGP @ weight_PD), TEMPERATURE)
    (true,) = torch.autograd.grad(whole, weight_PD)
    table = {}
    for name, loss in CONFIGURATIONS.items():
        value = loss(*(views_VGP.chunk(num_ranks, dim=1)[rank] @ weight_PD))
        (grad,) = torch.autograd.grad(value, weight_PD)
        mean = torch.cat([value.detach()[None], grad.flatten()]) / num_ranks
        dist.all_reduce(mean)
        ratio, cosine = ratio_and_cosine(mean[1:], true.flatten())
        table[name] = {"loss": (mean[0] / whole).item(), "ratio": ratio, "cosine": cosine}
    if rank == 0:
        Path(result).write_text(json.dumps(table))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
