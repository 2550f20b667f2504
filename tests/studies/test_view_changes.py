"""Changes of views: a function of coordinates, one view's or both, nothing else moved."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastclr.studies.view_changes import CHANGES, ChangedViews
from pipelines.loader import make_loader
from pipelines.policy import SimCLRPolicy


def loader(images, batch_size=16, seed=0):
    return make_loader(
        images.train, SimCLRPolicy(size=32), micro_batch_size=batch_size, seed=seed,
        backend="threads", num_threads=1,
    )  # fmt: skip


def by_image(source, num_batches) -> dict[int, torch.Tensor]:
    """Return the views of each image of the first batches, all of one epoch."""
    batches = iter(source)
    found = {}
    for _ in range(num_batches):
        batch = next(batches)
        for row, sample_id in enumerate(batch.sample_id_B.tolist()):
            found[sample_id] = batch.views_VBCHW[:, row].clone()
    return found


WORDS = np.arange(64, dtype=np.int64) * 0x9E3779B97F4A7C1 % 2**62


def pictures(n=64):
    values = torch.arange(n * 3 * 32 * 32).reshape(n, 3, 32, 32) * 7919 % 251
    return values.to(torch.uint8)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_a_pure_function_and_leaves_its_input(name):
    views = pictures()
    before = views.clone()
    changed = CHANGES[name](views, WORDS)
    assert torch.equal(views, before)
    assert changed.dtype == torch.uint8
    assert changed.shape == views.shape
    assert torch.equal(changed, CHANGES[name](views, WORDS))
    alone = torch.cat([CHANGES[name](views[i : i + 1], WORDS[i : i + 1]) for i in range(64)])
    assert torch.equal(alone, changed)
    assert not torch.equal(changed, views)


def test_rotations_are_the_four_quarters():
    views = pictures()
    changed = CHANGES["rotate"](views, WORDS)
    turns = [
        next(k for k in range(4) if torch.equal(torch.rot90(view, k, (1, 2)), after))
        for view, after in zip(views, changed, strict=True)
    ]
    assert set(turns) == {0, 1, 2, 3}


def test_cutout_blackens_a_square_and_nothing_else():
    views = pictures() + 1
    changed = CHANGES["cutout"](views, WORDS)
    black = (changed == 0).all(1)
    assert torch.equal(changed[~black.unsqueeze(1).expand_as(views)],
                       views[~black.unsqueeze(1).expand_as(views)])  # fmt: skip
    areas = black.sum((1, 2))
    assert areas.max() == 16 * 16
    assert 8 * 8 <= areas.min() < 16 * 16
    rows = black.any(2).sum(1) * black.any(1).sum(1)
    assert torch.equal(rows, areas)


@pytest.mark.parametrize("name", ["noise", "sobel"])
def test_half_of_the_views_are_left_alone(name):
    views = pictures()
    changed = CHANGES[name](views, WORDS)
    same = sum(torch.equal(a, b) for a, b in zip(views, changed, strict=True))
    assert 16 <= same <= 48


def test_noise_is_another_one_for_another_word():
    views = pictures(1).expand(64, -1, -1, -1)
    changed = CHANGES["noise"](views, WORDS)
    assert len({view.numpy().tobytes() for view in changed}) > 16


def test_only_the_named_view_is_changed(images):
    plain = by_image(loader(images), 3)
    changed = by_image(ChangedViews(loader(images), ((), ("rotate", "noise")), 0), 3)
    assert plain.keys() == changed.keys()
    assert all(torch.equal(plain[k][0], changed[k][0]) for k in plain)
    assert sum(not torch.equal(plain[k][1], changed[k][1]) for k in plain) > 30


def test_views_do_not_depend_on_the_batch(images):
    changes = (("rotate",), ("noise",))
    small = by_image(ChangedViews(loader(images, 16), changes, 0), 3)
    large = by_image(ChangedViews(loader(images, 48), changes, 0), 1)
    assert small.keys() == large.keys()
    assert all(torch.equal(small[k], large[k]) for k in small)


def test_views_go_on_after_a_position(images):
    changes = (("rotate",), ("rotate",))
    whole = iter(ChangedViews(loader(images, 32), changes, 0))
    batches = [next(whole) for _ in range(5)]  # into the second epoch
    first = ChangedViews(loader(images, 32), changes, 0)
    walk = iter(first)
    next(walk), next(walk), next(walk), next(walk)
    second = ChangedViews(loader(images, 32), changes, 0)
    second.load_state_dict(first.state_dict())
    assert torch.equal(next(iter(second)).views_VBCHW, batches[4].views_VBCHW)
    assert not torch.equal(batches[0].views_VBCHW, batches[3].views_VBCHW)


def test_epochs_views_and_seeds_are_changed_otherwise(images):
    black = loader(images, 96)
    source = ChangedViews(black, (("cutout",), ("cutout",)), 0)
    batch = next(iter(black))
    masks = {
        (epoch, seed): ChangedViews(black, source._changes, seed)._changed(batch, epoch)
        for epoch, seed in ((0, 0), (1, 0), (0, 1))
    }
    kinds = [found.views_VBCHW[view] == 0 for found in masks.values() for view in range(2)]
    for i, one in enumerate(kinds):
        assert all(not torch.equal(one, other) for other in kinds[i + 1 :])


def test_views_stay_channels_last(images):
    batch = next(iter(ChangedViews(loader(images), (("rotate",), ()), 0)))
    assert batch.views_VBCHW[0].is_contiguous(memory_format=torch.channels_last)
