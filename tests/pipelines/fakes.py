"""A data set of many small shards in memory, with damage on demand, and a back-end with chunks."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image

from pipelines.decode import DamagedImage, Pixels, decode
from pipelines.order import BlockOrder, Int64, hash64
from pipelines.policy import SimCLRPolicy, ViewParams
from pipelines.shards import DamagedSample, ShardError


class FakeSet:
    """Images of several sizes, PNG; ``damage`` maps ids to what is wrong with them."""

    digest = "fake"

    def __init__(
        self,
        shard_sizes: Sequence[int],
        window: int = 16,
        damage: Mapping[int, str] | None = None,
    ) -> None:
        self.shard_sizes, self.window = np.array(shard_sizes), window
        self.damage = damage or {}
        self.reads: list[int] = []
        self.hints: list[list[int]] = []

    def __len__(self) -> int:
        return int(self.shard_sizes.sum())

    def pixels(self, sample_id: int) -> Pixels:
        """The image as it was before any damage."""
        height, width = self.sizes(np.array([sample_id]))[0].tolist()
        words = hash64(sample_id, np.arange(height * width * 3))
        return (words >> np.uint64(56)).astype(np.uint8).reshape(height, width, 3)

    def read(self, sample_id: int) -> bytes:
        self.reads.append(sample_id)
        kind = self.damage.get(sample_id)
        if kind == "unreadable":
            raise ShardError(f"{self.place(sample_id)} cannot be read: the disk is gone.")
        pixels = self.pixels(sample_id)
        if kind == "another size":
            pixels = pixels[1:]
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG", compress_level=0)
        data = stream.getvalue()
        if kind == "inside":  # header and end are as they should be
            middle = len(data) // 2
            data = data[: middle - 30] + bytes(60) + data[middle + 30 :]
        return data[: len(data) // 2] if kind == "cut" else data

    def __getitem__(self, sample_id: int) -> Pixels:
        if sample_id not in self.damage:
            self.reads.append(sample_id)
            return self.pixels(sample_id)
        try:
            pixels = decode(self.read(sample_id))
        except DamagedImage as error:
            raise DamagedSample(self.place(sample_id), error) from error
        if pixels.shape[:2] != tuple(self.sizes(np.array([sample_id]))[0]):
            raise DamagedSample(self.place(sample_id), "is another size")
        return pixels

    def images(self, sample_ids: Int64) -> list[Pixels | None]:
        return [None] * len(sample_ids)

    def place(self, sample_id: int) -> str:
        return f"fake.tar, key {sample_id:09d}"

    def sizes(self, sample_ids: Int64) -> np.ndarray:
        sample_ids = np.asarray(sample_ids)
        return np.stack([8 + sample_ids % 5, 9 + sample_ids % 3], 1).astype(np.int32)

    def labels(self, sample_ids: Int64) -> Int64:
        return sample_ids % 7

    def order(self, seed: int) -> BlockOrder:
        return BlockOrder(self.shard_sizes, seed=seed, window=self.window)

    def prefetch(self, shards: list[int], tolerant: bool = False) -> None:
        self.hints.append(shards)


class ParamsBackend:
    """Writes the drawn numbers and the image's size and sum into the views: equal if they are."""

    def __init__(
        self,
        policies: Sequence[SimCLRPolicy],
        chunk: int | None = 2,
        takes_bytes: bool = False,
    ) -> None:
        self.size, self.chunk, self.takes_bytes = policies[0].size, chunk, takes_bytes
        self.calls: list[int] = []

    def __call__(self, images: Sequence, params: Sequence[ViewParams]) -> torch.Tensor:
        self.calls.append(len(images))
        pixels = [decode(i) if self.takes_bytes else i for i in images]
        views = np.zeros((len(params), len(images), self.size * self.size * 3), np.uint8)
        for v, block in enumerate(params):
            for n, image in enumerate(pixels):
                facts = [getattr(block, name)[n].tobytes() for name in vars(block)]
                facts += [np.array(image.shape).tobytes(), image.sum().tobytes()]
                row = np.frombuffer(b"".join(facts), np.uint8)
                views[v, n, : len(row)] = row
        return torch.from_numpy(views.reshape(*views.shape[:2], self.size, self.size, 3))
