"""Input without meaning: refused with its values where the host sees it, NaN where it does not."""

from __future__ import annotations

import pytest
import torch

from fastclr.kernels import tiles
from fastclr.losses import LOSSES, margin_triplet, nt_logistic, nt_xent
from tests.losses.formulas import CASES, EXPLICIT, gradients, pair

every_loss = pytest.mark.parametrize("name", LOSSES)
every_impl = pytest.mark.parametrize("impl", EXPLICIT)
every_value = pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])


def broken(value: float, view: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    z = pair(5, dtype=dtype)
    with torch.no_grad():
        z[view][3, 1] = value
    return z


@every_value
@every_impl
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_not_finite_makes_loss_and_gradient_nan(case, dtype, impl, value, monkeypatch):
    monkeypatch.setattr(tiles, "BLOCK", 3)
    for view in (0, 1):
        z = broken(value, view, dtype)
        loss = case.build(impl=impl)(*z, statistics={})
        assert loss.isnan()
        assert gradients(loss, *z).isnan().any()


@every_value
@every_impl
def test_dot_products_that_are_not_finite_do_so_too(impl, value):
    for view in (0, 1):
        z = broken(value, view, torch.float64)
        loss = nt_xent(*z, temperature=1.0, normalize=False, impl=impl)
        assert loss.isnan()
        assert gradients(loss, *z).isnan().any()


@every_loss
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 3), (5, 3)), r"\(4, 3\) and \(5, 3\).*one shape"),
        (((4, 3), (4, 2)), "one shape"),
        (((4,), (4,)), "one shape"),
        (((2, 4, 3), (2, 4, 3)), "one shape"),
        (((4, 0), (4, 0)), "one shape"),
        (((0, 3), (0, 3)), "has 0 images over all ranks.*at least 2"),
        (((1, 3), (1, 3)), "has 1 images over all ranks.*at least 2"),
    ],
)
def test_shapes_without_meaning_are_refused(name, shapes, message):
    for equal_ranks in (False, True):
        with pytest.raises(ValueError, match=message):
            LOSSES[name](equal_ranks=equal_ranks)(*map(torch.zeros, shapes))


@every_loss
def test_integers_are_refused(name):
    ones = torch.ones(2, 3)
    for z in ((ones.long(), ones.long()), (ones, ones.long())):
        with pytest.raises(ValueError, match=r"torch.int64: give floating point"):
            LOSSES[name]()(*z)


@pytest.mark.parametrize("loss", [nt_xent, nt_logistic])
@pytest.mark.parametrize("temperature", [0, -0.1, float("nan")])
def test_temperatures_without_meaning_are_refused(loss, temperature):
    with pytest.raises(ValueError, match=f"temperature is {temperature}: it divides"):
        loss(*pair(2), temperature=temperature)


@pytest.mark.parametrize("margin", [-0.1, float("nan")])
def test_margins_without_meaning_are_refused(margin):
    with pytest.raises(ValueError, match=f"margin is {margin}: it is a difference of cosines"):
        margin_triplet(*pair(2), margin=margin)


@every_loss
@pytest.mark.parametrize(
    ("option", "known"),
    [
        ("negatives", "both, other_view"),
        ("impl", "auto, reference, blocked, triton"),
        ("exchange", "gather, ring"),
        ("grad_reduction", "mean, sum"),
    ],
)
def test_unknown_options_are_refused(name, option, known):
    with pytest.raises(ValueError, match=f"{option} 'most' is unknown: choose from {known}"):
        LOSSES[name](**{option: "most"})(*pair(2))


def test_the_reference_does_not_gather_in_silence():
    with pytest.raises(ValueError, match=r"all rows at once: use exchange='gather'"):
        nt_xent(torch.ones(3, 2), torch.ones(3, 2), impl="reference", exchange="ring")
