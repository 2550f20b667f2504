"""A process group that an elastic launcher can start anew."""

# torch exports its stores under private names only.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta

import torch
import torch.distributed as dist

_POLL_SECONDS = 0.05


def init_process_group(
    backend: str, timeout: timedelta, device: torch.device | None = None
) -> None:
    """Join the process group that the environment describes.

    torchrun keeps one store over its restarts. Gloo would find the addresses of dead ranks there,
    and a rank that connects to those waits for ever or fails: each attempt has keys of its own.

    Args:
        backend: ``gloo`` or ``nccl``.
        timeout: How long a collective may wait for another rank.
        device: Of this rank, for NCCL, which guesses otherwise.

    Raises:
        RuntimeError: If a rank does not come within the timeout.
    """
    store, rank, num_ranks = next(dist.rendezvous("env://", timeout=timeout))
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        store = dist.PrefixStore(agree_on_prefix(store, rank, num_ranks, timeout), store)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout, device_id=device
    )


def agree_on_prefix(store: dist.Store, rank: int, num_ranks: int, timeout: timedelta) -> str:
    """Return a word that the ranks of this attempt have in common, and no earlier attempt had.

    The launcher's count of restarts does not serve: over several nodes it differs. Rank 0 draws the
    word and tells it to whoever asks, by the asker's own word, which nothing left over can answer.

    Raises:
        RuntimeError: If a rank does not come within the timeout.
    """
    mine = secrets.token_hex(8)
    if rank > 0:
        store.set(f"fastclr/asks/{rank}", mine)
        answer = f"fastclr/answer/{mine}"
        store.wait([answer], timeout)
        prefix = store.get(answer).decode()
        store.set(f"fastclr/knows/{prefix}/{rank}", "")
        return prefix
    deadline = time.monotonic() + timeout.total_seconds()
    missing = set(range(1, num_ranks))
    while missing:
        if time.monotonic() > deadline:
            raise RuntimeError(f"Timed out: ranks {sorted(missing)} did not come")
        for other in sorted(missing):
            if store.check([f"fastclr/asks/{other}"]):
                word = store.get(f"fastclr/asks/{other}").decode()  # or one left over: no harm
                store.set(f"fastclr/answer/{word}", mine)
        missing = {r for r in missing if not store.check([f"fastclr/knows/{mine}/{r}"])}
        time.sleep(_POLL_SECONDS)
    return mine
