"""The probe beside a training learns, and the training does not notice."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastclr.evaluation.linear_joint import JointProbe


def images(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    label_N = torch.arange(32) % 4
    return torch.randn(32, 12, generator=generator) + 2 * F.one_hot(label_N, 12), label_N


def train(probe: JointProbe | None, order: str = "before") -> tuple[list[torch.Tensor], nn.Module]:
    """Train an encoder on a task of its own; return all gradients there were, and the encoder."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
    optimizer = torch.optim.Adam(encoder.parameters(), 1e-2)
    gradients = []
    for step in range(12):
        x_NF, label_N = images(step)
        optimizer.zero_grad()
        for part in x_NF.chunk(2):  # accumulated, with probe steps between
            h_NF = encoder(part)
            labels = label_N[: len(h_NF)]
            if probe and order == "before":
                probe.step(h_NF, labels)
            (h_NF.square().mean() - h_NF.std()).backward()
            if probe and order == "after":
                probe.step(h_NF, labels)
        gradients += [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
        optimizer.step()
    return gradients, encoder


@pytest.mark.parametrize("order", ["before", "after"])
def test_gradients_and_weights_are_bit_equal_with_and_without(order):
    probe = JointProbe(8, 4, batch_size=16, total_steps=24)
    alone, encoder = train(None)
    beside, other = train(probe, order)
    assert len(alone) == len(beside) > 0
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))
    states = encoder.state_dict(), other.state_dict()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert probe.classifier.weight.abs().max() > 0


def test_it_is_torchs_sgd():
    probe = JointProbe(12, 4, batch_size=32, total_steps=5)
    layer = nn.Linear(12, 4)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1 * 32 / 256, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    for step in range(5):
        h_NF, label_N = images(step)
        loss = F.cross_entropy(layer(h_NF), label_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        assert probe.step(h_NF, label_N)[0] == pytest.approx(loss.item(), abs=1e-6)
    assert torch.allclose(probe.classifier.weight, layer.weight, atol=1e-6)


def test_it_learns_what_is_linear():
    probe = JointProbe(12, 4, batch_size=32, rate=2.0)
    accuracies = [probe.step(*images(step))[1] for step in range(60)]
    assert sum(accuracies[-10:]) / 10 > 0.7
    h_NF, label_N = images(99)
    assert (probe.answers(h_NF) == label_N).float().mean() > 0.7


def test_rows_without_a_label_do_not_count():
    probes = [JointProbe(12, 4, batch_size=32) for _ in range(2)]
    h_NF, label_N = images(0)
    label_N[::3] = -1
    first = probes[0].step(h_NF, label_N)
    assert first == probes[1].step(h_NF[label_N >= 0], label_N[label_N >= 0])
    assert torch.equal(probes[0].classifier.weight, probes[1].classifier.weight)
    before = probes[0].classifier.weight.clone()
    loss, accuracy = probes[0].step(h_NF, torch.full_like(label_N, -1))
    assert loss != loss and accuracy != accuracy
    assert torch.equal(before, probes[0].classifier.weight)


def test_it_goes_on_where_it_was():
    whole = JointProbe(12, 4, batch_size=32, total_steps=8)
    for step in range(4):
        whole.step(*images(step))
    resumed = JointProbe(12, 4, batch_size=32, total_steps=8)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for step in range(4, 8):
        assert whole.step(*images(step)) == resumed.step(*images(step))
    assert torch.equal(whole.classifier.weight, resumed.classifier.weight)
    with pytest.raises(RuntimeError):
        JointProbe(13, 4, batch_size=32).load_state_dict(whole.state_dict())


def test_it_works_under_autocast_and_without_gradients():
    probe = JointProbe(12, 4, batch_size=32)
    h_NF, label_N = images(0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        probe.step(h_NF.bfloat16(), label_N)
    assert probe.classifier.weight.abs().max() > 0
