"""The probe beside a training learns, and the training does not notice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from fastclr.config import ConfigError
from fastclr.evaluation.features import Features
from fastclr.evaluation.linear_joint import JointProbe, saved_answers


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
                probe.step(h_NF, labels, 24)
            (h_NF.square().mean() - h_NF.std()).backward()
            if probe and order == "after":
                probe.step(h_NF, labels, 24)
        gradients += [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
        optimizer.step()
    return gradients, encoder


@pytest.mark.parametrize("order", ["before", "after"])
def test_gradients_and_weights_are_bit_equal_with_and_without(order):
    probe = JointProbe(8, 4, batch_size=16)
    alone, encoder = train(None)
    beside, other = train(probe, order)
    assert len(alone) == len(beside) > 0
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))
    states = encoder.state_dict(), other.state_dict()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert probe.classifier.weight.abs().max() > 0


def test_it_is_torchs_sgd():
    probe = JointProbe(12, 4, batch_size=32)
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
        assert probe.step(h_NF, label_N, 5)[0].item() == pytest.approx(loss.item(), abs=1e-6)
    assert torch.allclose(probe.classifier.weight, layer.weight, atol=1e-6)


def test_it_learns_what_is_linear():
    probe = JointProbe(12, 4, batch_size=32, rate=2.0)
    accuracies = [probe.step(*images(step))[1].item() for step in range(60)]
    assert sum(accuracies[-10:]) / 10 > 0.7
    h_NF, label_N = images(99)
    assert (probe.answers(h_NF) == label_N).float().mean() > 0.7


def test_rows_without_a_label_do_not_count():
    probes = [JointProbe(12, 4, batch_size=32) for _ in range(2)]
    h_NF, label_N = images(0)
    label_N[::3] = -1
    first = probes[0].step(h_NF, label_N)
    second = probes[1].step(h_NF[label_N >= 0], label_N[label_N >= 0])
    assert torch.stack(first).tolist() == pytest.approx(torch.stack(second).tolist())
    weights = [probe.classifier.weight for probe in probes]
    torch.testing.assert_close(*weights)
    fresh = JointProbe(12, 4, batch_size=32)
    assert torch.stack(fresh.step(h_NF, torch.full_like(label_N, -1))).tolist() == [0, 0]
    assert not fresh.classifier.weight.any()


def test_chunks_are_the_images_of_the_labels():
    """Both views of an image have its label, however the step was cut."""
    whole, cut = (JointProbe(12, 4, batch_size=16) for _ in range(2))
    h_NF, _ = images(3)
    label_B = torch.arange(16) % 4
    whole.step(h_NF, label_B.repeat(2), 9)
    for chunk_VbF in h_NF.unflatten(0, (2, 16)).split([5, 11], dim=1):
        cut.see(chunk_VbF.flatten(0, 1).requires_grad_(), 2, 0)
    cut.learn(label_B, 9)
    torch.testing.assert_close(whole.classifier.weight, cut.classifier.weight)
    cut.see(h_NF[:9], 1, 1)  # of a step that was broken off
    cut.see(h_NF, 2, 2)
    cut.learn(label_B, 9)
    whole.step(h_NF, label_B.repeat(2), 9)
    torch.testing.assert_close(whole.classifier.weight, cut.classifier.weight)


def test_it_goes_on_where_it_was(tmp_path):
    whole = JointProbe(12, 4, batch_size=32)
    for step in range(4):
        whole.step(*images(step), 8)
    save_file(whole.state_dict(), tmp_path / "probe.safetensors")
    resumed = JointProbe(12, 4, batch_size=32)
    resumed.load_state_dict(load_file(tmp_path / "probe.safetensors"))
    for step in range(4, 8):
        assert torch.equal(*map(torch.stack, (p.step(*images(step), 8) for p in (whole, resumed))))
    assert torch.equal(whole.classifier.weight, resumed.classifier.weight)
    with pytest.raises(ConfigError, match=r"weight is \(4, 12\), this one's \(4, 13\)"):
        JointProbe(13, 4, batch_size=32).load_state_dict(whole.state_dict())


def test_a_saved_probe_answers(tmp_path):
    probe = JointProbe(12, 4, batch_size=32, rate=2.0)
    for step in range(30):
        probe.step(*images(step))
    h_NF, label_N = images(99)
    test = Features(h_NF.numpy(), label_N.numpy())
    answer_X = saved_answers(probe.state_dict(), test)
    assert (answer_X == probe.answers(h_NF).numpy()).all()
    for other in (Features(test.h_XF[:, :9], test.label_X), Features(test.h_XF, test.label_X + 1)):
        with pytest.raises(ConfigError, match="tells 4 classes from 12 features"):
            saved_answers(probe.state_dict(), other)


def test_it_works_under_autocast_and_without_gradients():
    probe = JointProbe(12, 4, batch_size=32)
    h_NF, label_N = images(0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        probe.step(h_NF.bfloat16(), label_N)
    assert probe.classifier.weight.abs().max() > 0
