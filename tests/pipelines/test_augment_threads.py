"""What the threads back-end owes beside parity: the same bits however its work is cut."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fastclr.world import World
from pipelines import ShardSet, SimCLRPolicy, make_loader
from pipelines.augment_reference import augment as reference
from pipelines.augment_threads import Threads
from pipelines.backends import TOLERANCE
from pipelines.decode import Pixels
from pipelines.policy import ViewParams

Picture = Callable[..., Pixels]

SIZES = [(40, 32), (32, 32), (1, 1), (75, 64), (9, 70), (224, 224)] * 4


def drawn(policy: SimCLRPolicy) -> list[ViewParams]:
    sizes_N2 = np.array(SIZES, np.int32)
    positions = np.arange(len(SIZES))
    return [
        policy.draw(seed=3, epoch=0, positions=positions, view=view, sizes_N2=sizes_N2)
        for view in (0, 1)
    ]


@pytest.fixture(scope="module")
def images(picture: Picture) -> list[Pixels]:
    return [picture(h, w, k) for k, (h, w) in enumerate(SIZES)]


@pytest.mark.parametrize("side", [8, 32, 72])
def test_any_cut_into_chunks_in_any_order_and_thread(images: list[Pixels], side: int) -> None:
    policy = SimCLRPolicy(size=side)
    backend, params = Threads([policy] * 2), drawn(policy)
    whole = backend(images, params)
    assert torch.equal(whole, backend(images, params))

    def part(rows: np.ndarray) -> torch.Tensor:
        return backend([images[i] for i in rows], [p[rows] for p in params])

    other = np.random.default_rng(0).permutation(len(images))
    assert torch.equal(part(other), whole[:, other])
    for size in (1, 5, 16):
        cuts = np.array_split(np.arange(len(images)), range(size, len(images), size))
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(part, cuts * 3))
        for views, rows in zip(found, cuts * 3, strict=True):
            assert torch.equal(views, whole[:, rows])


def test_a_policy_for_each_view(images: list[Pixels]) -> None:
    weak = SimCLRPolicy(size=32, blur_prob=0, jitter_prob=0, grayscale_prob=0)
    strong = SimCLRPolicy(size=32, blur_prob=1)
    params = [drawn(weak)[0], drawn(strong)[1], drawn(weak)[1]]
    views = Threads([weak, strong, weak])(images, params)
    assert views.shape == (3, len(images), 32, 32, 3)
    for found, numbers, policy in zip(views, params, (weak, strong, weak), strict=True):
        difference = (found.int() - reference(images, numbers, policy).int()).abs().double()
        assert difference.mean() < TOLERANCE["threads"][0]
        assert difference.max() <= TOLERANCE["threads"][1]


def test_whole_views_of_photographs_size(picture: Picture) -> None:
    policy = SimCLRPolicy(size=224)
    images = [picture(h, w, k) for k, (h, w) in enumerate([(375, 500), (224, 224)] * 6)]
    sizes_N2 = np.array([image.shape[:2] for image in images], np.int32)
    params = policy.draw(seed=1, epoch=0, positions=np.arange(12), view=0, sizes_N2=sizes_N2)
    (views,) = Threads([policy])(images, [params])
    difference = (views.int() - reference(images, params, policy).int()).abs().double()
    assert difference.mean() < TOLERANCE["threads"][0]
    assert difference.max() <= TOLERANCE["threads"][1]


@pytest.mark.parametrize(("side", "chunk"), [(8, 128), (32, 128), (96, 28), (224, 5), (512, 4)])
def test_chunks_are_milliseconds_of_work(side: int, chunk: int) -> None:
    assert Threads([SimCLRPolicy(size=side)] * 2).chunk == chunk


def test_a_loader_gives_the_same_on_any_number_of_threads(
    shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The set holds gray, CMYK, 16-bit, palette, transparent, 1 x 1 and 1 x 60 images."""

    def batches(num_threads: int) -> torch.Tensor:
        loader = make_loader(
            shard_set, SimCLRPolicy(size=24), micro_batch_size=10, backend="threads",
            num_threads=num_threads, world=World(),
        )  # fmt: skip
        stream = iter(loader)
        return torch.stack([next(stream).views_VBCHW.clone() for _ in range(5)])

    whole = batches(1)
    monkeypatch.setattr("pipelines.augment_threads.CHUNK_PIXELS", 24 * 24 * 4)
    for num_threads in (1, 4):
        assert torch.equal(batches(num_threads), whole)
