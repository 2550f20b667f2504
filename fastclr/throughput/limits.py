"""What the machine could do at most, measured; and which of these limits a run is near."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastclr.config import Config
from fastclr.simclr import SimCLR

TRIAD_FLOATS = 2**25  # 128 MiB an array: no cache holds three of them
REPEATS = 5
MATMUL_SIDES = {"cpu": 2048, "cuda": 8192}
NEAR = 0.5  # of a limit; below it something else must be the reason


def triad_bytes_per_second(device: torch.device) -> float:
    """Measure the memory's bandwidth: the best of some a = b + s * c (McCalpin's STREAM)."""
    a, b, c = (torch.ones(TRIAD_FLOATS, device=device) for _ in range(3))
    seconds = _best(lambda: torch.add(b, c, alpha=3.0, out=a), device)
    return 3 * a.element_size() * a.numel() / seconds


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the peak of arithmetic: the best of some square matrix products."""
    side = MATMUL_SIDES[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _best(lambda: a @ b, device)


def _best(function: Any, device: torch.device) -> float:
    seconds = []
    for _ in range(REPEATS + 1):  # the first warms up
        before = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - before)
    return min(seconds[1:])


@dataclass(frozen=True)
class Demand:
    """What forward and backward of one image, both views, ask for.

    Attributes:
        flops: Of products and convolutions.
        num_bytes: Read and written if each layer's input and output go to memory once a use: input
            and output forward, both gradients and the input again backward.
        gradient_bytes: Of the parameters, all of them, float32.
    """

    flops: float
    num_bytes: float
    gradient_bytes: int


def demand(config: Config, bytes_per_value: int) -> Demand:
    """Count what the model of a run asks for, by shapes; nothing is computed."""
    model = SimCLR.from_config(config).to("meta")
    values = 0

    def note(_module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal values
        values += 3 * inputs[0].numel() + 2 * output.numel()

    for module in model.modules():
        if not [*module.children()] and not isinstance(module, torch.nn.Identity):
            module.register_forward_hook(note)
    images, size = 2, config.views.size
    views_VBCHW = torch.empty(2, images, 3, size, size, dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(views_VBCHW).z_ND.sum().backward()
    return Demand(
        flops=counter.get_total_flops() / images,
        num_bytes=values * bytes_per_value / images,
        gradient_bytes=4 * sum(p.numel() for p in model.parameters()),
    )


@dataclass(frozen=True)
class Verdict:
    """Where the time goes, and why.

    Attributes:
        bottleneck: Group of stages with the largest exposed share.
        share: That share of the wall time.
        limit: The limit it is near, in words.
    """

    bottleneck: str
    share: float
    limit: str


def verdict(
    shares: Mapping[str, float], data: Mapping[str, float], uses: Mapping[str, float]
) -> Verdict:
    """Name the bottleneck and the limit it is near.

    Args:
        shares: Exposed share of the wall time of each group: data, model, loss, communication,
            optimizer, host.
        data: Work of each stage of the loader, in any unit.
        uses: How much of each limit the model uses while it runs: ``FLOPs`` and ``memory
            bandwidth``, 1 for all of it.
    """
    bottleneck = max(shares, key=lambda name: shares[name])
    if bottleneck == "data":
        worst = max(data, key=lambda name: data[name]) if data else "the loader"
        limit = f"{worst}: {data[worst] / sum(data.values()):.0%} of the loader's work"
    elif bottleneck == "model":
        name = max(uses, key=lambda name: uses[name])
        limit = f"{name}, {uses[name]:.0%} of what was measured as possible"
        if uses[name] < NEAR:
            limit = f"no limit ({limit}, is the nearest): many small kernels, or threads that wait"
    else:
        limit = {
            "communication": "the link between the ranks",
            "host": "the host: Python and DeepSpeed between the kernels",
        }.get(bottleneck, "its own arithmetic and memory traffic")
    return Verdict(bottleneck, shares[bottleneck], limit)
