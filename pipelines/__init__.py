"""Images to shards, shards to batches of views; imports nothing until a name is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.loader import Loader as Loader
    from pipelines.loader import make_loader as make_loader
    from pipelines.policy import SimCLRPolicy as SimCLRPolicy
    from pipelines.shards import ShardError as ShardError
    from pipelines.shards import ShardSet as ShardSet

_HOMES = {
    "Loader": "pipelines.loader",
    "ShardError": "pipelines.shards",
    "ShardSet": "pipelines.shards",
    "SimCLRPolicy": "pipelines.policy",
    "make_loader": "pipelines.loader",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import the module that holds a public name."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pipelines' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted([*globals(), *_HOMES])
