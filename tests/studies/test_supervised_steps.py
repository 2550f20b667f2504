"""Supervised training learns labels from both views, with the engine and schedule of SimCLR."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastclr.config import ConfigError
from fastclr.simclr import SimCLR
from fastclr.studies.scales import TOY
from fastclr.studies.study import Variant
from fastclr.studies.supervised_steps import SupervisedTrainer, classifier
from fastclr.studies.work import train
from pipelines.loader import make_loader
from pipelines.policy import SimCLRPolicy


def test_the_classifier_is_zero_and_as_wide_as_the_classes():
    model = classifier(SimCLR.from_config(TOY.base), 32, 16)
    h_NF, z_NK = model.eval()(torch.zeros(2, 1, 3, 32, 32, dtype=torch.uint8))
    assert h_NF.shape == (2, 32)
    assert z_NK.shape == (2, 16)
    assert not z_NK.any()
    assert list(dict(model.projection_head.named_children())) == ["classifier"]


def test_one_step_is_plain_cross_entropy_on_all_views(job, images, monkeypatch):
    losses = []
    step = SupervisedTrainer.train_step
    monkeypatch.setattr(
        SupervisedTrainer,
        "train_step",
        lambda self, batch, statistics=None: (
            losses.append(step(self, batch, statistics)) or losses[-1]
        ),
    )
    config = replace(TOY.base, views=replace(TOY.base.views, size=32))
    model, logged = train(job(config, Variant(supervised=True)))
    assert losses[0] == pytest.approx(torch.tensor(16.0).log())  # of a zero classifier
    assert 0 <= logged["accuracy"] <= 1

    plain = classifier(SimCLR.from_config(config), 32, 16)
    policy = SimCLRPolicy(size=32, color_strength=0.5, blur_prob=0.0)
    loader = make_loader(
        images.train, policy, micro_batch_size=32, seed=0, backend="threads", num_threads=1
    )
    optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-3, weight_decay=0)
    batches, expected = iter(loader), []
    for k in range(2):
        batch = next(batches)
        z_NK = plain(batch.views_VBCHW).z_ND
        loss = F.cross_entropy(z_NK, torch.cat([batch.label_B, batch.label_B]))
        optimizer.param_groups[0]["lr"] = 3e-3 * (0.75 if k else 1.0)  # the cosine of three steps
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    assert [float(loss) for loss in losses[:2]] == pytest.approx(expected, rel=1e-4)
    assert model.projection_head.classifier.weight.any()


def test_labels_are_learned(job):
    config = replace(TOY.base, epochs=15)
    _, logged = train(job(config, Variant(supervised=True)))
    assert logged["accuracy"] > 0.15  # chance is 1 in 16


def test_an_image_without_a_label_is_refused(job, monkeypatch):
    no_label = torch.full((32,), -1)
    step = SupervisedTrainer.train_step
    monkeypatch.setattr(
        SupervisedTrainer,
        "train_step",
        lambda self, batch, statistics=None: step(
            self, replace(batch, label_B=no_label), statistics
        ),
    )
    with pytest.raises(ConfigError, match="without a label"):
        train(job(variant=Variant(supervised=True)))
