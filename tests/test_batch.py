"""The batch checks its own contract."""

from __future__ import annotations

import pytest
import torch

from fastclr.batch import Batch

B = 3


def batch(**changes: torch.Tensor) -> Batch:
    """Return a good batch with some parts changed."""
    parts = {
        "views_VBCHW": torch.zeros(2, B, 3, 8, 10, dtype=torch.uint8),
        "label_B": torch.full((B,), -1),
        "sample_id_B": torch.arange(B),
    }
    return Batch(**{**parts, **changes})


def test_a_good_batch_returns_itself():
    good = batch()
    assert good.check() is good


@pytest.mark.parametrize("num_views", [3, 8])
def test_more_views_than_two_are_a_batch(num_views):
    batch(views_VBCHW=torch.zeros(num_views, B, 3, 8, 10, dtype=torch.uint8)).check()


@pytest.mark.parametrize(
    "views",
    [
        torch.zeros(2, B, 3, 8, 10),  # float
        torch.zeros(2 * B, 3, 8, 10, dtype=torch.uint8),  # flattened
        torch.zeros(2, B, 8, 10, 3, dtype=torch.uint8),  # channels last in shape
        torch.zeros(1, B, 3, 8, 10, dtype=torch.uint8),  # one view: chunk(2) would pair images
        torch.zeros(0, B, 3, 8, 10, dtype=torch.uint8),
        torch.zeros(3, B, 1, 8, 10, dtype=torch.uint8),  # gray
    ],
)
def test_bad_views_are_refused(views):
    with pytest.raises(ValueError, match=r"views are .*give uint8 \(V, B, 3, H, W\)"):
        batch(views_VBCHW=views).check()


@pytest.mark.parametrize("name", ["label_B", "sample_id_B"])
@pytest.mark.parametrize(
    "values", [torch.arange(B + 1), torch.arange(B).int(), torch.arange(B)[:, None]]
)
def test_bad_ids_are_refused(name, values):
    with pytest.raises(ValueError, match=rf"{name} is .*give int64 \({B},\)"):
        batch(**{name: values}).check()


def test_the_positive_of_row_i_is_row_i_plus_B():
    views = torch.arange(2 * B, dtype=torch.uint8).reshape(2, B, 1, 1, 1).expand(2, B, 3, 2, 2)
    rows = batch(views_VBCHW=views).check().views_VBCHW.flatten(0, 1)[:, 0, 0, 0]
    for i, row in enumerate(rows.tolist()):
        assert rows[(i + B) % (2 * B)] == (row + B) % (2 * B)
