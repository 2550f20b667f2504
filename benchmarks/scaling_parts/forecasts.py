"""From measured steps to a model of them, and from assumed machines to forecasts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from torch import nn

from fastclr.config import Config
from fastclr.simclr import SimCLR
from scaling_parts.model import (
    Alone,
    Cluster,
    Forecast,
    Job,
    Link,
    forecast,
    shared_out,
    storage,
)
from scaling_parts.ranks import Setup, Steps

MOST_OFF = 0.10  # of the model, for weak and strong scaling


@dataclass(frozen=True)
class Assumed:
    """A machine that was not measured here: data sheets and round numbers, to be replaced.

    The defaults are those of nodes with 8 A100: 312 TFLOPS in bf16, NVLink of 300 GB/s and a
    200 Gbit/s link a GPU in each direction, of which NCCL is taken to reach four fifths; latencies
    are the usual order of magnitude of a step of its rings.

    Attributes:
        gpus_per_node: GPUs that NVLink connects.
        alpha_inside: Seconds of latency inside a node.
        beta_inside: Bytes per second inside a node, of a GPU and direction.
        alpha_between: Seconds of latency between nodes.
        beta_between: Bytes per second between nodes, of a GPU and direction.
        flops: Floating-point operations per second of a GPU.
        utilisation: Part of them that a step reaches.
        flops_per_view: Of one forward of one view; ResNet-50 at 224 px has 4.1 G
            multiply-additions (torchvision's table of models).
        images: Images of a GPU and step, in weak scaling.
        global_batch: Images of all GPUs and step, in strong scaling.
        image_bytes: Of an encoded image; ImageNet's average is about 110 kB.
        workers: Reading workers a GPU, for comparison with splitting by shard.
    """

    gpus_per_node: int = 8
    alpha_inside: float = 5e-6
    beta_inside: float = 240e9
    alpha_between: float = 10e-6
    beta_between: float = 20e9
    flops: float = 312e12
    utilisation: float = 0.2
    flops_per_view: float = 8.2e9
    images: int = 256
    global_batch: int = 8192
    image_bytes: float = 110e3
    workers: int = 8

    @property
    def cluster(self) -> Cluster:
        """Its links."""
        inside = Link(self.alpha_inside, self.beta_inside)
        return Cluster(self.gpus_per_node, inside, Link(self.alpha_between, self.beta_between))

    def alone(self, dim: int) -> Alone:
        """Return a GPU's arithmetic: forward and twice that backward, of two views.

        A pair of rows costs one product forward, and backward that again and one more.
        """
        reached = self.flops * self.utilisation
        return Alone(0.0, 2 * 3 * self.flops_per_view / reached, 3 * 2 * dim / reached)


def job_of(config: Config, images: int, **changes: Any) -> Job:
    """Return what the ranks of a configuration have to tell each other, read off its model."""
    model = SimCLR.from_config(config)
    tensors = [p for p in model.parameters() if p.requires_grad]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    job = Job(
        images=images,
        dim=config.head.output_dim,
        parameters=sum(p.numel() for p in tensors),
        layers=len(tensors),
        channels=tuple(norm.num_features for norm in norms),
    )
    return replace(job, **changes)


def alone_of(found: dict[Setup, list[Steps]], small: Setup, large: Setup, many: Setup) -> Alone:
    """Return the arithmetic of a rank of many, from one-rank worlds.

    Args:
        found: All measured.
        small: One rank alone, with few images.
        large: The same with more.
        many: As many worlds of one rank as there are ranks, each with as many images as ``small``.
    """
    pair = median(steps.pair_seconds for steps in found[large])
    seconds = [
        median(steps.step_seconds for steps in found[s]) - pair * (2 * s.images) ** 2
        for s in (small, large)
    ]
    image = (seconds[1] - seconds[0]) / (large.images - small.images)
    image = min(image, seconds[0] / small.images)  # what is fixed is not negative
    # How much slower than alone a rank computes that shares BatchNorm and memory with others.
    pairs = zip(found[many], found[small], strict=True)
    slower = median(a.arithmetic_seconds / b.step_seconds for a, b in pairs)
    return Alone(slower * (seconds[0] - image * small.images), slower * image, slower * pair)


def expected(setup: Setup, job: Job, alone: Alone, link: Link) -> Forecast:
    """Return what the model says of a world that was measured."""
    here = Cluster(setup.ranks, link, link)
    job = replace(job, images=setup.images, stage=setup.stage, exchange=setup.exchange)
    return forecast(job, setup.ranks, here, alone)


def extrapolated(job: Job, assumed: Assumed, ranks: int, *, weak: bool, **changes: Any) -> Forecast:
    """Return a forecast of an assumed machine."""
    job = replace(job, **changes)
    if not weak:
        job = shared_out(job, assumed.global_batch, ranks)
    else:
        job = replace(job, images=assumed.images)
    return forecast(job, ranks, assumed.cluster, assumed.alone(job.dim))


def baseline(job: Job, assumed: Assumed, images: int) -> Forecast:
    """Return one GPU's forecast with so many images."""
    return forecast(replace(job, images=images), 1, assumed.cluster, assumed.alone(job.dim))


def forecast_row(found: Forecast, one: Forecast, assumed: Assumed, variant: str) -> dict[str, Any]:
    """Return a forecast as a row for the file: nothing in it was measured."""
    needed = storage(found, assumed.cluster, assumed.image_bytes, assumed.workers)
    return {
        "name": "forecast, not measured",
        "variant": variant,
        "sizes": {"ranks": found.ranks, "global_batch": found.global_batch},
        "step_seconds": found.step_seconds,
        "images_per_second": found.images_per_second,
        "efficiency": found.efficiency(one),
        "seconds": {"arithmetic": found.compute_seconds, **found.parts},
        "sent_bytes": found.sent,
        "storage": needed._asdict(),
    }
