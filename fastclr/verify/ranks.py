"""How ranks meet and tell each other outcomes, beside the collectives that are verified.

Outcomes travel through the store by which the ranks first met: it stands when the process group is
broken. A rank that fails says so itself; the others wait for it in their collectives no longer than
the group's time limit.
"""

# torch exports its stores under private names only.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from fastclr.world import World


def join(world: World, device: torch.device, patience_seconds: float) -> dist.Store:
    """Join the process group, unless the caller has; return the store behind it."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend,
            timeout=timedelta(seconds=patience_seconds),
            **(alone if world.num_ranks == 1 else {}),
        )
    return c10d._get_default_store()


class Talk:
    """What ranks tell each other beside the collectives that are verified.

    Args:
        world: Which rank of how many.
        store: The store by which they met.
        patience_seconds: How long a collective waits.
    """

    def __init__(self, world: World, store: dist.Store, patience_seconds: float) -> None:
        self.world, self.store, self.seconds = world, store, patience_seconds
        # Every rank verifies equally often: its count names this time.
        self.place = f"verify {store.add(f'verify {world.rank}', 1)}"
        self.count = 0

    def answer(self, name: str, outcome: dict[str, Any]) -> None:
        """Tell rank 0 what this rank found."""
        self.store.set(self._key(name, self.world.rank), json.dumps(outcome))

    def answers(self, name: str) -> list[dict[str, Any]]:
        """Return what each rank told, on rank 0; a rank that is silent has failed."""
        # A rank may have waited in a collective for one that failed after as long a wait.
        deadline = time.monotonic() + 2 * self.seconds
        found = []
        for rank in range(self.world.num_ranks):
            left = max(1.0, deadline - time.monotonic())
            silent = {"problem": f"no answer within {2 * self.seconds:g} s", "seconds": 0.0}
            told = self._get(self._key(name, rank), left)
            found.append(silent if told is None else told)
        return found

    def from_main(self, make: Callable[[], Any]) -> Any:
        """Return on every rank what rank 0 makes."""
        self.count += 1
        key = self._key("from rank 0", self.count)
        if self.world.is_main:
            self.store.set(key, json.dumps(make()))
        told = self._get(key, 4 * self.seconds)
        if told is None:
            raise TimeoutError(
                f"rank 0 said nothing within {4 * self.seconds:g} s: see its output."
            )
        return told

    def _key(self, name: str, place: int) -> str:
        return f"{self.place} {name} {place}"

    def _get(self, key: str, seconds: float) -> Any:
        """Return what stands under a key, None if nothing within some time."""
        try:
            self.store.wait([key], timedelta(seconds=seconds))
        except RuntimeError:  # torch has no word of its own for a store's timeout
            return None
        return json.loads(self.store.get(key))
