"""Encoders f: images to representations h. Any timm model, SimCLR's widths and stems."""

from __future__ import annotations

import functools
from typing import Any, cast

import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from fastclr.config import ConfigError, EncoderConfig

# The ResNets that take a width and a stem; every other name is timm's as it is.
RESNETS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    # Without the fourth stage, half as wide: for pilots.
    "resnet8": (BasicBlock, (1, 1, 1)),
    "resnet14": (BasicBlock, (2, 2, 2)),
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}

# stem -> (kernel, stride, max-pool)
STEMS = {"imagenet": (7, 2, True), "small": (3, 1, False), "small_stride2": (3, 2, False)}


class Encoder(nn.Module):
    """A network that maps images to pooled features.

    Attributes:
        network: The timm model without its classifier.
        feature_dim: Width F of the representation.
    """

    def __init__(self, network: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.network = network
        self.feature_dim = feature_dim

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass instead of keeping them.

        Raises:
            ConfigError: If the timm model cannot.
        """
        try:
            cast(Any, self.network).set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise ConfigError(
                f"encoder {type(self.network).__name__} has no activation checkpointing in timm: "
                "leave encoder.activation_checkpointing off, or choose another encoder."
            ) from error
        for module in self.network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                hook = functools.partial(_remember_once, module.momentum)
                module.register_forward_pre_hook(hook)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Return ``h_NF`` for floating-point images in 0..1."""
        return self.network(images_NCHW)


def create(name: str, width: float = 1.0, stem: str = "imagenet") -> Encoder:
    """Create an untrained encoder.

    The ResNets are SimCLR's: post-activation blocks, stride in the 3x3, the last BatchNorm of each
    block starts at 0. No weights are ever downloaded.

    Args:
        name: Key of :data:`RESNETS`, or any other timm model.
        width: Multiplies every channel count of a ResNet: 1, 2, 4 in the paper.
        stem: Key of :data:`STEMS`; ResNets only.

    Raises:
        ConfigError: If the name is unknown, or a width or stem is asked of another model.
    """
    if name in RESNETS:
        network = _resnet(name, width, stem)
    elif width != 1 or stem != "imagenet":
        raise ConfigError(
            f"encoder {name!r} has no width {width} or stem {stem!r}: these belong to "
            f"{', '.join(RESNETS)}. Leave them at 1 and imagenet."
        )
    else:
        network = _timm(name)
    return Encoder(network, _feature_dim(network))


def from_config(config: EncoderConfig) -> Encoder:
    """Create the encoder that a configuration describes.

    Args:
        config: Name, width, stem, and whether activations are computed again.

    Raises:
        ConfigError: As :func:`create`, or if the encoder cannot compute activations again.
    """
    encoder = create(config.name, config.width, config.stem)
    if config.activation_checkpointing:
        encoder.checkpoint_activations()
    return encoder


def _remember_once(momentum: float | None, norm: Any, _: Any) -> None:
    """Keep out of a BatchNorm's running statistics what the backward pass computes again."""
    # Inside a backward pass, and nowhere else, there is a graph task.
    is_again = torch._C._current_graph_task_id() != -1
    norm.momentum = 0.0 if is_again else momentum
    if is_again and norm.training and norm.track_running_stats:
        norm.num_batches_tracked.sub_(1)  # the forward adds it; torch may break that off later


def _resnet(name: str, width: float, stem: str) -> ResNet:
    """Build a ResNet with scaled channels and the asked stem."""
    if stem not in STEMS:
        raise ConfigError(f"encoder stem {stem!r} is unknown: choose from {', '.join(STEMS)}.")
    block, layers = RESNETS[name]
    channels = tuple(round(width * c) for c in (64, 128, 256, 512))[: len(layers)]
    if channels[0] < 4 or channels[0] % 2:
        raise ConfigError(
            f"encoder width {width} gives {channels[0]} channels in the first stage: it needs an "
            "even number, 4 or more, e.g. width 0.25, 0.5, 1, 2 or 4."
        )
    kernel, stride, pooled = STEMS[stem]
    # timm scales the stem only in its "deep" form; its three convolutions are replaced by one.
    network = ResNet(
        cast(Any, block),  # timm annotates the instance where it takes the class
        layers,
        num_classes=0,
        channels=channels,
        stem_type="deep",
        stem_width=channels[0] // 2,
    )
    network.conv1 = nn.Conv2d(
        3, channels[0], kernel, stride=stride, padding=kernel // 2, bias=False
    )
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    if not pooled:
        network.maxpool = cast(Any, nn.Identity())
    if len(layers) == 3:
        network.layer4 = nn.Identity()  # timm's forward asks for it
    return network


def _timm(name: str) -> nn.Module:
    """Build any timm model without a classifier."""
    try:
        return timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as error:
        near = ", ".join(timm.list_models(f"*{name[:6]}*")[:6]) or "see timm.list_models()"
        raise ConfigError(
            f"encoder {name!r} is unknown to timm {timm.__version__} ({error}): "
            f"choose {', '.join(RESNETS)} or a timm model ({near})."
        ) from error


def _feature_dim(network: nn.Module) -> int:
    """Width of what the network returns."""
    # num_features is the last stage's; models with a pre-logits layer return another width.
    width = getattr(network, "head_hidden_size", None) or getattr(network, "num_features", None)
    if not isinstance(width, int):
        raise ConfigError(
            f"encoder {type(network).__name__} does not say how wide its features are: it has "
            "neither head_hidden_size nor num_features. Choose another timm model."
        )
    return width
