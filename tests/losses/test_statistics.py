"""What a loss tells about the search for the positive, in the same pass."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastclr.kernels import tiles
from fastclr.losses import nt_logistic, nt_xent
from tests.losses.draws import batches, quick, temperatures
from tests.losses.formulas import CASES, EXPLICIT, gradients, pair

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_impl = pytest.mark.parametrize("impl", EXPLICIT)
every_block = pytest.mark.parametrize("block", [1, 3, 8])


def statistics_of(loss, *z) -> dict[str, float]:
    found: dict[str, torch.Tensor] = {}
    loss(*z, statistics=found)
    assert all(x.dtype == torch.float32 and not x.requires_grad for x in found.values())
    return {name: x.item() for name, x in found.items()}


@every_case
@quick
@given(z=batches, temperature=temperatures, block=st.sampled_from([1, 3, 8]))
def test_they_are_those_written_out(case, z, temperature, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "BLOCK", block)
        for impl in EXPLICIT:
            found = statistics_of(case.build(temperature, impl=impl), *z)
            assert found == pytest.approx(case.slow_statistics(*z, temperature), abs=2e-6)


@every_impl
def test_accuracy_counts_nearest_images_of_the_other_view(impl):
    def accuracy(z0, z1):
        found: dict[str, torch.Tensor] = {}
        nt_xent(z0, z1, impl=impl, statistics=found)
        return found["contrastive_accuracy"].item()

    z0 = torch.eye(4)
    assert accuracy(z0, 3 * z0) == 1
    assert accuracy(z0, z0.roll(1, 0)) == 0
    assert accuracy(z0, z0[[0, 1, 3, 2]]) == 0.5
    # The other views 0 are no candidates, however near.
    assert accuracy(1 + 0.1 * z0, z0) == 1


@every_case
@every_impl
@every_block
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_collapsed_model_finds_nothing(case, impl, block, dtype, monkeypatch):
    monkeypatch.setattr(tiles, "BLOCK", block)
    z = torch.randn(1, 7, dtype=dtype, generator=torch.Generator().manual_seed(0)).repeat(6, 1)
    expected = {"contrastive_accuracy": 0, "contrastive_entropy": math.log(6)}
    if case.semi_hard:
        expected["no_semi_hard"] = 1
    assert statistics_of(case.build(impl=impl), z, z) == pytest.approx(expected, abs=5e-6)


@every_case
@every_impl
def test_low_temperatures_leave_no_entropy(case, impl):
    z = [row.float() for row in pair(6)]
    found = statistics_of(case.build(0.005, impl=impl), *z)
    assert found == pytest.approx(case.slow_statistics(*z, 0.005), abs=1e-4)


@every_case
@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_do_not_change_by_a_bit(case, impl, dtype):
    z = pair(6, dtype=dtype)
    loss, told = case.build(impl=impl)(*z), case.build(impl=impl)(*z, statistics={})
    assert torch.equal(loss, told)
    assert torch.equal(gradients(loss, *z), gradients(told, *z))


def test_only_a_mined_loss_tells_of_mining():
    found: dict[str, torch.Tensor] = {}
    nt_logistic(*pair(3), statistics=found)
    assert list(found) == ["contrastive_accuracy", "contrastive_entropy"]
