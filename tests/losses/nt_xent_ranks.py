"""What every rank computes for test_nt_xent; started once per number of ranks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fastclr.collectives import gather_rows
from fastclr.losses import LOSSES, contrastive_accuracy, nt_xent

NUM_IMAGES, NUM_PIXELS, DIM = 8, 7, 5


def images_VGP() -> torch.Tensor:
    """Return two views of all images; no two parts of it look alike."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, NUM_IMAGES, NUM_PIXELS)
    noise = torch.randn(shape, dtype=torch.float64, generator=generator)
    content = torch.randn(shape[1:], dtype=torch.float64, generator=generator)
    scale_G1 = torch.linspace(0.2, 3, NUM_IMAGES, dtype=torch.float64)[:, None]
    return content * scale_G1 + torch.tensor([0.4, 1.1])[:, None, None] * noise


def weight_PD() -> torch.Tensor:
    """Return the weights of a linear model, as a leaf."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(NUM_PIXELS, DIM, dtype=torch.float64, generator=generator).requires_grad_()


def measure(loss, views_VBP: torch.Tensor, group=None) -> dict:
    """Return loss, gradient of the weights and accuracy, averaged over ranks as engines do."""
    weight = weight_PD()
    z_VBD = views_VBP @ weight
    value = loss(*z_VBD)
    value.backward()
    accuracy = contrastive_accuracy(*z_VBD, group=group).double()
    values = torch.cat([value.detach()[None], accuracy[None], weight.grad.flatten()])
    if dist.is_initialized():
        dist.all_reduce(values, group=group)
        values /= dist.get_world_size(group)
    return {"loss": values[0].item(), "accuracy": values[1].item(), "grad": values[2:].tolist()}


def blind_nt_xent(z0_BD: torch.Tensor, z1_BD: torch.Tensor) -> torch.Tensor:
    """Gather without gradient, as is often done: the loss is right and the gradient is not."""
    module = sys.modules["fastclr.losses.nt_xent"]
    exact = module.gather_rows

    def blind(rows_ND: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        keys = list(exact(rows_ND, group).detach().chunk(dist.get_world_size()))
        keys[dist.get_rank()] = rows_ND
        return torch.cat(keys)

    module.gather_rows = blind
    try:
        return nt_xent(z0_BD, z1_BD, impl="reference")
    finally:
        module.gather_rows = exact


def collectives_in_backward(views_VBP: torch.Tensor) -> dict[str, list[str]]:
    """Return the names of the collectives that each implementation calls in its backward."""
    names = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "broadcast")
    called: dict[str, list[str]] = {}
    for impl in ("reference", "blocked"):
        loss = nt_xent(*(views_VBP @ weight_PD()), impl=impl)
        called[impl] = []
        originals = {name: getattr(dist, name) for name in names}
        for name, function in originals.items():
            setattr(dist, name, recorded(name, function, called[impl]))
        loss.backward()
        for name, function in originals.items():
            setattr(dist, name, function)
    return called


def recorded(name: str, function, calls: list[str]):
    """Return a function that notes its calls."""

    def call(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    return call


def shared_gradient() -> list[float]:
    """Return a gradient that came the same way as the gathered one: nobody may change it."""
    rows = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    other = torch.ones(dist.get_world_size(), 2, dtype=torch.float64, requires_grad=True)
    scaled = 2 * other  # made before the gather, so its backward comes after the gather's
    total = scaled + gather_rows(rows)
    total.backward(torch.ones_like(total))
    return other.grad.flatten().tolist() + rows.grad.flatten().tolist()


def main(rendezvous: str, result: str) -> None:
    """Measure everything; rank 0 writes."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    mine_VBP = images_VGP().chunk(num_ranks, dim=1)[rank]
    found = {name: measure(LOSSES[name](temperature=0.1), mine_VBP) for name in LOSSES}
    for impl in ("reference", "blocked"):
        found[impl] = measure(LOSSES["nt_xent"](temperature=0.1, impl=impl), mine_VBP)
    found["collectives"] = collectives_in_backward(mine_VBP)
    found["warm"] = measure(LOSSES["nt_xent"](temperature=0.7), mine_VBP)
    found["blind"] = measure(blind_nt_xent, mine_VBP)
    found["shared_gradient"] = shared_gradient()
    if num_ranks == 4:
        # Two worlds of two ranks beside each other; new_group is called by all for each.
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        group = groups[rank // 2]
        mine = measure(LOSSES["nt_xent"](group=group), mine_VBP, group)
        everyone = [None] * num_ranks
        dist.all_gather_object(everyone, mine)
        found["groups"] = [everyone[0], everyone[2]]
    if rank == 0:
        Path(result).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
