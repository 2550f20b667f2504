"""The autoencoder learns, is a function of its seed, and refuses what it cannot take."""

from __future__ import annotations

import pytest
import torch

from fastclr.autoencoder import Autoencoder, train_autoencoder
from fastclr.config import ConfigError


def images(n=64):
    """Smooth pictures that a code of few numbers can hold."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.rand(n, 4, generator=generator)
    waves = torch.sin(torch.arange(4)[:, None] * torch.linspace(0, 3, 192)[None]) / 2 + 0.5
    return ((mix @ waves / 4) * 255).to(torch.uint8).view(n, 3, 8, 8)


def error(model, pictures):
    pixels = pictures.float() / 255
    return float((model(pixels) - pixels.flatten(1)).square().mean().detach())


def test_it_is_the_sources_four_layers():
    model = Autoencoder(192, 32, 8)
    assert [tuple(p.shape) for p in model.parameters()] == [
        (32, 192), (32,), (8, 32), (8,), (32, 8), (32,), (192, 32), (192,),
    ]  # fmt: skip
    x = torch.rand(5, 3, 8, 8)
    expected = model.decoder(model.embedding(torch.relu(model.hidden(x.flatten(1))))).sigmoid()
    assert torch.equal(model(x), expected)
    assert ((model(x) > 0) & (model(x) < 1)).all()


def test_it_learns():
    said = []
    model = train_autoencoder(
        images(), hidden_dim=32, latent_dim=8, epochs=40, batch_size=16, learning_rate=1e-2,
        say=said.append,
    )  # fmt: skip
    untrained = train_autoencoder(images(), hidden_dim=32, latent_dim=8, epochs=0)
    assert error(model, images()) < error(untrained, images()) / 4
    mean = (images().float() / 255).flatten(1)
    assert error(model, images()) < float(mean.var(0, correction=0).mean())
    assert len(said) == 40
    assert not model.training


def test_it_is_a_function_of_the_seed_and_leaves_the_generator():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, again, other = (
        train_autoencoder(images(), hidden_dim=8, latent_dim=4, epochs=2, seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.embedding.weight, again.embedding.weight)
    assert not torch.equal(one.embedding.weight, other.embedding.weight)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (torch.zeros(2, 3, 8, 8), "float32"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "one image or more"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "give uint8"),
    ],
)
def test_what_are_no_images_is_refused(pictures, message):
    with pytest.raises(ConfigError, match=message):
        train_autoencoder(pictures, hidden_dim=8, latent_dim=4)


def test_a_rate_that_is_too_high_is_told():
    with pytest.raises(FloatingPointError, match="lower its learning rate"):
        train_autoencoder(images(), hidden_dim=8, latent_dim=4, epochs=3, learning_rate=1e30)
