"""Loaders that make their views on a GPU: the same images in the same order as on the CPU."""

from __future__ import annotations

import pytest
import torch

from fastclr.world import World
from pipelines.backends import TOLERANCE
from pipelines.loader import make_loader
from pipelines.policy import SimCLRPolicy
from pipelines.shards import ShardSet

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
POLICIES = [SimCLRPolicy(size=48, blur_prob=0.5)] * 2
# Means over views, in levels: NVIDIA's JPEG decoder rounds otherwise than libjpeg-turbo.
MEAN = {**{name: mean for name, (mean, _) in TOLERANCE.items()}, "dali": 1.5}


def batches(shards, backend, device, skip=0):
    def loader():
        return make_loader(
            ShardSet.open(shards), POLICIES, micro_batch_size=64, seed=3, backend=backend,
            device=device, world=World(), num_threads=2,
        )  # fmt: skip

    made = loader()
    if skip:
        first = loader()
        stream = iter(first)
        for _ in range(skip):
            next(stream)
        made.load_state_dict(first.state_dict())
    stream = iter(made)
    return [next(stream) for _ in range(12 - skip)]


@pytest.fixture(scope="module")
def expected(photos):
    return batches(photos.train, "reference", CPU)


@pytest.mark.parametrize("backend", ["threads", "kornia", "triton", "dali"])
def test_views_are_those_of_the_reference(backend, photos, expected):
    found = batches(photos.train, backend, GPU)
    differences = []
    for one, other in zip(found, expected, strict=True):
        # Views of threads wait in pinned memory: the trainer takes them over.
        place = CPU if backend == "threads" else GPU
        assert one.views_VBCHW.device == place and one.views_VBCHW.dtype == torch.uint8
        assert place == GPU or one.views_VBCHW.is_pinned()
        assert one.sample_id_B.tolist() == other.sample_id_B.tolist()
        differences.append(
            (one.views_VBCHW.cpu().float() - other.views_VBCHW.float()).abs().mean().item()
        )
    mean = sum(differences) / len(differences)
    print(f"{backend}: views differ by {mean:.4f} levels in the mean")
    assert mean <= MEAN[backend]


@pytest.mark.parametrize("backend", ["kornia", "triton", "dali"])
def test_a_loader_goes_on_where_it_stood(backend, photos):
    whole, rest = (batches(photos.train, backend, GPU, skip) for skip in (0, 5))
    for one, other in zip(whole[5:], rest, strict=True):
        assert one.sample_id_B.tolist() == other.sample_id_B.tolist()
        assert torch.equal(one.views_VBCHW, other.views_VBCHW)
