"""The paper's linear protocol, step by step, against torch and the logistic regression."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fastclr.config import ConfigError
from fastclr.evaluation.draws import epoch_batches
from fastclr.evaluation.features import Features
from fastclr.evaluation.linear_lbfgs import lbfgs_probe
from fastclr.evaluation.linear_sgd import (
    LARGE_IMAGES,
    PROTOCOL,
    SMALL_IMAGES,
    SGDSettings,
    cached_views,
    encoded,
    sgd_probe,
)


def features(num_rows: int, seed: int, noise: float = 1.0) -> Features:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(5, 10))
    class_X = rng.integers(0, 5, num_rows)
    h_XF = centres[class_X] + noise * rng.normal(size=(num_rows, 10))
    return Features(h_XF.astype(np.float32), class_X + 3)


def test_the_papers_numbers():
    assert (LARGE_IMAGES.epochs, LARGE_IMAGES.batch_size) == (90, 4096)
    assert (SMALL_IMAGES.epochs, SMALL_IMAGES.batch_size) == (100, 512)
    assert LARGE_IMAGES.rate * 4096 / 256 == pytest.approx(1.6)
    assert all(part in PROTOCOL for part in ("0.9", "0.1 * batch / 256", "no weight decay"))


def test_every_step_is_torchs_nesterov_with_a_cosine_from_zero_weights():
    train, test, settings = features(70, 1), features(50, 2), SGDSettings(epochs=3, batch_size=32)
    weight = torch.zeros(5, 10, requires_grad=True)
    bias = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], 0.1 * 32 / 256, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3 * 3)
    for epoch in range(3):
        for rows in epoch_batches(70, 32, 0, epoch):
            logits = torch.from_numpy(train.h_XF[rows]) @ weight.T + bias
            target = torch.from_numpy(train.label_X[rows] - 3)
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, target).backward()
            optimizer.step()
            schedule.step()
    expected = (torch.from_numpy(test.h_XF) @ weight.T + bias).argmax(1).numpy() + 3
    found = sgd_probe(cached_views([train], settings), train.label_X, test, settings)
    np.testing.assert_array_equal(found.answer_X, expected)
    assert found.losses[0] < math.log(5) + 0.01 and len(found.losses) == 3
    assert found.score == (expected == test.label_X).mean()


def test_it_agrees_with_logistic_regression_within_a_point():
    train, test = features(2000, 1), features(2000, 2)
    settings = SGDSettings(epochs=30, batch_size=128)
    found = sgd_probe(cached_views([train], settings), train.label_X, test, settings)
    assert abs(found.score - lbfgs_probe(train, test).score) < 0.01
    assert found.losses[-1] < found.losses[0]


def test_an_epoch_has_every_row_once_and_batches_of_about_one_size():
    for num_rows, batch_size in ((70, 32), (513, 512), (5, 512), (64, 32)):
        batches = epoch_batches(num_rows, batch_size, 1, 2)
        assert sorted(np.concatenate(batches)) == list(range(num_rows))
        sizes = {len(batch) for batch in batches}
        assert max(sizes) - min(sizes) <= 1 and max(sizes) <= batch_size
    first, again = (np.concatenate(epoch_batches(70, 32, 1, epoch)) for epoch in (0, 1))
    assert not np.array_equal(first, again) and not np.array_equal(first, np.arange(70))


def test_cached_views_take_turns():
    views = [features(40, 1)._replace(h_XF=np.full((40, 10), k, np.float32)) for k in range(3)]
    batches = cached_views(views, SGDSettings(batch_size=16))
    seen = [{h.unique().item() for h, _ in batches(epoch)} for epoch in range(4)]
    assert seen == [{0}, {1}, {2}, {0}]


def test_on_the_fly_and_cached_are_the_same_where_views_are():
    """What differs between the two is which views there are, and nothing else."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (60, 3, 4, 4), np.uint8))
    label_X = np.arange(60) % 3
    encoder = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 8)).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}

    def views(epoch, batches):
        for rows in batches:
            yield images[rows], torch.from_numpy(label_X[rows])

    settings = SGDSettings(epochs=4, batch_size=25)
    on_the_fly = encoded(encoder, views, 60, settings)
    with torch.no_grad():
        h_XF = encoder.eval()(images.float() / 255).numpy()
    encoder.train()
    test = Features(h_XF, label_X)
    first = sgd_probe(on_the_fly, label_X, test, settings)
    second = sgd_probe(cached_views([test], settings), label_X, test, settings)
    np.testing.assert_allclose(first.losses, second.losses, rtol=1e-5)
    after = encoder.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before), "BatchNorm is in inference"


def test_what_is_not_finite_is_told():
    train, test = features(60, 1), features(60, 2)
    train.h_XF[5] = np.inf
    with pytest.raises(FloatingPointError, match="image 5"):
        cached_views([train], SMALL_IMAGES)
    huge = Features(train.h_XF.clip(-1e30, 1e30) * 1e30, train.label_X)
    huge.h_XF[5] = 1e30
    settings = SGDSettings(epochs=2, batch_size=8)
    with pytest.raises(FloatingPointError, match="Lower the rate"):
        sgd_probe(cached_views([huge], settings), huge.label_X, test, settings)


def test_views_of_other_images_are_refused():
    with pytest.raises(ConfigError, match="of other images"):
        cached_views([features(60, 1), features(60, 2)], SMALL_IMAGES)


def test_a_single_class_is_refused():
    train = features(60, 1)._replace(label_X=np.zeros(60, np.int64))
    with pytest.raises(ConfigError, match="there are 1 classes"):
        sgd_probe(cached_views([train], SMALL_IMAGES), train.label_X, train, SMALL_IMAGES)
