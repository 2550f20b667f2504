"""The ranks of one attempt find each other in a store that is full of earlier attempts."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from fastclr.rendezvous import agree_on_prefix

PATIENCE = timedelta(seconds=20)


def attempt(store: dist.Store, ranks: list[int], num_ranks: int) -> dict[int, str]:
    """Let some ranks look for each other, the last first; return what each found."""
    found: dict[int, str] = {}

    def come(rank: int) -> None:
        found[rank] = agree_on_prefix(store, rank, num_ranks, PATIENCE)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
        thread.join(0.1)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("first", ["rank 0 first", "rank 0 last"])
def test_every_attempt_has_a_word_of_its_own(num_ranks: int, first: str) -> None:
    store = dist.HashStore()
    order = list(range(num_ranks)) if first == "rank 0 first" else list(range(num_ranks))[::-1]
    words = []
    for _ in range(3):
        found = attempt(store, order, num_ranks)
        assert len(found) == num_ranks and len(set(found.values())) == 1
        words.append(found[0])
    assert len(set(words)) == 3


def test_a_rank_that_does_not_come_is_named() -> None:
    store = dist.HashStore()
    attempt(store, [0, 1, 2], 3)  # what it leaves behind is taken for nobody
    with pytest.raises(RuntimeError, match=r"ranks \[1, 2\] did not come"):
        agree_on_prefix(store, 0, 3, timedelta(seconds=0.3))
    with pytest.raises(RuntimeError):
        agree_on_prefix(store, 1, 3, timedelta(seconds=0.3))
