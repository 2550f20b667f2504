"""What a row says of a deviation, and the data that deviations are measured on."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from fastclr.config import Config
from fastclr.losses import LOSSES, contrastive
from fastclr.verify import batch_norm_check, data, loss_checks
from fastclr.verify.case import Case
from fastclr.verify.loss_checks import DENSE, dense_loss
from fastclr.verify.model import make_model
from fastclr.verify.rows import CEILING, FLOOR, Row, compared, distance, limit_for, worst
from fastclr.world import World


def test_the_limit_itself_passes_and_what_is_beyond_fails():
    assert compared("a", "b", 1.0, 1.0).status == "pass"
    assert compared("a", "b", math.nextafter(1.0, 2), 1.0).status == "FAIL"


@pytest.mark.parametrize("deviation", [math.nan, math.inf])
def test_what_is_not_finite_fails_and_json_can_say_it(deviation):
    row = compared("a", "b", deviation, 1.0, "most in c")
    assert (row.status, row.deviation) == ("FAIL", None)
    assert str(deviation) in row.note and row.note.endswith("most in c")


def test_only_a_pass_or_what_cannot_be_is_good():
    good = {s: Row("a", "b", s).is_good for s in ("pass", "FAIL", "not applicable", "not run")}
    assert good == {"pass": True, "FAIL": False, "not applicable": True, "not run": False}


def test_distance_is_relative_and_of_nothing_is_0():
    ones = torch.ones(4)
    assert distance(1.5 * ones, ones) == pytest.approx(0.5)
    assert distance(0 * ones, 0 * ones) == 0
    assert distance(ones, 0 * ones) == math.inf
    assert math.isnan(distance(math.nan * ones, ones))


def test_the_worst_is_the_largest_or_no_number_at_all():
    assert worst([1.0, 3.0, 2.0]) == 1
    assert worst([1.0, math.nan, math.inf]) == 1 == worst([math.inf, math.nan])


def test_limits_follow_the_error_between_floor_and_ceiling():
    assert limit_for(0) == FLOOR
    assert limit_for(1e-5) == pytest.approx(4e-5, rel=0.1)
    for dtype, ceiling in CEILING.items():
        assert limit_for(10, dtype) == ceiling < 0.5
    assert CEILING[torch.float32] < limit_for(10, tf32=True) < CEILING[torch.float16]
    assert limit_for(10, torch.bfloat16, tf32=True) == CEILING[torch.bfloat16]


def test_ranks_have_other_data():
    draws = {
        "projections": lambda rank: data.projections(rank, 4, 6),
        "activations": lambda rank: data.activations(rank, 6, 3),
        "views": lambda rank: data.views(rank, 0, 4).float(),
    }
    for name, draw in draws.items():
        assert torch.equal(draw(3), draw(3)), f"{name} are not a function of the rank"
        for a, b in itertools.combinations(map(draw, range(4)), 2):
            assert abs(a.std() / b.std() - 1) > 0.02, f"{name} are equally spread"
            assert (a.mean() - b.mean()).abs() > 0.02, f"{name} lie at the same place"
    assert not torch.equal(data.views(0, 0, 4), data.views(0, 1, 4)), "a step is like the other"


def test_noise_is_standard_normal():
    noise = data.noise(0, 0, 100, 100)
    assert noise.mean().abs() < 0.03 and abs(noise.std() - 1) < 0.03
    assert 0.04 < (noise.abs() > 1.96).double().mean() < 0.06


def test_images_are_told_apart_and_have_an_end():
    images = data.Images(5, 20, 30)
    assert images[4].shape == (20, 30, 3) and len(images) == 5
    assert len({images[i].tobytes() for i in range(5)}) == 5
    with pytest.raises(IndexError, match="no image 5 among 5"):
        images[5]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_its_dense_formula(name):
    assert set(DENSE) == set(LOSSES)
    z_VBD = data.projections(1, 5, 6).double()
    own = {} if name == "margin_triplet" else {"temperature": 0.3}
    assert dense_loss(name, *z_VBD) == pytest.approx(LOSSES[name](**own)(*z_VBD).item(), abs=1e-12)
    rounded = dense_loss(name, *z_VBD, rounded_to=torch.float16)
    assert 1e-7 < abs(rounded - dense_loss(name, *z_VBD)) < 1e-2


def test_half_precision_kernels_have_limits_of_their_own(monkeypatch):
    def choose(rows_ND, loss, *_):
        return ("triton" if loss == "nt_xent" else "blocked"), "as on a GPU"

    monkeypatch.setattr(contrastive, "choose_implementation", choose)
    monkeypatch.setattr(loss_checks, "choose_implementation", choose)
    case = Case({}, Config(), World(), torch.device("cpu"), Path())
    rows = list(loss_checks.judge(case, [loss_checks.measure(case)]))
    assert {row.status for row in rows} == {"pass"}
    for row in rows:
        if row.check == "loss gradient":
            rounds = row.what.startswith("nt_xent")
            assert (row.deviation > 1e-4) == (row.limit > 1e-4) == rounds
            assert row.limit < 5e-3
    assert case.limit_for(10) == CEILING[torch.float32]
    assert case.limit_for(10, torch.float16) == CEILING[torch.float16]


def test_batch_norm_is_judged_on_every_rank():
    case = Case({}, Config(), World(), torch.device("cpu"), Path())
    both = batch_norm_check._compute(batch_norm_check._norm(), [0, 1], torch.float32)
    rows = [batch_norm_check.num_rows(rank) for rank in (0, 1)]
    found = [{name: tensor.tolist() for name, tensor in both.items()} for _ in rows]
    for name in batch_norm_check.OF_ROWS:
        for rank, part in enumerate(both[name].split(rows)):
            found[rank][name] = part.tolist()
    found[1]["parameter gradient"] = [0.0] * len(found[0]["parameter gradient"])
    assert {row.status for row in batch_norm_check.judge(case, found)} == {"pass"}
    for name, what in batch_norm_check.PARTS.items():
        spoilt = (1.001 * torch.tensor(found[1][name]) + 1e-3).tolist()
        judged = batch_norm_check.judge(case, [found[0], {**found[1], name: spoilt}])
        (bad,) = [row for row in judged if row.status == "FAIL"]
        assert bad.what == what
        assert name == "parameter gradient" or bad.note == "most on rank 1"


def test_the_model_is_a_function_of_its_seed():
    first, again, other = (make_model(batch_norm=True, seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.0.weight"], other["encoder.0.weight"])
