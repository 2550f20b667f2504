"""What public losses do to the gradient over ranks, and that fastclr's is exact beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightly.loss import NTXentLoss
from pytorch_metric_learning import losses as pml_losses

from fastclr.losses import nt_xent
from tests.losses.formulas import gradients, pair

SCRIPT = Path(__file__).with_name("peers_ranks.py")
EXACT = [
    "fastclr gather",
    "fastclr ring",
    "fastclr reference",
    "lightly gather_distributed=True",
    "PML DistributedLossWrapper(efficient=False)",
]


@pytest.fixture(scope="module", params=[2, 4])
def measured(request, run_ranks) -> tuple[int, dict[str, dict[str, float]]]:
    """Return the table of R ranks; `pytest -s` prints it."""
    table = run_ranks(SCRIPT, request.param, timeout_seconds=300)
    print(f"\n{request.param} ranks: loss, length and cosine against the whole batch's")
    for name, row in table.items():
        print("  {:45} {loss:9.6f} {ratio:9.6f} {cosine:9.6f}".format(name, **row))
    return request.param, table


@pytest.mark.parametrize("name", EXACT)
def test_these_are_exact(measured, name):
    num_ranks, table = measured
    row = table[name]
    scale = num_ranks if name.startswith("PML") else 1  # so that the gradient's mean is right
    assert row["loss"] == pytest.approx(scale, abs=1e-10)
    assert row["ratio"] == pytest.approx(1, abs=1e-10)
    assert row["cosine"] >= 1 - 1e-12


def test_lightly_by_default_contrasts_with_this_rank_alone(measured):
    row = measured[1]["lightly gather_distributed=False (default)"]
    assert row["loss"] < 0.9
    assert row["cosine"] < 0.95


def test_the_efficient_wrapper_is_scaled_and_leaves_its_own_rows_out(measured):
    num_ranks, table = measured
    row = table["PML DistributedLossWrapper(efficient=True)"]
    assert row["ratio"] == pytest.approx(num_ranks, rel=0.25)
    assert row["cosine"] < 0.99


def test_a_gather_without_gradient_loses_the_column_term(measured):
    row = measured[1]["by hand: gather without gradient"]
    assert row["loss"] == pytest.approx(1, abs=1e-12), "the loss does not show it"
    assert row["ratio"] < 0.9
    assert row["cosine"] < 0.99


def test_in_one_process_all_agree():
    z = pair(12)
    images = torch.arange(12).repeat(2)
    ours = nt_xent(*z, temperature=0.2)
    grad = gradients(ours, *z)
    for loss in (NTXentLoss(0.2)(*z), pml_losses.NTXentLoss(0.2)(torch.cat(z), images)):
        assert loss.item() == pytest.approx(ours.item(), abs=1e-6)
        torch.testing.assert_close(gradients(loss, *z), grad, rtol=1e-6, atol=1e-8)
