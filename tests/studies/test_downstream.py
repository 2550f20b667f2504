"""Few labels and other sets: the protocols of the evaluation, on the images of a study."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastclr.evaluation import finetune, semi_supervised, transfer
from fastclr.evaluation.features import extract
from fastclr.evaluation.linear_lbfgs import lbfgs_probe
from fastclr.simclr import SimCLR
from fastclr.studies import downstream
from fastclr.studies.images import with_target
from fastclr.studies.scales import PILOT, TOY

CPU = torch.device("cpu")


def quiet(_):
    """Say nothing."""


@pytest.fixture
def model():
    return SimCLR.from_config(TOY.base)


def test_tuning_takes_the_shares_and_lengths_of_the_source(model, images, monkeypatch):
    asked = []

    def finetuned(classifier, train, rows, known_C, settings, device):
        asked.append((rows, settings))

    monkeypatch.setattr(finetune, "finetune", finetuned)
    found = downstream.tuned(model, images, replace(TOY, tuning_epochs=0), 3, CPU, quiet)
    assert list(found) == ["1", "10", "lost"]
    assert [settings.epochs for _, settings in asked] == [60, 30]
    label_X = images.train.labels(np.arange(96))
    for share, (rows, settings) in zip((0.01, 0.1), asked, strict=True):
        assert rows.tolist() == semi_supervised.balanced_subset(label_X, share, 3).tolist()
        assert settings.seed == 3
    assert PILOT.tuning_epochs == 0


def test_tuning_is_scored_on_test_images_and_leaves_the_model_alone(model, images):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = downstream.tuned(model, images, TOY, 0, CPU, quiet)
    assert found["lost"] == pytest.approx(found["10"] - found["1"])
    assert all(round(64 * found[share], 6).is_integer() for share in ("1", "10"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert found == downstream.tuned(model, images, TOY, 0, CPU, quiet)


def test_transfer_is_the_probe_of_the_other_set(model, images, toy):
    target = with_target(images, (str(toy.train), str(toy.test)), replace(TOY, num_train=80))
    scale = replace(TOY, transfer_steps=0)
    found = downstream.transferred(model, target, scale, 2, True, CPU, quiet)
    features = [extract(model.encoder, images.batches(of)) for of in target.target]
    assert found == {"linear": lbfgs_probe(*features, seed=2).score}


@pytest.mark.parametrize(("is_trained", "row", "steps"), [(True, "finetune", 5),
                                                          (False, "random_init", 10)])  # fmt: skip
def test_an_untrained_encoder_gets_its_own_grid_and_length(
    model, images, toy, monkeypatch, is_trained, row, steps
):
    asked = []

    def transferred(row, chosen, pretrained, untrained, *, steps, **settings):
        asked.append((row, steps))
        return transfer.TransferRow(0.5, {}, np.zeros(1, int))

    monkeypatch.setattr(transfer, "transfer_row", transferred)
    target = with_target(images, (str(toy.train), str(toy.test)), TOY)
    scale = replace(TOY, transfer_steps=5)
    found = downstream.transferred(model, target, scale, 0, is_trained, CPU, quiet)
    assert asked == [("linear", None), (row, steps)]
    assert found == {"linear": 0.5, "tuned": 0.5}
