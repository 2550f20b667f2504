"""fastclr: SimCLR at the speed of the hardware.

Public names are loaded on first use, so that importing the package is instant and pulls in neither
torch nor DeepSpeed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastclr import encoders as encoders
    from fastclr import heads as heads
    from fastclr.batch import Batch as Batch
    from fastclr.commands.pretrain import pretrain as pretrain
    from fastclr.config import Config as Config
    from fastclr.config import ConfigError as ConfigError
    from fastclr.losses import MarginTriplet as MarginTriplet
    from fastclr.losses import NTLogistic as NTLogistic
    from fastclr.losses import NTXent as NTXent
    from fastclr.losses import gradient_cache as gradient_cache
    from fastclr.losses import margin_triplet as margin_triplet
    from fastclr.losses import nt_logistic as nt_logistic
    from fastclr.losses import nt_xent as nt_xent
    from fastclr.optim import LARS as LARS
    from fastclr.simclr import SimCLR as SimCLR
    from fastclr.trainer import Trainer as Trainer
    from fastclr.world import World as World

__version__ = "0.1.0"

_HOMES = {
    "Batch": "fastclr.batch",
    "Config": "fastclr.config",
    "ConfigError": "fastclr.config",
    "LARS": "fastclr.optim",
    "MarginTriplet": "fastclr.losses",
    "NTLogistic": "fastclr.losses",
    "NTXent": "fastclr.losses",
    "SimCLR": "fastclr.simclr",
    "Trainer": "fastclr.trainer",
    "World": "fastclr.world",
    "encoders": "fastclr.encoders",
    "gradient_cache": "fastclr.losses",
    "heads": "fastclr.heads",
    "margin_triplet": "fastclr.losses",
    "nt_logistic": "fastclr.losses",
    "nt_xent": "fastclr.losses",
    "pretrain": "fastclr.commands.pretrain",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import the module that holds a public name."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fastclr' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return module if _HOMES[name] == f"fastclr.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted([*globals(), *_HOMES])
