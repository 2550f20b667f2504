"""What every rank computes for test_ranks; started once per number of ranks."""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from fastclr.kernels import tiles
from fastclr.losses import NTXent, gradient_cache, nt_logistic, nt_xent, passes
from fastclr.losses.kernels import KERNELS
from tests.losses.formulas import CASES, Case

NUM_IMAGES, NUM_PIXELS, DIM = 8, 7, 5
SHARINGS = {1: ([8],), 2: ([4, 4], [5, 3]), 4: ([2, 2, 2, 2], [4, 0, 3, 1])}
WAYS = (("reference", "gather"), ("blocked", "gather"), ("blocked", "ring"))
# What is done to gradients, and whether the temperature is learned.
VARIANTS = (("mean", False), ("mean", True), ("sum", True))
CHUNKED = {"nt_xent": nt_xent, "nt_logistic": nt_logistic}
COLLECTIVES = (
    "all_gather all_gather_into_tensor all_gather_object all_reduce all_to_all all_to_all_single "
    "barrier batch_isend_irecv broadcast gather irecv isend recv reduce reduce_scatter "
    "reduce_scatter_tensor scatter send"
).split()


def images_VGP() -> torch.Tensor:
    """Return two views of all images; no two look alike, and those of the first are opposites."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, NUM_IMAGES, NUM_PIXELS)
    noise = torch.randn(shape, dtype=torch.float64, generator=generator)
    content = torch.randn(shape[1:], dtype=torch.float64, generator=generator)
    scale_G1 = torch.linspace(0.2, 3, NUM_IMAGES, dtype=torch.float64)[:, None]
    views_VGP = content * scale_G1 + torch.tensor([0.4, 1.1])[:, None, None] * noise
    views_VGP[1, 0] = -views_VGP[0, 0] + 0.1 * views_VGP[1, 0]
    return views_VGP


def linear() -> nn.Linear:
    """Return the model that all ranks share."""
    model = nn.Linear(NUM_PIXELS, DIM, bias=False, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    model.weight.data.normal_(generator=generator)
    return model


def key(*words: object) -> str:
    """Return the name of a measurement."""
    return " ".join(map(str, words))


def measure(
    loss: nn.Module, views_VBP: torch.Tensor, dtype: torch.dtype = torch.float64
) -> dict[str, float | list[float]]:
    """Return this rank's loss, statistics, and gradients of all that is learned."""
    model, statistics = linear(), {}
    z_VBD = model(views_VBP).to(dtype)
    z_VBD.retain_grad()
    value = loss(*z_VBD, statistics=statistics)
    value.backward()
    assert z_VBD.grad.shape == z_VBD.shape, "a rank without rows has an empty gradient"
    grads = [p.grad.flatten() for p in (*model.parameters(), *loss.parameters())]
    scalars = {"loss": value, **statistics}
    return {name: x.item() for name, x in scalars.items()} | {"grad": torch.cat(grads).tolist()}


def measurements(images_R: list[int], views_VBP: torch.Tensor) -> dict[str, dict]:
    """Measure every loss, in every way, for both reductions, also with a learned temperature."""
    found = {}
    for case, (impl, exchange) in itertools.product(CASES, WAYS):
        options = {"impl": impl, "exchange": exchange, "equal_ranks": len(set(images_R)) == 1}
        for reduction, is_learned in VARIANTS:
            temperature = torch.tensor(0.3, dtype=torch.float64)
            loss = case.build(
                nn.Parameter(temperature) if is_learned else 0.3,
                grad_reduction=reduction,
                **options,
            )
            name = key(images_R, case, impl, exchange, reduction, *["learned"] * is_learned)
            found[name] = measure(loss, views_VBP)
    for exchange in ("gather", "ring"):
        loss = NTXent(0.3, impl="triton", exchange=exchange)
        found[key(images_R, "triton", exchange)] = measure(loss, views_VBP, torch.float32)
    return found


def collectives_in_backward(case: Case, views_VBP: torch.Tensor) -> dict[str, list[str]]:
    """Return the names of the collectives that each way calls in its backward."""
    called = {}
    for impl, exchange in WAYS:
        loss = case.build(impl=impl, exchange=exchange)(*linear()(views_VBP))
        called[key(impl, exchange)] = calls = []
        originals = {name: getattr(dist, name) for name in COLLECTIVES}
        for name, function in originals.items():
            replace(name, functools.partial(noted, name, function, calls))
        loss.backward()
        for name, function in originals.items():
            replace(name, function)
    return called


def noted(name: str, function: Callable, calls: list[str], *args, **kwargs):
    """Note a call, and make it."""
    calls.append(name)
    return function(*args, **kwargs)


def replace(name: str, function: Callable) -> None:
    """Set a function of torch.distributed, where others and where it itself looks for it."""
    setattr(dist, name, function)
    setattr(dist.distributed_c10d, name, function)


def cached(loss: Callable, views_VBP: torch.Tensor) -> dict:
    """Return the loss and the gradient of chunks of two images."""
    model = linear()
    chunks = views_VBP.split(2, dim=1)
    value = gradient_cache(
        model, lambda chunk: model(chunk.flatten(0, 1)), chunks, loss, torch.Tensor.backward
    )
    return {"loss": value.item(), "grad": model.weight.grad.flatten().tolist()}


def refusals() -> list[str]:
    """Return what is said to batches that only all ranks together can see are wrong."""
    rank = dist.get_rank()
    said = []
    for num_rows, dim in ((3, 4 + rank), (int(rank == 0), 4), (0, 4)):
        try:
            nt_xent(torch.ones(num_rows, dim), torch.ones(num_rows, dim))
        except ValueError as error:
            said.append(str(error))
    return said


def check_operators(images_R: list[int], own: int) -> None:
    """Let torch check shapes and types that the operators promise over ranks."""
    rows = torch.ones(2 * images_R[own], DIM, requires_grad=True)
    group = dist.group.WORLD.group_name
    for kernel, ring in itertools.product(KERNELS, (False, True)):
        settings = (kernel, False, True, 0.4, images_R, own, group, ring)
        args = (rows, torch.tensor(float(DIM)), *settings)
        torch.library.opcheck(passes.contrast, (*args, True), test_utils="test_faketensor")
        known = passes.contrast(*args, False)[2:]
        args = (*args[:2], *(x.detach() for x in known), *settings)
        torch.library.opcheck(passes.contrast_gradient, args, test_utils="test_faketensor")


def main(rendezvous: str, result: str) -> None:
    """Measure everything; rank 0 writes."""
    torch.set_num_threads(1)
    tiles.BLOCK = 3  # several blocks a view
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    found: dict[str, object] = {"refusals": refusals()}
    for images_R in SHARINGS[num_ranks]:
        found |= measurements(images_R, images_VGP().split(images_R, dim=1)[rank])
    if num_ranks == 2:
        check_operators(images_R, rank)
    mine_VBP = images_VGP().chunk(num_ranks, dim=1)[rank]
    for case in CASES:
        found[key(case, "collectives")] = collectives_in_backward(case, mine_VBP)
    for name, loss in CHUNKED.items():
        found[key(name, "cached")] = cached(loss, mine_VBP)
    if num_ranks == 4:
        # Two worlds of two ranks beside each other; new_group is called by all for each.
        group = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
        for case, (impl, exchange) in itertools.product(CASES, WAYS):
            loss = case.build(impl=impl, exchange=exchange, group=group)
            found[key(case, impl, exchange, "group")] = measure(loss, mine_VBP)
    everyone = [None] * num_ranks
    dist.all_gather_object(everyone, found)
    if rank == 0:
        Path(result).write_text(json.dumps(everyone))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
