"""Over ranks, loss, statistics and gradient are those of one process that holds all images."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.losses import loss_ranks
from tests.losses.formulas import CASES, Case, ratio_and_cosine
from tests.losses.loss_ranks import CHUNKED, SHARINGS, VARIANTS, WAYS, key

Found = list[dict[str, Any]]  # of each rank
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(scope="module", params=SHARINGS)
def everyone(request, run_ranks) -> Found:
    """Run all measurements on R ranks once."""
    return run_ranks(Path(loss_ranks.__file__), request.param, timeout_seconds=300)


def double(numbers: Sequence[Any]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def together(found: Sequence[dict[str, Any]], reduction: str = "mean") -> dict[str, Any]:
    """Return what an engine that averages gradients, or one that sums them, finds over ranks."""
    size = len(found) if reduction == "mean" else 1
    return {name: (double([f[name] for f in found]).sum(0) / size).tolist() for name in found[0]}


@functools.cache
def written_out(case: Case, is_learned: bool = False, half: int | None = None) -> dict[str, Any]:
    """Return what one process finds by the formula; over all images or over a half of them."""
    views_VGP = loss_ranks.images_VGP()
    if half is not None:
        views_VGP = views_VGP.chunk(2, dim=1)[half]
    model = loss_ranks.linear()
    temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    z_VGD = model(views_VGP)
    loss = case.slow(*z_VGD, temperature)
    leaves = [model.weight, temperature] if is_learned else [model.weight]
    grad = torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])
    told = case.slow_statistics(*z_VGD.detach())
    return {"loss": loss.item(), **told, "grad": grad.tolist()}


def scalars(found: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in found.items() if name != "grad"}


def assert_equal(found: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    """Ask for one process's numbers."""
    assert found.keys() == expected.keys()
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-13), name
    assert scalars(found) == pytest.approx(scalars(expected), abs=2e-6), name
    ratio, cosine = ratio_and_cosine(*(double(x["grad"]) for x in (found, expected)))
    assert ratio == pytest.approx(1, abs=1e-10) and cosine >= 1 - 1e-12, (name, ratio, cosine)


def test_the_images_tell_right_from_wrong():
    for case in CASES:
        expected = written_out(case)
        assert 0 < expected["contrastive_accuracy"] < 1
        assert max(map(abs, expected["grad"])) > 1e-2
        if case.semi_hard:
            assert 0 < expected["no_semi_hard"] < 1


@every_case
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_it_is_the_loss_of_one_process(everyone, case, way):
    for images_R, (reduction, is_learned) in itertools.product(SHARINGS[len(everyone)], VARIANTS):
        name = key(images_R, case, *way, reduction, *["learned"] * is_learned)
        found = together([rank[name] for rank in everyone], reduction)
        assert_equal(found, written_out(case, is_learned and not case.is_cosine), name)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_triton_is_so_to_half_precision(everyone, exchange):
    expected = written_out(Case("nt_xent"))
    true = double(expected["grad"])
    for images_R in SHARINGS[len(everyone)]:
        found = together([rank[key(images_R, "triton", exchange)] for rank in everyone])
        assert (double(found["grad"]) - true).norm() <= 2e-3 * true.norm()
        assert scalars(found) == pytest.approx(scalars(expected), rel=1e-3)


@every_case
def test_only_blocked_after_a_gather_has_no_collective_in_the_backward(everyone, case):
    for rank in everyone:
        called = rank[key(case, "collectives")]
        assert called["blocked gather"] == []
        if len(everyone) > 1:
            assert set(called["blocked ring"]) == {"batch_isend_irecv", "isend", "irecv"}
            assert called["reference gather"] == ["all_reduce"]


@pytest.mark.parametrize("name", CHUNKED)
def test_gradient_caching_is_exact_over_ranks(everyone, name):
    model = loss_ranks.linear()
    loss = CHUNKED[name](*model(loss_ranks.images_VGP()))
    (grad,) = torch.autograd.grad(loss, model.parameters())
    expected = {"loss": loss.item(), "grad": grad.flatten().tolist()}
    assert_equal(together([rank[key(name, "cached")] for rank in everyone]), expected, name)


def test_what_only_all_ranks_see_is_refused_on_each(everyone):
    dims = [4 + rank for rank in range(len(everyone))]
    for rank in everyone:
        *unequal, one, none = rank["refusals"]
        if len(everyone) > 1:
            assert unequal == [f"ranks project to {dims} dimensions: give every rank the same."]
        assert one.startswith("the contrastive batch has 1 images over all ranks")
        assert none.startswith("the contrastive batch has 0 images over all ranks")


@pytest.mark.parametrize("everyone", [4], indirect=True)
def test_groups_are_worlds_of_their_own(everyone):
    for case, (impl, exchange) in itertools.product(CASES, WAYS):
        found = [rank[key(case, impl, exchange, "group")] for rank in everyone]
        for half, ranks in enumerate((found[:2], found[2:])):
            name = key(case, impl, exchange, half)
            assert_equal(together(ranks), written_out(case, half=half), name)
