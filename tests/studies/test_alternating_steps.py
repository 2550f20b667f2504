"""The four self-tests of alternating steps, and what its knobs do."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastclr.batch import Batch
from fastclr.config import ConfigError, OptimizerConfig
from fastclr.losses import NTXent, nt_xent
from fastclr.simclr import SimCLR
from fastclr.studies.alternating_steps import AlternatingTrainer, two_rate_optimizer
from fastclr.studies.head_starts import fresh_head
from fastclr.studies.scales import TOY
from fastclr.studies.study import Alternating, Variant
from fastclr.studies.work import train
from fastclr.world import World

BATCH_NORM = replace(TOY.base, head=replace(TOY.base.head, norm="batch"))
SGD = replace(TOY.base, optimizer=OptimizerConfig("SGD", 0.1, momentum=0.9, warmup_epochs=0))
LARS = replace(TOY.base, optimizer=OptimizerConfig("LARS", 0.5, warmup_epochs=0))


def batch(seed: int = 0, num_images: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = torch.randint(0, 256, (2, num_images, 3, 32, 32), generator=generator).to(torch.uint8)
    return Batch(views, torch.zeros(num_images).long(), torch.arange(num_images))


def trainer(tmp_path, alternating: Alternating, config=TOY.base, **settings) -> AlternatingTrainer:
    """Return a trainer with a stand-in for its engine: model and optimizer."""
    model = SimCLR.from_config(config)
    optimizer = two_rate_optimizer(
        model, replace(config.optimizer, weight_decay=0.0), alternating.head_rate
    )
    found = AlternatingTrainer(
        model,
        alternating=alternating,
        optimizer=optimizer,
        loss=NTXent(0.2),
        ds_config={},
        run_dir=tmp_path,
        world=World(),
        **settings,
    )
    found.engine, found.schedule = SimpleNamespace(module=model, optimizer=optimizer), None
    return found


def parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


@pytest.mark.parametrize("config", [TOY.base, BATCH_NORM, SGD, LARS])
def test_one_simultaneous_step_at_equal_rates_is_joint_training_bit_for_bit(job, config):
    joint, _ = train(job(config, name="joint"))
    how = Alternating(head_steps=1, order="simultaneous")
    alternating, _ = train(job(config, Variant(alternating=how), name="alternating"))
    start = SimCLR.from_config(config).state_dict()
    for name, value in joint.state_dict().items():
        assert torch.equal(value, alternating.state_dict()[name]), name
    assert not torch.equal(start["projection_head.fc1.weight"], joint.projection_head.fc1.weight)


@pytest.mark.parametrize(
    "how",
    [
        Alternating(head_steps=1),
        Alternating(head_steps=2, order="simultaneous"),
        Alternating(head_steps=1, order="simultaneous", head_rate=0.5),
        Alternating(head_steps=1, order="simultaneous", earlier_batches=2),
    ],
)
def test_any_other_knob_is_something_else(job, how):
    joint, _ = train(job(name="joint"))
    other, _ = train(job(variant=Variant(alternating=how), name="other"))
    weight = "projection_head.fc1.weight"
    assert not torch.equal(joint.state_dict()[weight], other.state_dict()[weight])


@pytest.mark.parametrize("order", ["head_first", "simultaneous"])
def test_the_encoders_gradient_is_the_joint_one_at_the_same_head(tmp_path, order, monkeypatch):
    found = trainer(tmp_path, Alternating(head_steps=3, order=order))
    model, data = found.engine.module, batch()
    seen = {}
    gradient = found._encoder_gradient

    def recording(model, h_NF, statistics):
        loss = gradient(model, h_NF, statistics)
        seen.update({n: p.grad.clone() for n, p in model.encoder.named_parameters()})
        seen["head"] = parameters(model.projection_head)
        seen["without gradient"] = [p.grad for p in model.projection_head.parameters()]
        return loss

    monkeypatch.setattr(found, "_encoder_gradient", recording)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found.train_step(data)

    joint = SimCLR.from_config(TOY.base)
    joint.load_state_dict(before)
    joint.projection_head.load_state_dict(seen["head"])
    nt_xent(*joint(data.views_VBCHW).z_ND.chunk(2), temperature=0.2).backward()
    assert seen["without gradient"] == [None] * 3
    for name, parameter in joint.encoder.named_parameters():
        assert torch.equal(parameter.grad, seen[name]), name


def test_the_heads_loss_falls_over_its_steps_and_the_encoder_stays(tmp_path):
    found = trainer(tmp_path, Alternating(head_steps=1))
    model = found.engine.module
    encoder = parameters(model.encoder)
    h_NF = model.encoder(batch().views_VBCHW.flatten(0, 1) / 255).detach()
    losses = [float(found._head_step(h_NF)) for _ in range(12)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05
    for name, value in model.encoder.named_parameters():
        assert torch.equal(value, encoder[name])


def test_the_logged_gain_is_what_the_steps_won(tmp_path):
    found = trainer(tmp_path, Alternating(head_steps=12))
    statistics = {}
    loss = found.train_step(batch(), statistics)
    other = trainer(tmp_path, Alternating(head_steps=1))
    h_NF = other.engine.module.encoder(batch().views_VBCHW.flatten(0, 1) / 255).detach()
    losses = [float(other._head_step(h_NF)) for _ in range(13)]
    assert float(loss) == pytest.approx(losses[12])
    assert float(statistics["head_gain"]) == pytest.approx(losses[0] - losses[12])
    assert float(statistics["head_gain"]) > 0.05


def test_at_a_solved_lower_level_the_gradient_through_the_fixed_head_is_the_whole_one():
    """The envelope identity, by finite differences of objective(theta, solved head(theta)).

    A penalty on the head, on both levels, makes its optimum a single point; the encoder's gradient
    does not see it.
    """
    generator = torch.Generator().manual_seed(3)
    x_ND = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    theta, direction = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    start = torch.randn(4, 3, generator=generator, dtype=torch.float64)

    def objective(theta, head):
        z_ND = torch.tanh(x_ND @ theta) @ head
        contrast = nt_xent(*z_ND.chunk(2), temperature=1.0, normalize=False, impl="reference")
        return contrast + 0.05 * head.square().sum()

    def solved(theta, head):
        for _ in range(3000):  # plain descent: no line search to trust
            head = head.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(objective(theta, head), head)
            if gradient.abs().max() < 1e-10:
                return head.detach()
            head = head - 0.5 * gradient
        raise AssertionError(f"the head is not solved: {gradient.abs().max()}")

    def through(theta, head):
        theta = theta.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(theta, head), theta)
        return float((gradient * direction).sum())

    head, step = solved(theta, start), 1e-4
    ends = [theta + sign * step * direction for sign in (1, -1)]
    high, low = (float(objective(end, solved(end, head))) for end in ends)
    whole = (high - low) / (2 * step)
    assert whole == pytest.approx(through(theta, head), rel=1e-5)
    assert whole != pytest.approx(through(theta, start), rel=0.05)  # a head that is not solved


def test_the_head_learns_at_its_own_rate(tmp_path):
    config = replace(SGD, optimizer=replace(SGD.optimizer, momentum=0.0))
    moved = {}
    for rate in (1.0, 3.0):
        found = trainer(tmp_path, Alternating(order="simultaneous", head_rate=rate), config)
        before = parameters(found.engine.module)
        found.train_step(batch())
        after = parameters(found.engine.module)
        moved[rate] = {name: after[name] - before[name] for name in before}
    for name, way in moved[1.0].items():
        factor = 3.0 if name.startswith("projection_head") else 1.0
        torch.testing.assert_close(moved[3.0][name], factor * way, rtol=1e-3, atol=1e-7)


def test_steps_go_through_earlier_batches_in_turn(tmp_path, monkeypatch):
    found = trainer(tmp_path, Alternating(head_steps=3, earlier_batches=2))
    seen = []
    step = found._head_step
    monkeypatch.setattr(found, "_head_step", lambda h: seen.append(h) or step(h))
    for seed in range(3):
        found.train_step(batch(seed))
    first, second, third = seen[:3], seen[3:6], seen[6:]
    assert all(torch.equal(h, first[0]) for h in first)
    assert torch.equal(second[0], first[0])
    assert torch.equal(second[2], first[0])
    assert not torch.equal(second[1], first[0])
    assert torch.equal(third[0], second[1])


def test_a_training_goes_on_with_the_earlier_batches_it_had(job, broken_off):
    """Weights after an interruption equal those without one, to the last bit."""
    variant = Variant(alternating=Alternating(head_steps=2, earlier_batches=2))
    whole, _ = train(job(variant=variant, name="whole"))
    broken = job(variant=variant, name="broken")
    steps = broken_off(broken, AlternatingTrainer)
    (kept,) = broken.run_dir.glob("earlier-*")
    assert kept.name == "earlier-2.safetensors"
    resumed, _ = train(broken)
    assert len(steps) == 3
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert [file.name for file in broken.run_dir.glob("earlier-*")] == ["earlier-3.safetensors"]
    next(broken.run_dir.glob("earlier-*")).unlink()
    with pytest.raises(ConfigError, match=r"earlier-3.*cannot be read.*train anew"):
        train(broken)


def test_a_new_head_forgets_the_old_one(tmp_path):
    found = trainer(
        tmp_path,
        Alternating(head_steps=1),
        renewed_steps=2,
        fresh_head=lambda n: fresh_head(TOY.base, 32, n),
    )
    head = found.engine.module.projection_head
    for _ in range(2):
        found.train_step(batch())
    found.engine.optimizer.step = lambda: None  # what follows shows the head as it was drawn
    found.train_step(batch())
    expected = fresh_head(TOY.base, 32, 0)
    assert torch.equal(head.fc1.weight, expected.fc1.weight)
    assert not torch.equal(head.fc1.weight, fresh_head(TOY.base, 32, 1).fc1.weight)
    assert all(p not in found.engine.optimizer.state for p in head.parameters())


def test_running_statistics_are_those_of_the_encoders_step(tmp_path):
    once = trainer(tmp_path, Alternating(head_steps=1), BATCH_NORM)
    often = trainer(tmp_path, Alternating(head_steps=9), BATCH_NORM)
    for found in (once, often):
        found.train_step(batch())
        assert int(found.engine.module.projection_head.norm1.num_batches_tracked) == 1
        assert found.engine.module.projection_head.norm1.track_running_stats


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Alternating(head_steps=0), "head_steps is 0"),
        (Alternating(earlier_batches=-1), "earlier_batches -1"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, how, message):
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, how)


def test_an_optimizer_that_cannot_alternate_is_refused():
    with pytest.raises(ConfigError, match="'Lamb' cannot alternate"):
        two_rate_optimizer(SimCLR.from_config(TOY.base), OptimizerConfig("Lamb"), 1.0)
