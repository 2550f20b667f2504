"""Projection heads g: representations h to projections z."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from fastclr.config import ConfigError, HeadConfig

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm1d,
    "layer": nn.LayerNorm,
    "none": lambda _: nn.Identity(),
}


class SupervisedHead(nn.Linear):
    """A linear classifier of h, zero at first: all classes are equally likely.

    LARS leaves it out of decay and ratio, as the SimCLR authors' code does (``head_supervised``):
    by the ratio, steps are a share of weights that begin with nothing.

    Args:
        feature_dim: Width F of h.
        num_classes: Classes K, the width of its output.
    """

    def __init__(self, feature_dim: int, num_classes: int) -> None:
        super().__init__(feature_dim, num_classes)

    def reset_parameters(self) -> None:
        """Set all weights to zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def none(feature_dim: int) -> nn.Sequential:
    """Return the head that changes nothing: z = h.

    Args:
        feature_dim: Width F of h, and of z.
    """
    return nn.Sequential(OrderedDict(identity=nn.Identity()))


def linear(feature_dim: int, output_dim: int = 128) -> nn.Sequential:
    """Return one linear layer without bias (Chen et al. 2020, section 4.2).

    Args:
        feature_dim: Width F of h.
        output_dim: Width D of z.
    """
    return nn.Sequential(OrderedDict(fc1=nn.Linear(feature_dim, output_dim, bias=False)))


def mlp(
    feature_dim: int,
    hidden_dim: int = 0,
    output_dim: int = 128,
    depth: int = 2,
    norm: str = "batch",
) -> nn.Sequential:
    """Return ``depth`` linear layers with norm and ReLU between them.

    The authors' code ends in one more BatchNorm without bias; the paper's text does not, and
    neither does this.

    Args:
        feature_dim: Width F of h.
        hidden_dim: Width of the hidden layers; 0 takes F, as in the paper.
        output_dim: Width D of z.
        depth: Linear layers, 2 or more; 2 in the paper, 3 in the authors' later code.
        norm: Key of :data:`NORMS`, applied before each ReLU.

    Raises:
        ConfigError: If the depth or the norm makes no sense.
    """
    if depth < 2 or norm not in NORMS:
        raise ConfigError(
            f"an mlp head of depth {depth} with norm {norm!r} does not exist: "
            f"give depth >= 2 and a norm from {', '.join(NORMS)}."
        )
    hidden_dim = hidden_dim or feature_dim
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    width = feature_dim
    for i in range(1, depth):
        layers[f"fc{i}"] = nn.Linear(width, hidden_dim, bias=norm == "none")
        layers[f"norm{i}"] = NORMS[norm](hidden_dim)
        layers[f"relu{i}"] = nn.ReLU()
        width = hidden_dim
    layers[f"fc{depth}"] = nn.Linear(width, output_dim, bias=False)
    return nn.Sequential(layers)


HEADS: dict[str, Callable[[HeadConfig, int], nn.Sequential]] = {
    "none": lambda c, width: none(width),
    "linear": lambda c, width: linear(width, c.output_dim),
    "mlp": lambda c, width: mlp(width, c.hidden_dim, c.output_dim, c.depth, c.norm),
}


def from_config(config: HeadConfig, feature_dim: int) -> nn.Sequential:
    """Create the head that a configuration describes.

    Args:
        config: Kind, depth, widths and norm.
        feature_dim: Width F of h.

    Raises:
        ConfigError: If the kind is not in :data:`HEADS`.
    """
    if config.kind not in HEADS:
        raise ConfigError(f"head.kind {config.kind!r} is unknown: choose from {', '.join(HEADS)}.")
    return HEADS[config.kind](config, feature_dim)
