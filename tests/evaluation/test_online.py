"""Scores while training: of the right images, on every rank, and without a trace in the model."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastclr.config import ConfigError
from fastclr.evaluation.collapse import Monitors, monitors
from fastclr.evaluation.features import Features
from fastclr.evaluation.knn import knn_accuracy
from fastclr.evaluation.online import ImageSet, OnlineEvaluation
from fastclr.evaluation.ridge import ridge_probe

SCRIPT = Path(__file__).with_name("online_ranks.py")
ENGINES = ("1 bf16", "3 fp32", "3 fp32 eager")


@pytest.fixture(scope="module")
def ranks():
    spec = importlib.util.spec_from_file_location("online_ranks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def alone(ranks) -> dict[str, float]:
    """Return the scores of one process without a process group."""
    return ranks.evaluation()(ranks.make_model())


@pytest.fixture(scope="module", params=[1, 2])
def measured(request, run_ranks) -> list[dict]:
    """Return what each rank found."""
    return run_ranks(SCRIPT, request.param)["ranks"]


def test_the_scores_are_those_of_the_features(ranks, alone):
    model = ranks.make_model().eval()

    def features(num_images: int, seed: int) -> Features:
        images, label_X = ranks.images_of(num_images, seed)
        return Features(model.encoder(images / 255).detach().numpy(), label_X.numpy())

    fitting, held_out = features(ranks.NUM_FITTING, 1), features(ranks.NUM_HELD_OUT, 2)
    assert list(alone) == ["knn_top1", "linear_top1", *Monitors._fields]
    assert alone["knn_top1"] == knn_accuracy(fitting, held_out)
    assert alone["linear_top1"] == ridge_probe(fitting, held_out).top1
    assert 0.3 < alone["knn_top1"] < 0.9  # neither chance nor certain
    expected = monitors(*model(ranks.pairs()))._asdict()
    assert {name: alone[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_without_pairs_there_are_no_monitors(ranks, alone):
    evaluation = ranks.evaluation()
    found = OnlineEvaluation(evaluation.fitting, evaluation.held_out)(ranks.make_model())
    assert found == {name: alone[name] for name in ("knn_top1", "linear_top1")}


def test_it_repeats(ranks, alone):
    evaluation, model = ranks.evaluation(), ranks.make_model()
    assert evaluation(model) == evaluation(model) == alone


def test_every_rank_has_the_scores_of_one_process(measured, alone):
    for found in measured:
        for parts in ("even", "uneven"):
            assert found[parts] == measured[0][parts]
            assert found[parts] == pytest.approx(alone, abs=1e-5)
            for name in ("knn_top1", "linear_top1"):
                assert found[parts][name] == alone[name]


def test_every_rank_has_the_features_of_all_images_in_order(ranks, measured):
    images, _ = ranks.images_of(ranks.NUM_FITTING, 1)
    expected = ranks.make_model().eval().encoder(images / 255)
    for found in measured:
        torch.testing.assert_close(torch.tensor(found["h"]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_are_bitwise_those_of_a_run_without_evaluation(ranks, measured, engine):
    """The steps draw dropout from the generator, and none of them sets it."""
    assert ranks.ENGINES == ENGINES
    for found in measured:
        watched, alone = found[engine]
        assert watched["weights"] == alone["weights"]
        assert len(watched["scores"]) == ranks.NUM_STEPS
        assert watched["scores"] == measured[0][engine][0]["scores"]
        assert len({scores["alignment"] for scores in watched["scores"]}) == ranks.NUM_STEPS


def test_zero_3_scores_are_those_of_the_same_weights(ranks, measured):
    for engine in ("3 fp32", "3 fp32 eager"):
        run = measured[0][engine][0]
        model = ranks.make_model()
        model.load_state_dict({k: torch.tensor(v) for k, v in run["weights"].items()})
        assert run["scores"][-1] == pytest.approx(ranks.evaluation()(model), abs=1e-5)


def test_every_rank_refuses_what_one_of_them_cannot_use(measured):
    for found in measured:
        diverged, incomplete = found["refusals"]
        assert diverged.startswith("FloatingPointError: features of fitting are not finite")
        assert incomplete.startswith("ValueError: the batches of fitting hold 89 images")


class Watched(nn.Module):
    """Notes under what conditions it is called; fails if told to."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[tuple[bool, bool, bool]] = []
        self.fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        modes = (self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        self.called.append(modes)
        if self.fails:
            raise RuntimeError("out of memory")
        return x


@pytest.fixture
def watched(ranks):
    """Return a model in training with a norm, a layer that watches, and one that is frozen."""
    model = ranks.make_model()
    model.encoder.insert(1, nn.BatchNorm2d(9))
    model.encoder.insert(0, Watched())
    model(ranks.pairs())  # running statistics that are not the first ones
    model.projection_head.eval()
    model.encoder[0].called.clear()
    return model


def modes(model: nn.Module) -> dict[str, bool]:
    """Return which modules are in training."""
    return {name: module.training for name, module in model.named_modules()}


def test_the_model_is_left_as_it_was(ranks, watched):
    before = copy.deepcopy(watched.state_dict()), modes(watched), torch.get_rng_state()
    ranks.evaluation()(watched)
    assert all(torch.equal(v, before[0][k]) for k, v in watched.state_dict().items())
    assert modes(watched) == before[1]
    assert {True, False} == set(before[1].values())
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(p.grad is None for p in watched.parameters())


def test_it_runs_in_evaluation_mode_without_gradients(ranks, watched):
    """Not in inference mode: what ZeRO 3 gathers there could not be trained with afterwards."""
    ranks.evaluation()(watched)
    assert set(watched.encoder[0].called) == {(False, False, False)}


def test_modes_come_back_after_a_failure(ranks, watched):
    before = modes(watched)
    watched.encoder[0].fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        ranks.evaluation()(watched)
    assert modes(watched) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision_will_do(ranks, alone, dtype):
    found = ranks.evaluation()(ranks.make_model().to(dtype))
    assert found["alignment"] == pytest.approx(alone["alignment"], rel=0.1)
    assert 0.2 < found["knn_top1"] < 0.9


def test_nothing_of_it_is_a_parameter(ranks):
    evaluation = ranks.evaluation()
    assert not isinstance(evaluation, nn.Module)
    assert not any(isinstance(v, nn.Module | torch.nn.Parameter) for v in vars(evaluation).values())


def test_sets_that_fit_pass_the_check(ranks):
    ranks.evaluation().check()


def spoiled(ranks, **changes) -> OnlineEvaluation:
    """Return an evaluation whose fitting images differ, and cannot be read."""

    def unreadable():
        raise AssertionError("the check reads images")

    fitting, held_out = (
        dataclasses.replace(s, batches=unreadable)
        for s in (ranks.evaluation().fitting, ranks.evaluation().held_out)
    )
    return OnlineEvaluation(dataclasses.replace(fitting, **changes), held_out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_X": np.array([*range(5), -1] * 20)}, "fitting has 20 images without a label of"),
        ({"num_classes": 6}, "fitting has 6 classes and held out has 5 classes"),
        ({"label_X": np.full(90, 3)}, "fitting: a linear probe needs 2 classes.* are 1 classes"),
        ({"label_X": np.arange(19) % 5}, "fitting: .* 20 rows.* 5 classes and 19 rows"),
        ({"label_X": np.array([], np.int64)}, "fitting has 0 images without a label of 0"),
    ],
)
def test_sets_that_cannot_be_scored_are_refused_before_an_image_is_read(ranks, changes, message):
    with pytest.raises(ConfigError, match=message):
        spoiled(ranks, **changes).check()


def test_held_out_images_need_labels_too(ranks):
    evaluation = spoiled(ranks)
    for label_X in (np.array([0, -1]), np.array([], np.int64)):
        held_out = dataclasses.replace(evaluation.held_out, label_X=label_X)
        with pytest.raises(ConfigError, match=r"held out has [01] images without a label"):
            OnlineEvaluation(evaluation.fitting, held_out).check()


def test_every_problem_is_named_at_once(ranks):
    with pytest.raises(ConfigError) as error:
        spoiled(ranks, label_X=np.array([-1]), num_classes=1).check()
    assert str(error.value).count("\n") == 2


def test_batches_of_other_images_are_refused(ranks):
    evaluation = ranks.evaluation()
    fitting = evaluation.fitting
    other = ImageSet("other", fitting.label_X[::-1].copy(), 5, fitting.batches)
    with pytest.raises(ValueError, match="batches of other hold 90 images, other ones or in"):
        OnlineEvaluation(other, evaluation.held_out)(ranks.make_model())


def test_diverged_projections_are_refused(ranks):
    model = ranks.make_model()
    with torch.no_grad():
        model.projection_head[0].weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="features of pairs are not finite"):
        ranks.evaluation()(model)
