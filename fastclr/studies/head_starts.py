"""Heads beyond a configuration's: how their first layer begins, what of them is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastclr import heads
from fastclr.autoencoder import train_autoencoder
from fastclr.config import Config, ConfigError
from fastclr.simclr import SimCLR
from fastclr.studies.images import StudyImages
from fastclr.studies.local_statistics import divide
from fastclr.studies.study import Variant

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


@dataclass(frozen=True)
class Context:
    """What a start may look at.

    Attributes:
        config: The run's.
        images: The study's.
        autoencoder_epochs: Length of an autoencoder's training.
        say: Told what is being done.
    """

    config: Config
    images: StudyImages
    autoencoder_epochs: int
    say: Callable[[str], None] = lambda _: None


class FirstDimensions(nn.Module):
    """The head of DirectCLR (Jing et al. 2022): the loss sees the first dimensions of h."""

    def __init__(self, num_dimensions: int) -> None:
        super().__init__()
        self.num_dimensions = num_dimensions

    def forward(self, h_NF: torch.Tensor) -> torch.Tensor:
        """Return (n, num_dimensions)."""
        return h_NF[:, : self.num_dimensions]

    def extra_repr(self) -> str:
        """Say how many."""
        return str(self.num_dimensions)


def _direct(model: SimCLR, context: Context) -> None:
    """Replace the head by the first half of h."""
    width = _first_layer(model).in_features // 2
    model.projection_head = nn.Sequential()
    model.projection_head.add_module("first", FirstDimensions(width))


def _orthogonal(model: SimCLR, context: Context) -> None:
    """Make the first layer's rows, or columns where they are fewer, orthonormal."""
    layer = _first_layer(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.config.seed)
        nn.init.orthogonal_(layer.weight)
    _clear_bias(layer)


@torch.no_grad()
def _pca(model: SimCLR, context: Context) -> None:
    """Make the first layer the principal axes of the untrained encoder's h, without its mean.

    Axes beyond the number of dimensions of h are zero rows.
    """
    layer = _first_layer(model)
    encoder = model.encoder.eval()
    parts = [
        encoder(images.to(_device(model)).float() / 255)
        for images, _ in context.images.batches(context.images.train, 2048)
    ]
    model.train()
    h_NF = torch.cat(parts).double().cpu()
    mean_F = h_NF.mean(0)
    *_, axis_FF = torch.linalg.svd(h_NF - mean_F, full_matrices=False)
    rows = axis_FF[: layer.out_features]
    layer.weight.zero_()
    layer.weight[: len(rows)] = rows.to(layer.weight)
    if layer.bias is not None:
        layer.bias.copy_((-layer.weight.double().cpu() @ mean_F).to(layer.bias))


def _autoencoder(model: SimCLR, context: Context) -> None:
    """Lift the embedding of an autoencoder of the raw training images into the first layer."""
    layer = _first_layer(model)
    if layer.bias is None:
        raise ConfigError(
            "the autoencoder's embedding has a bias and the head's first layer none: take a head "
            "with norm none."
        )
    images_XCHW = torch.cat([part for part, _ in context.images.batches(context.images.train)])
    found = train_autoencoder(
        images_XCHW.to(_device(model)),
        hidden_dim=layer.in_features,
        latent_dim=layer.out_features,
        epochs=context.autoencoder_epochs,
        seed=context.config.seed,
    )
    context.say(f"autoencoder of {len(images_XCHW)} images trained")
    layer.load_state_dict(found.embedding.state_dict())


STARTS: dict[str, Callable[[SimCLR, Context], None]] = {
    "random": lambda model, context: None,
    "orthogonal": _orthogonal,
    "pca": _pca,
    "autoencoder": _autoencoder,
    "direct": _direct,
}


def build(variant: Variant, context: Context, device: torch.device) -> SimCLR:
    """Build a run's model; its encoder's first weights are a function of config and seed alone.

    Args:
        variant: What the model is beyond the configuration.
        context: The run and its images.
        device: Where it is put.

    Raises:
        ConfigError: If the variant asks for what the head does not have.
    """
    model = SimCLR.from_config(context.config).to(device)
    if variant.activation != "relu":
        for name, module in list(model.projection_head.named_children()):
            if isinstance(module, nn.ReLU):
                setattr(model.projection_head, name, ACTIVATIONS[variant.activation]())
    STARTS[variant.start](model, context)
    of_head = dict(model.projection_head.named_children())
    for name in variant.frozen:
        if name not in of_head:
            raise ConfigError(f"the head has no module {name!r}: choose from {', '.join(of_head)}.")
        of_head[name].requires_grad_(False)
    if variant.standardise:
        mean, std = (part.to(device) for part in context.images.mean_and_std)

        def standardise(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return ((inputs[0] - mean.to(inputs[0])) / std.to(inputs[0]),)

        model.encoder.register_forward_pre_hook(standardise)
    if variant.norm_parts > 1:
        divide(model, variant.norm_parts, context.config.global_batch_size or 0)
    return model


def fresh_head(config: Config, feature_dim: int, number: int) -> nn.Sequential:
    """Draw a configuration's head anew; a function of the seed and of the number."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1_000_003 * (number + 1))
        return heads.from_config(config.head, feature_dim)


def _first_layer(model: SimCLR) -> nn.Linear:
    """Return the head's first linear layer."""
    for module in model.projection_head.children():
        if isinstance(module, nn.Linear):
            return module
    raise ConfigError("this head has no linear layer that could begin otherwise.")


def _clear_bias(layer: nn.Linear) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
