"""Takes features on each rank; started by test_store."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastclr.evaluation.layers import Layers
from fastclr.evaluation.store import Images, cached_features
from fastclr.heads import mlp

NUM_IMAGES, BLOCK, BATCH = 53, 8, 4
NAMES = ["encoder.0", "h", "projection_head.fc2"]


def make_layers(seed: int = 0, names: list[str] | None = None) -> Layers:
    """Return a small model's layers."""
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return Layers(encoder, mlp(24, 16, 7), NAMES if names is None else names)


def make_images(
    num_images: int = NUM_IMAGES,
    *,
    digest: str = "data",
    view: str = "centre",
    broken: int = -1,
    told: Callable[[int], object] = lambda _: None,
) -> Images:
    """Return random images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (99, 3, 8, 8), generator=generator).to(torch.uint8)
    label_X = torch.arange(99) % 7

    def read(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        told(start)
        if start <= broken < stop:
            raise OSError(f"cannot read image {broken}")
        return images[start:stop], label_X[start:stop]

    return Images(digest, view, num_images, read, "shard 0, key {}".format)


def failures(folder: Path) -> list[str]:
    """Return what this rank says where one rank meets an error, or a feature that is not finite."""
    spoiled = make_layers()
    nn.init.constant_(spoiled._encoder[0].bias, float("inf"))
    said = []
    for layers, images in ((make_layers(1), make_images(broken=9)), (spoiled, make_images())):
        try:
            cached_features(folder, layers, images, block=BLOCK, batch=BATCH)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def main(rendezvous: str, result: str) -> None:
    """Take features twice; rank 0 writes what every rank found."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=size)
    torch.set_num_threads(1)
    folder = Path(result).parent / "cache"
    read: list[int] = []
    done: list[int] = []
    first = cached_features(
        folder,
        make_layers(),
        make_images(told=read.append),
        progress=done.append,
        block=BLOCK,
        batch=BATCH,
    )
    again: list[int] = []
    second = cached_features(
        folder, make_layers(), make_images(told=again.append), block=BLOCK, batch=BATCH
    )
    mine: dict[str, Any] = {
        "h": {name: features.h_XF.tolist() for name, features in first.items()},
        "label": first["h"].label_X.tolist(),
        "equal": all((first[n].h_XF == second[n].h_XF).all() for n in NAMES),
        "read": read,
        "again": again,
        "done": sum(done),
        "failures": failures(folder),
    }
    every: list[Any] = [None] * size
    dist.all_gather_object(every, mine)
    if rank == 0:
        Path(result).write_text(json.dumps({"ranks": every}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
