"""How heads begin, what of them is trained, and that the encoder begins the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fastclr.config import ConfigError
from fastclr.simclr import SimCLR
from fastclr.studies.head_starts import ACTIVATIONS, STARTS, Context, build, fresh_head
from fastclr.studies.scales import TOY
from fastclr.studies.study import Variant
from fastclr.studies.work import train

CPU = torch.device("cpu")


@pytest.fixture
def make(images):
    def make(variant, config=TOY.base):
        return build(variant, Context(config, images, 2), CPU)

    return make


@pytest.mark.parametrize("start", STARTS)
def test_the_encoder_begins_as_ever(make, start):
    plain, model = SimCLR.from_config(TOY.base), make(Variant(start=start))
    for name, value in plain.encoder.state_dict().items():
        assert torch.equal(value, model.encoder.state_dict()[name]), name
    assert model.training
    if start not in ("random", "direct"):
        assert not torch.equal(plain.projection_head.fc1.weight, model.projection_head.fc1.weight)
        assert torch.equal(plain.projection_head.fc2.weight, model.projection_head.fc2.weight)


@pytest.mark.parametrize("start", STARTS)
def test_a_start_is_a_function_of_the_seed(make, start):
    one, again = (make(Variant(start=start)).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], again[key]) for key in one)
    other = make(Variant(start=start), replace(TOY.base, seed=1)).state_dict()
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("width", [8, 48])
def test_orthogonal_rows_or_columns(make, width):
    head = replace(TOY.base.head, hidden_dim=width)
    model = make(Variant(start="orthogonal"), replace(TOY.base, head=head))
    weight = model.projection_head.fc1.weight.detach()
    gram = weight @ weight.T if width <= 32 else weight.T @ weight
    torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=0)
    assert not model.projection_head.fc1.bias.any()


def test_principal_axes_are_of_h_without_its_mean(make, images):
    model = make(Variant(start="pca"))
    h_NF = torch.cat(
        [model.encoder.eval()(part.float() / 255) for part, _ in images.batches(images.train)]
    ).detach()
    z_ND = model.projection_head.fc1(h_NF).detach().double()
    torch.testing.assert_close(z_ND.mean(0), torch.zeros(32).double(), atol=1e-4, rtol=0)
    covariance = z_ND.T @ z_ND / len(z_ND)
    values = covariance.diagonal()
    assert (covariance - values.diag()).abs().max() < 1e-4 * values.max()
    assert (values[:-1] >= values[1:] - 1e-9).all()
    total = (h_NF - h_NF.mean(0)).double().square().sum(1).mean()
    torch.testing.assert_close(values.sum(), total, rtol=1e-4, atol=0)


def test_the_autoencoders_embedding_is_lifted(make, monkeypatch):
    import fastclr.studies.head_starts as head_starts

    made = []
    plain = head_starts.train_autoencoder
    monkeypatch.setattr(
        head_starts, "train_autoencoder", lambda *a, **k: made.append(plain(*a, **k)) or made[0]
    )
    model = make(Variant(start="autoencoder", frozen=("fc1",)))
    assert torch.equal(model.projection_head.fc1.weight, made[0].embedding.weight)
    assert torch.equal(model.projection_head.fc1.bias, made[0].embedding.bias)
    assert made[0].hidden.out_features == model.encoder.feature_dim


def test_an_embedding_needs_a_layer_with_a_bias(make):
    head = replace(TOY.base.head, norm="batch")
    with pytest.raises(ConfigError, match="has a bias"):
        make(Variant(start="autoencoder"), replace(TOY.base, head=head))


def test_frozen_modules_stay_through_training_and_others_move(job):
    frozen = job(variant=Variant(start="orthogonal", frozen=("fc1",)))
    before = build(frozen.run.variant, Context(TOY.base, frozen.images, 2), CPU).projection_head
    model, _ = train(frozen)
    assert torch.equal(model.projection_head.fc1.weight, before.fc1.weight)
    assert torch.equal(model.projection_head.fc1.bias, before.fc1.bias)
    assert not torch.equal(model.projection_head.fc2.weight, before.fc2.weight)


def test_a_whole_head_can_be_fixed(job):
    model, _ = train(job(variant=Variant(frozen=("fc1", "fc2"))))
    plain = SimCLR.from_config(TOY.base)
    for name, value in plain.projection_head.state_dict().items():
        assert torch.equal(value, model.projection_head.state_dict()[name])
    assert not torch.equal(plain.encoder.network.conv1.weight, model.encoder.network.conv1.weight)


def test_a_module_that_is_not_there_cannot_be_frozen(make):
    with pytest.raises(ConfigError, match=r"no module 'fc9'.*fc1"):
        make(Variant(frozen=("fc9",)))


def test_the_first_dimensions_alone_are_compared(make):
    model = make(Variant(start="direct"))
    h_NF, z_ND = model.eval()(torch.zeros(2, 3, 3, 32, 32, dtype=torch.uint8))
    assert torch.equal(z_ND, h_NF[:, :16])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_take_the_relus_place(make, name):
    head = make(Variant(activation=name)).projection_head
    assert type(head.relu1) is type(ACTIVATIONS[name]())
    assert list(dict(head.named_children())) == ["fc1", "norm1", "relu1", "fc2"]


def test_standardised_inputs_have_mean_0_and_deviation_1(make, images):
    seen = []
    model = make(Variant(standardise=True)).eval()
    model.encoder.network.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    for part, _ in images.batches(images.train):
        model.encoder(part.float() / 255)
    pixels = torch.cat(seen)
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    deviation = pixels.std((0, 2, 3), correction=0)
    torch.testing.assert_close(deviation, torch.ones(3), atol=1e-3, rtol=0)


def test_new_heads_are_drawn_by_number_and_seed():
    heads = [fresh_head(replace(TOY.base, seed=seed), 32, n) for seed in (0, 1) for n in (0, 1)]
    first = [head.fc1.weight for head in heads]
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[i + 1 :])
    assert torch.equal(first[0], fresh_head(TOY.base, 32, 0).fc1.weight)
    assert isinstance(heads[0], nn.Sequential)
