"""The loader: each id once, exact resume on any number of ranks, no leaks, errors that surface."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastclr.batch import Batch
from fastclr.config import ConfigError
from fastclr.world import World
from pipelines.augment_kornia import augment as kornia
from pipelines.backends import BACKENDS, ViewByView
from pipelines.evaluation_views import evaluation_batches
from pipelines.loader import Loader, make_loader
from pipelines.order import permutation
from pipelines.policy import SimCLRPolicy
from pipelines.shards import ShardError, ShardSet

POLICY = SimCLRPolicy(size=20, color_strength=0.5)
THREADS = "fastclr-loader"


def make(shard_set: ShardSet, micro: int = 4, ranks: int = 1, rank: int = 0, **more: Any) -> Loader:
    world = World(rank, ranks, rank, ranks)
    settings = {"seed": 3, "num_threads": 2, "prefetch": 2, "world": world} | more
    return make_loader(shard_set, POLICY, micro_batch_size=micro, **settings)


def take(loader: Loader, n: int) -> list[Batch]:
    return list(itertools.islice(loader, n))


def ids(batches: list[Batch]) -> list[int]:
    return torch.cat([b.sample_id_B for b in batches]).tolist()


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.views_VBCHW, y.views_VBCHW)
        and torch.equal(x.label_B, y.label_B)
        and torch.equal(x.sample_id_B, y.sample_id_B)
        for x, y in zip(a, b, strict=True)
    )


def wait_for_no_threads() -> None:
    deadline = time.monotonic() + 10
    while any(t.name.startswith(THREADS) for t in threading.enumerate()):
        assert time.monotonic() < deadline, "loader threads leak"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _no_thread_leaks() -> Iterator[None]:
    yield
    wait_for_no_threads()


@pytest.fixture(scope="module")
def uninterrupted(shard_set: ShardSet) -> list[Batch]:
    """Two epochs and a bit: 5 batches of 4 in an epoch of 21."""
    return take(make(shard_set), 12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_keep_the_contract(shard_set: ShardSet, backend: str) -> None:
    (batch,) = take(make(shard_set, backend=backend), 1)
    views = batch.check().views_VBCHW
    assert views.shape == (2, 4, 3, 20, 20) and views.dtype == torch.uint8
    for view in views:
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert views.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(views[0], views[1]), "both views are the same"
    assert not views.is_inference(), "autograd could not use them"
    assert batch.label_B.tolist() == shard_set.label_N[batch.sample_id_B].tolist()


def test_views_are_the_policys(shard_set: ShardSet, uninterrupted: list[Batch]) -> None:
    """Batch 7 is positions 8..11 of epoch 1, drawn and augmented by hand."""
    sample_ids = permutation(21, 3, 1)[8:12]
    batch = uninterrupted[7]
    assert batch.sample_id_B.tolist() == sample_ids.tolist()
    images = [shard_set[i] for i in sample_ids]
    for view in range(2):
        params = POLICY.draw(
            seed=3,
            epoch=1,
            positions=np.arange(8, 12),
            view=view,
            sizes_N2=shard_set.size_N2[sample_ids],
        )
        expected = kornia(images, params, POLICY, torch.device("cpu"))
        assert torch.equal(batch.views_VBCHW[view], expected.permute(0, 3, 1, 2))


def test_an_epoch_holds_each_id_once(shard_set: ShardSet, uninterrupted: list[Batch]) -> None:
    loader = make(shard_set)
    assert loader.batches_per_epoch == 5 and loader.dropped_per_epoch == 1
    epochs = [ids(uninterrupted[k : k + 5]) for k in (0, 5)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert epochs[0] != epochs[1]
    whole = make(shard_set, micro=7)
    assert whole.dropped_per_epoch == 0
    assert sorted(ids(take(whole, 3))) == list(range(21))


def test_the_global_order_is_the_same_on_two_ranks(
    shard_set: ShardSet, uninterrupted: list[Batch]
) -> None:
    ranks = [take(make(shard_set, micro=2, ranks=2, rank=r), 7) for r in range(2)]
    for one, parts in zip(uninterrupted[:7], zip(*ranks, strict=True), strict=True):
        assert torch.equal(one.sample_id_B, torch.cat([p.sample_id_B for p in parts]))
        assert torch.equal(one.views_VBCHW, torch.cat([p.views_VBCHW for p in parts], 1))


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 6, 10])
def test_resume_equals_uninterrupted(
    shard_set: ShardSet, uninterrupted: list[Batch], stop: int
) -> None:
    first = make(shard_set)
    assert same(take(first, stop), uninterrupted[:stop])
    second = make(shard_set)
    second.load_state_dict(first.state_dict())
    assert same(take(second, 12 - stop), uninterrupted[stop:])


def test_the_position_counts_what_was_handed_out_not_what_was_prepared(
    shard_set: ShardSet,
) -> None:
    loader = make(shard_set, prefetch=4)
    batches = iter(loader)
    positions = [loader.state_dict()] + [loader.state_dict() for _ in itertools.islice(batches, 6)]
    batches.close()  # type: ignore[attr-defined]
    assert [(p["epoch"], p["position"]) for p in positions] == [
        (0, 0),
        (0, 4),
        (0, 8),
        (0, 12),
        (0, 16),
        (0, 20),
        (1, 4),
    ]


def test_an_iterator_goes_on_where_the_last_one_stopped(
    shard_set: ShardSet, uninterrupted: list[Batch]
) -> None:
    loader = make(shard_set)
    assert same(take(loader, 3) + take(loader, 4), uninterrupted[:7])


def test_two_ranks_go_on_after_one(shard_set: ShardSet, uninterrupted: list[Batch]) -> None:
    one = make(shard_set)
    take(one, 6)
    parts = []
    for rank in range(2):
        loader = make(shard_set, micro=2, ranks=2, rank=rank)
        loader.load_state_dict(one.state_dict())
        parts.append(take(loader, 3))
        assert loader.state_dict() == {**one.state_dict(), "position": 16}
    for whole, a, b in zip(uninterrupted[6:9], *parts, strict=True):
        assert torch.equal(whole.views_VBCHW, torch.cat([a.views_VBCHW, b.views_VBCHW], 1))


def test_three_ranks_go_on_at_a_position_of_another_batch_size(shard_set: ShardSet) -> None:
    one = make(shard_set)
    take(one, 1)
    found = []
    for rank in range(3):
        loader = make(shard_set, micro=2, ranks=3, rank=rank)
        loader.load_state_dict(one.state_dict())
        found.append(take(loader, 3))
    order = permutation(21, 3, 0)
    for t in range(2):  # 17 are left: two batches of 6, then the next epoch
        assert ids([f[t] for f in found]) == order[4 + 6 * t : 10 + 6 * t].tolist()
    assert ids([f[2] for f in found]) == permutation(21, 3, 1)[:6].tolist()


@pytest.mark.parametrize(("key", "value"), [("seed", 4), ("digest", "0" * 64)])
def test_a_position_of_other_data_is_refused(shard_set: ShardSet, key: str, value: object) -> None:
    loader = make(shard_set)
    with pytest.raises(ConfigError, match=f"data {key} is {value}"):
        loader.load_state_dict({**loader.state_dict(), "position": 8, key: value})
    assert loader.state_dict()["position"] == 0


@pytest.mark.parametrize(("num_threads", "prefetch"), [(1, 1), (1, 7), (4, 1), (4, 9)])
def test_threads_and_prefetch_change_nothing(
    shard_set: ShardSet, uninterrupted: list[Batch], num_threads: int, prefetch: int
) -> None:
    loader = make(shard_set, num_threads=num_threads, prefetch=prefetch)
    assert same(take(loader, 7), uninterrupted[:7])


def test_the_seed_changes_order_and_views(shard_set: ShardSet, uninterrupted: list[Batch]) -> None:
    other = take(make(shard_set, seed=4), 5)
    assert ids(other) != ids(uninterrupted[:5])


def test_a_damaged_image_surfaces_and_the_position_stays(
    shard_set: ShardSet, uninterrupted: list[Batch], tmp_path: Path
) -> None:
    packed = ShardSet.open(shutil.copytree(shard_set.path, tmp_path / "train"))
    tar = tmp_path / "train" / "train-000001.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    good = next(k for k, b in enumerate(uninterrupted) if set(range(8, 16)) & set(ids([b])))
    loader = make(packed)
    batches = iter(loader)
    assert same(list(itertools.islice(batches, good)), uninterrupted[:good])
    with pytest.raises(ShardError, match=r"train-000001\.tar, key 0000000\d\d \(from "):
        next(batches)
    assert loader.state_dict()["position"] == 4 * good
    wait_for_no_threads()
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize("how", ["close", "drop", "raise"])
def test_an_abandoned_iterator_stops_its_threads(shard_set: ShardSet, how: str) -> None:
    batches = iter(make(shard_set, num_threads=3))
    next(batches)
    assert any(t.name.startswith(THREADS) for t in threading.enumerate())
    if how == "close":
        batches.close()  # type: ignore[attr-defined]
    elif how == "raise":
        with pytest.raises(KeyboardInterrupt):
            batches.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    del batches
    wait_for_no_threads()


def test_waiting_is_counted(shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*arguments: Any) -> torch.Tensor:
        time.sleep(0.1)
        return kornia(*arguments)

    monkeypatch.setitem(
        BACKENDS, "slow", lambda policies, device, _: ViewByView(slow, policies, device)
    )
    loader = make(shard_set, backend="slow", num_threads=1, prefetch=1)
    assert loader.wait_seconds == 0
    take(loader, 2)
    assert loader.wait_seconds > 0.35  # two batches of two views
    before = loader.wait_seconds
    for _ in itertools.islice(loader, 1):
        pass
    assert loader.wait_seconds > before


def test_an_unknown_backend_is_refused(shard_set: ShardSet) -> None:
    with pytest.raises(
        ConfigError, match="backend 'dahli' is unknown: choose from kornia, reference"
    ):
        make(shard_set, backend="dahli")


def test_more_than_the_data_is_refused(shard_set: ShardSet) -> None:
    with pytest.raises(ConfigError, match="has 21 samples and a global batch 22"):
        make(shard_set, micro=11, ranks=2)


def test_the_launcher_says_which_rank(shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert make(shard_set, world=None).world == World(1, 2, 1, 2)


@pytest.mark.parametrize("batch_size", [1, 8, 21, 256])
def test_evaluation_sees_every_image_once_in_order(shard_set: ShardSet, batch_size: int) -> None:
    batches = list(evaluation_batches(shard_set, 16, batch_size))
    full, rest = divmod(21, batch_size)
    assert [len(x) for x, _ in batches] == [batch_size] * full + [rest] * (rest > 0)
    x_NCHW, label_N = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert x_NCHW.shape == (21, 3, 16, 16) and x_NCHW.dtype == torch.uint8
    assert label_N.dtype == torch.int64 and label_N.tolist() == shard_set.label_N.tolist()
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)
    ((whole, _),) = evaluation_batches(shard_set, 16, 21)
    assert torch.equal(x_NCHW, whole)


@pytest.mark.parametrize("limit", [None, 1, 2, 13, 21, 99])
@pytest.mark.parametrize("ranks", [2, 3, 5, 30])
def test_the_ranks_together_evaluate_every_image_once_in_order(
    shard_set: ShardSet, ranks: int, limit: int | None
) -> None:
    whole = list(evaluation_batches(shard_set, 16, 21, limit=limit))
    x_NCHW, label_N = (torch.cat(parts) for parts in zip(*whole, strict=True))
    assert len(label_N) == min(limit or 21, 21)
    parts = [
        list(evaluation_batches(shard_set, 16, 2, World(r, ranks, r, ranks), limit))
        for r in range(ranks)
    ]
    sizes = [sum(len(labels) for _, labels in part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    batches = [batch for part in parts for batch in part]
    assert torch.equal(torch.cat([x for x, _ in batches]), x_NCHW)
    assert torch.cat([y for _, y in batches]).tolist() == label_N.tolist()


def test_a_rank_reads_its_own_part_only(picture: Any) -> None:
    class Noted(list):
        label_N = np.zeros(11, np.int64)

        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return super().__getitem__(index)

    read: list[int] = []
    images = Noted([picture(16, 16, k) for k in range(11)])
    list(evaluation_batches(images, 16, 3, World(1, 3, 1, 3), limit=10))  # type: ignore[arg-type]
    assert read == [3, 4, 5]


def evaluated(pixels: np.ndarray, size: int) -> np.ndarray:
    """The view of one image; a list is as good as a shard set."""

    class One(list):
        label_N = np.array([0])

    ((x_NCHW, _),) = evaluation_batches(One([pixels]), size)  # type: ignore[arg-type]
    return x_NCHW[0].permute(1, 2, 0).numpy()


def test_evaluation_of_small_sizes_is_the_centre(picture: Any) -> None:
    image = picture(32, 32)
    assert np.array_equal(evaluated(image, 32), image)
    wide = picture(32, 48)
    assert np.array_equal(evaluated(wide, 32), wide[:, 8:40])
    tall = picture(50, 32)
    assert np.array_equal(evaluated(tall, 32), tall[9:41])


@pytest.mark.parametrize(("height", "width"), [(70, 70), (96, 96), (120, 96), (1, 9)])
def test_evaluation_above_64_pixels_crops_seven_eighths(
    picture: Any, height: int, width: int
) -> None:
    image = picture(height, width)
    scale = 110 / min(height, width)
    resized = Image.fromarray(image).resize(
        (round(width * scale), round(height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (resized.width - 96) // 2, (resized.height - 96) // 2
    expected = np.array(resized.crop((left, top, left + 96, top + 96)))
    assert np.array_equal(evaluated(image, 96), expected)
