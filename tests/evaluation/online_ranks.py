"""Scores models in the middle of training on each rank; started by test_online."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from fastclr.evaluation import online
from fastclr.evaluation.online import ImageSet, OnlineEvaluation
from fastclr.simclr import SimCLR

NUM_FITTING, NUM_HELD_OUT, NUM_CLASSES, NUM_PAIRS, BATCH = 90, 61, 5, 19, 8
NUM_STEPS = 4
ENGINES = ("1 bf16", "3 fp32", "3 fp32 eager")


def make_model() -> SimCLR:
    """Return a model with dropout, whose steps show whether random numbers were drawn."""
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(3, 9, 3, stride=2),
        nn.GroupNorm(3, 9),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(81, 17),
    )
    head = nn.Sequential(nn.Linear(17, 13), nn.ReLU(), nn.Linear(13, 7))
    return SimCLR(encoder, head)


def images_of(num_images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images whose classes are hard to tell, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    colour_K3 = torch.rand(NUM_CLASSES, 3, generator=torch.Generator().manual_seed(9))
    label_X = torch.randint(0, NUM_CLASSES, (num_images,), generator=generator)
    noise = torch.rand(num_images, 3, 8, 8, generator=generator)
    images = 0.4 * colour_K3[label_X][:, :, None, None] + 0.6 * noise
    return (images * 255).to(torch.uint8), label_X


def image_set(name: str, num_images: int, seed: int, cuts: Sequence[int] | None = None) -> ImageSet:
    """Return a set of which rank r has the images between the cuts r and r + 1."""
    images, label_X = images_of(num_images, seed)
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    cuts = cuts or [num_images * r // num_ranks for r in range(num_ranks + 1)]

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for first in range(cuts[rank], cuts[rank + 1], BATCH):
            rows = slice(first, min(first + BATCH, cuts[rank + 1]))
            yield images[rows], label_X[rows]

    return ImageSet(name, label_X.numpy(), NUM_CLASSES, batches)


def pairs() -> torch.Tensor:
    """Return this rank's part of two views; the parts are unequal."""
    images, _ = images_of(2 * NUM_PAIRS, 5)
    views_VBCHW = images.unflatten(0, (2, NUM_PAIRS))
    views_VBCHW[1] = views_VBCHW[0] // 2 + views_VBCHW[1] // 2
    if not dist.is_initialized():
        return views_VBCHW
    return views_VBCHW.tensor_split(dist.get_world_size(), dim=1)[dist.get_rank()]


def evaluation(uneven: bool = False, fitting: Sequence[int] | None = None) -> OnlineEvaluation:
    """Return what the ranks evaluate; uneven: rank 0 has one image, then none, of several ranks."""
    held_out = None
    if uneven and dist.get_world_size() > 1:
        rest = dist.get_world_size() - 1
        fitting, held_out = [0, 1, *rest * [NUM_FITTING]], [0, 0, *rest * [NUM_HELD_OUT]]
    return OnlineEvaluation(
        image_set("fitting", NUM_FITTING, 1, fitting),
        image_set("held out", NUM_HELD_OUT, 2, held_out),
        pairs(),
    )


def make_engine(stage: int, precision: str, **zero: Any) -> Any:
    """Start an engine."""
    model = make_model()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 20, **zero},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": precision == "bf16"},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(evaluate: bool, stage: int, precision: str, **zero: Any) -> dict[str, Any]:
    """Return all weights after some steps, and the scores after each."""
    engine = make_engine(stage, precision, **zero)
    torch.manual_seed(dist.get_rank())
    scores = []
    for step in range(NUM_STEPS):
        views_VBCHW = images_of(8, 10 + step)[0].unflatten(0, (2, 4))
        h_NF, z_ND = engine(views_VBCHW)
        engine.backward(h_NF.float().square().mean() + (z_ND.float() - 1).square().mean())
        engine.step()
        if evaluate:
            scores.append(evaluation(uneven=True)(engine.module))
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        weights = {name: w.float().tolist() for name, w in engine.module.state_dict().items()}
    engine.destroy()
    return {"weights": weights, "scores": scores}


def refusals() -> list[str]:
    """Return what this rank says of features that the last rank spoils, and of a missing image."""
    found, broken = [], make_model()
    if dist.get_rank() == dist.get_world_size() - 1:
        nn.init.constant_(broken.encoder[-1].bias, float("nan"))
    incomplete = [(NUM_FITTING - 1) * r // dist.get_world_size() for r in range(4)]
    for model, cuts in ((broken, None), (make_model(), incomplete)):
        try:
            evaluation(fitting=cuts)(model)
        except (FloatingPointError, ValueError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def measure() -> dict[str, Any]:
    """Evaluate everything there is."""
    plain = make_model()
    found: dict[str, Any] = {
        "even": evaluation()(plain),
        "uneven": evaluation(uneven=True)(plain),
        "refusals": refusals(),
    }
    fitting = evaluation(uneven=True).fitting
    with torch.no_grad():
        found["h"] = online._features(plain.eval(), fitting, torch.device("cpu")).h_XF.tolist()
    # Parameters are then fetched ahead, and given away between their uses.
    eager = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 300}
    for name in ENGINES:
        zero = eager if "eager" in name else {}
        stage, precision = int(name[0]), name[2:6]
        found[name] = [train(on, stage, precision, **zero) for on in (True, False)]
    return found


def main(rendezvous: str, result: str) -> None:
    """Evaluate; rank 0 writes what every rank found."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    deepspeed.init_distributed(
        "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        init_method=f"file://{rendezvous}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    torch.set_num_threads(1)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, measure())
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps({"ranks": every}))
    dist.barrier()
    os._exit(0)  # engines that were destroyed leave hooks that hinder an orderly end


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
