"""Outcomes through the store: every rank's, and in time."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from fastclr.verify.ranks import Talk
from fastclr.world import World


def talks(store: dist.Store, num_ranks: int, seconds: float = 20.0) -> list[Talk]:
    return [Talk(World(r, num_ranks, r, num_ranks), store, seconds) for r in range(num_ranks)]


def test_rank_0_hears_all_and_all_hear_rank_0():
    main, other = talks(dist.HashStore(), 2)
    other.answer("loss", {"found": [1.5], "seconds": 0.1})
    main.answer("loss", {"found": [float("inf")], "seconds": 0.2})
    assert [told["found"] for told in main.answers("loss")] == [[float("inf")], [1.5]]
    heard = []
    listener = threading.Thread(target=lambda: heard.append(other.from_main(lambda: "not mine")))
    listener.start()
    assert main.from_main(lambda: ["rows", 1]) == ["rows", 1]
    listener.join(20)
    assert heard == [["rows", 1]]


def test_a_second_time_hears_nothing_of_the_first():
    store = dist.HashStore()
    first, second = talks(store, 1)[0], talks(store, 1, seconds=0.2)[0]
    first.answer("loss", {"found": 1})
    assert first.answers("loss") == [{"found": 1}]
    assert "no answer within 0.4 s" in second.answers("loss")[0]["problem"]


def test_a_silent_rank_is_told_from_one_that_answers():
    main, _, last = talks(dist.HashStore(), 3, seconds=0.5)
    for talk in (main, last):
        talk.answer("loss", {"found": 1})
    started = time.monotonic()
    told = main.answers("loss")
    assert 0.9 < time.monotonic() - started < 10
    assert told[0] == told[2] == {"found": 1}
    assert told[1] == {"problem": "no answer within 1 s", "seconds": 0.0}


def test_nobody_waits_for_rank_0_for_ever():
    _, other = talks(dist.HashStore(), 2, seconds=0.1)
    with pytest.raises(TimeoutError, match=r"rank 0 said nothing within 0.4 s"):
        other.from_main(lambda: "not mine")
