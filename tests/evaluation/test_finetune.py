"""Fine-tuning is torch's SGD on the whole network, also from a middle layer of the head."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastclr.config import ConfigError
from fastclr.evaluation.draws import epoch_batches
from fastclr.evaluation.finetune import (
    Classifier,
    FinetuneSettings,
    answers,
    finetune,
    with_head_layers,
)
from tests.evaluation.tuning import FEATURES, encoder, head, labelled

KNOWN = np.array([0, 2, 4])
SETTINGS = FinetuneSettings(epochs=4, batch_size=32, seed=3)


def test_every_step_is_torchs(monkeypatch):
    images, rows = labelled("train", 90, 1), np.arange(0, 90, 2)
    settings = replace(SETTINGS, weight_decay=1e-3)
    model = Classifier(encoder(), FEATURES, 3)
    other = copy.deepcopy(model).train()
    rate = 0.05 * 32 / 256
    optimizer = torch.optim.SGD(
        other.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=1e-3 / rate
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4 * 2)
    losses = []
    for epoch in range(4):
        batches = [rows[batch] for batch in epoch_batches(len(rows), 32, 3, epoch)]
        of_epoch = []
        for x, label_N in images.views(epoch, batches):
            optimizer.zero_grad()
            loss = F.cross_entropy(other(x.float() / 255), label_N // 2)
            loss.backward()
            optimizer.step()
            schedule.step()
            of_epoch.append(loss.item())
        losses.append(np.mean(of_epoch))
    assert finetune(model, images, rows, KNOWN, settings) == pytest.approx(losses, abs=1e-5)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-5, rtol=1e-5)
    assert not torch.equal(model.network[0].weight, encoder()[0].weight), "all weights move"
    assert not torch.equal(model.network[1].running_mean, torch.zeros(8)), "BatchNorm is trained"


def test_it_learns_and_answers_with_labels():
    train, test = labelled("train", 150, 1), labelled("test", 90, 2)
    model = Classifier(encoder(), FEATURES, 3)
    settings = replace(SETTINGS, epochs=12, rate=0.4)
    losses = finetune(model, train, np.arange(150), KNOWN, settings)
    found = answers(model, test, np.arange(90), KNOWN)
    assert losses[0] > losses[-1] and (found == test.label_X).mean() > 0.9
    some = np.array([70, 3, 4])
    np.testing.assert_array_equal(answers(model, test, some, KNOWN), found[some])


def test_steps_may_end_within_an_epoch():
    calls = []
    images = labelled("train", 90, 1)

    def views(epoch, batches):
        calls.append((epoch, len(batches)))
        yield from images.views(epoch, batches)

    settings = replace(SETTINGS, epochs=0, steps=7)
    model = Classifier(encoder(), FEATURES, 3)
    finetune(model, replace(images, views=views), np.arange(90), KNOWN, settings)
    assert calls == [(0, 3), (1, 3), (2, 1)]


@pytest.mark.parametrize(("batch_size", "momentum"), [(30, 0.1), (1, 0.0), (2, 10 / 150)])
def test_batch_norm_follows_small_sets_as_in_the_paper(batch_size, momentum):
    from fastclr.evaluation.finetune import _set_batch_norm

    model = Classifier(encoder(), FEATURES, 3)
    steps = 300 // batch_size
    _set_batch_norm(model, steps)
    assert model.network[1].momentum == pytest.approx(1 - max(1 - 10 / steps, 0.9))


@pytest.mark.parametrize(
    ("num_layers", "width", "last"),
    [(0, 12, "4"), (1, 20, "relu1"), (2, 16, "relu2"), (3, 4, "fc3")],
)
def test_layers_of_the_head_become_part_of_the_encoder(num_layers, width, last):
    f, g = encoder().eval(), head().eval()
    network, found = with_head_layers(f, g, FEATURES, num_layers)
    assert found == width
    x = torch.rand(5, 3, 6, 6)
    expected = f(x)
    for name, module in g.named_children():
        if num_layers == 0:
            break
        expected = module(expected)
        if name == last:
            break
    assert torch.equal(network.eval()(x), expected) and expected.shape == (5, width)
    with torch.no_grad():
        next(network.parameters()).zero_()
    assert not torch.equal(next(network.parameters()), next(f.parameters())), "a copy"


@pytest.mark.parametrize("num_layers", [-1, 4])
def test_layers_that_the_head_has_not(num_layers):
    with pytest.raises(ConfigError, match="it has 3"):
        with_head_layers(encoder(), head(), FEATURES, num_layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 5}, "4 epochs and 5 steps: give one of them"),
        ({"epochs": 0}, "0 epochs and 0 steps"),
        ({"batch_size": 1}, "BatchNorm needs 2 images"),
        ({"rate": 0}, "rate 0"),
        ({"weight_decay": float("nan")}, "decay nan"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    model = Classifier(encoder(), FEATURES, 3)
    with pytest.raises(ConfigError, match=message):
        finetune(model, labelled("a", 9, 1), np.arange(9), KNOWN, replace(SETTINGS, **changes))


def test_one_image_and_a_rate_that_explodes():
    images = labelled("train", 90, 1)
    model = Classifier(encoder(), FEATURES, 3)
    with pytest.raises(ConfigError, match="train: 1 images to tune on"):
        finetune(model, images, np.arange(1), KNOWN, SETTINGS)
    with pytest.raises(FloatingPointError, match=r"train: the loss is (nan|inf) .* lower rate"):
        finetune(model, images, np.arange(90), KNOWN, replace(SETTINGS, rate=1e15))
