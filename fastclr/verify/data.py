"""Data that is another on each rank, and that every process can make for all of them."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pipelines.decode import Pixels
from pipelines.order import BlockOrder, Int64, uniforms

SEED = 5  # of all that verify draws
SIDE = 8  # pixels


def noise(rank: int, what: int, *shape: int) -> torch.Tensor:
    """Return standard normal numbers of a rank, float64; ``what`` tells draws apart."""
    count = int(np.prod(shape))
    u, angle = uniforms(SEED, rank, what, np.arange(2)[:, None], np.arange(count))
    normal = np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * angle)  # Box and Muller 1958
    return torch.from_numpy(normal).view(*shape)


def projections(rank: int, num_images: int, dim: int) -> torch.Tensor:
    """Return two views' projections of a rank, float32 (2, B, D).

    Ranks differ in length, in how alike the views are, and in where their rows lie.
    """
    content_BD, place_D = noise(rank, 0, num_images, dim), noise(rank, 1, dim)
    apart = 0.3 + 0.25 * (rank % 4)
    views = content_BD + 0.5 * place_D + apart * noise(rank, 2, 2, num_images, dim)
    return (views * 3.0 ** (rank % 5 - 1)).float()


def activations(rank: int, num_rows: int, channels: int) -> torch.Tensor:
    """Return a rank's input of a BatchNorm, float64 (N, C, 4, 4): own mean and spread."""
    own_C = (noise(rank, 3, channels) + rank % 3).view(-1, 1, 1)
    return own_C + (0.3 + rank % 4) * noise(rank, 4, num_rows, channels, 4, 4)


def views(rank: int, step: int, num_images: int) -> torch.Tensor:
    """Return a rank's views of a step, uint8 (2, B, 3, 8, 8): own brightness, contrast, skew."""
    shape = (num_images, 3, SIDE, SIDE)
    content = torch.special.ndtr(noise(rank, 10 + 2 * step, *shape))
    grain = torch.special.ndtr(noise(rank, 11 + 2 * step, 2, *shape))
    bright = (0.7 * content + 0.3 * grain) ** (1 + rank % 3)
    low, high = 0.15 * (rank % 3), 1 - 0.2 * (rank % 2)
    return ((low + (high - low) * bright) * 255).round().to(torch.uint8)


class Images:
    """A shard set in memory: what a loader needs of one. No two images are alike.

    Attributes:
        size_N2: int32 heights and widths.
        digest: Stands for the sha256 of a manifest.
    """

    def __init__(self, num_images: int, height: int = 24, width: int = 32) -> None:
        self.size_N2 = np.tile(np.array([[height, width]], np.int32), (num_images, 1))
        self.digest = f"verify {num_images} {height} {width}"

    def __len__(self) -> int:
        return len(self.size_N2)

    def place(self, sample_id: int) -> str:
        """Name an image."""
        return f"image {sample_id}"

    def prefetch(self, shards: list[int], tolerant: bool = False) -> None:
        """Take a hint; nothing is read from anywhere."""

    def sizes(self, sample_ids: Int64) -> npt.NDArray[np.int32]:
        """Return heights and widths in pixels, int32 (n, 2)."""
        return self.size_N2[sample_ids]

    def labels(self, sample_ids: Int64) -> Int64:
        """Return int64 (n,), -1 for no label."""
        return np.full(len(sample_ids), -1, np.int64)

    def order(self, seed: int) -> BlockOrder:
        """Return the order of one shard."""
        return BlockOrder(np.array([len(self)]), seed=seed)

    def read(self, sample_id: int) -> bytes:
        """Return the image as PNG."""
        stream = io.BytesIO()
        Image.fromarray(self[sample_id]).save(stream, "PNG", compress_level=1)
        return stream.getvalue()

    def images(self, sample_ids: Int64) -> list[Pixels | None]:
        """Return None for each image: they are made one by one."""
        return [None] * len(sample_ids)

    def __getitem__(self, sample_id: int) -> Pixels:
        """Return waves of three colours with some grain, uint8 (H, W, 3)."""
        if not 0 <= sample_id < len(self):
            raise IndexError(f"there is no image {sample_id} among {len(self)}.")
        height, width = self.size_N2[sample_id]
        y, x = np.mgrid[:height, :width]
        numbers = 2 + 10 * uniforms(SEED, 8, sample_id, np.arange(9)).reshape(3, 3)
        waves = np.stack([np.sin(x / a + y / b + c) for a, b, c in numbers], -1)
        grain = uniforms(SEED, 9, sample_id, np.arange(waves.size)).reshape(waves.shape)
        return (128 + 95 * waves + 30 * (grain - 0.5)).clip(0, 255).astype(np.uint8)
