"""Contrastive losses; an entry of LOSSES is a class built with its settings."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastclr.config import ConfigError, LossConfig
from fastclr.losses.gradient_cache import gradient_cache
from fastclr.losses.margin_triplet import MarginTriplet, margin_triplet
from fastclr.losses.nt_logistic import NTLogistic, nt_logistic
from fastclr.losses.nt_xent import NTXent, nt_xent

LOSSES = {"nt_xent": NTXent, "nt_logistic": NTLogistic, "margin_triplet": MarginTriplet}


def from_config(config: LossConfig) -> nn.Module:
    """Build the loss of a run, whose loader gives every rank equally many rows.

    Raises:
        ConfigError: If the name is unknown.
    """
    if config.name not in LOSSES:
        raise ConfigError(f"loss {config.name!r} is unknown: choose from {', '.join(LOSSES)}.")
    common = {"negatives": config.negatives, "exchange": config.exchange, "equal_ranks": True}
    own: dict[str, dict[str, Any]] = {
        "nt_xent": {"temperature": config.temperature, "normalize": config.normalize},
        "nt_logistic": {"temperature": config.temperature, "semi_hard": config.semi_hard},
        "margin_triplet": {
            "margin": 0.8 if config.margin is None else config.margin,
            "semi_hard": config.semi_hard,
        },
    }
    return LOSSES[config.name](**own[config.name], **common)


__all__ = [
    "LOSSES",
    "MarginTriplet",
    "NTLogistic",
    "NTXent",
    "from_config",
    "gradient_cache",
    "margin_triplet",
    "nt_logistic",
    "nt_xent",
]
