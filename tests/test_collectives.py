"""Collectives over ranks with unequally many rows; the ranks run this file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastclr import collectives

COUNTS = [2, 0, 3]


def rows_of(rank: int) -> torch.Tensor:
    """Return a rank's rows, each unlike all others; the wrong way round in memory."""
    rows = torch.arange(2 * COUNTS[rank], dtype=torch.float64).view(2, -1).T + 10 * rank
    return rows.requires_grad_()


@pytest.fixture(scope="module")
def everyone(run_ranks) -> list[dict]:
    """Return what each of three ranks finds."""
    return run_ranks(Path(__file__), len(COUNTS))


ALL_ROWS = [row for rank in range(len(COUNTS)) for row in rows_of(rank).tolist()]


def test_shapes_of_all_ranks(everyone):
    assert all(found["shapes"] == [[count, 2] for count in COUNTS] for found in everyone)


def test_hosts_agree_without_a_device(everyone):
    for found in everyone:
        assert found["host_group"] == [True, True]
        assert found["gloo_twin"] == [3, 3]
        assert found["part"] == [1, 2]
        assert found["any_rank"] == [True, False]


@pytest.mark.parametrize("name", ["all_gather", "gather_rows"])
def test_gathered_rows_lie_in_rank_order(everyone, name):
    assert all(found[name] == ALL_ROWS for found in everyone)


def test_equal_counts_need_not_be_told(everyone):
    assert all(found["equal"] == [[0.0], [1.0], [2.0]] for found in everyone)


def test_the_gradient_of_gathered_rows_is_the_sum_over_ranks(everyone):
    for rank, (count, found) in enumerate(zip(COUNTS, everyone, strict=True)):
        start = sum(COUNTS[:rank])
        # Rank r weighs row k by (r + 1)(k + 1).
        weights = [6.0 * (start + i + 1) for i in range(count)]
        assert found["gradient"] == [[w, w] for w in weights]


def test_the_backward_changes_no_gradient_of_others(everyone):
    for found in everyone:
        assert found["shared_gradient"] == [[2.0]] * 3 + [[3.0]]


def test_the_ring_shows_every_rank_once_ours_first(everyone):
    for rank, found in enumerate(everyone):
        sources = [(rank - step) % len(COUNTS) for step in range(len(COUNTS))]
        expected = [[s, rows_of(s).tolist(), [[s]] * COUNTS[s]] for s in sources]
        assert found["ring"] == expected


def test_one_process_is_its_own_world():
    rows = rows_of(0)
    assert (collectives.num_ranks(), collectives.rank()) == (1, 0)
    assert collectives.any_rank(True) and not collectives.any_rank(False)
    assert collectives.shapes(rows) == [[2, 2]]
    assert collectives.all_gather(rows, [2]) is rows
    assert collectives.gather_rows(rows) is rows
    ((source, held),) = collectives.ring([rows], [2])
    assert source == 0 and torch.equal(held[0], rows)


def shared_gradient() -> list[list[float]]:
    """Return a gradient that came the same way as the gathered one: nobody may change it."""
    row = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    other = torch.ones(len(COUNTS), 1, dtype=torch.float64, requires_grad=True)
    scaled = 2 * other  # made before the gather, so its backward comes after the gather's
    total = scaled + collectives.gather_rows(row)
    total.backward(torch.ones_like(total))
    return other.grad.tolist() + row.grad.tolist()


def main(rendezvous: str, result: str) -> None:
    """Measure everything; rank 0 writes what each rank finds."""
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=len(COUNTS)
    )
    rows = rows_of(rank)
    gathered = collectives.gather_rows(rows, COUNTS)
    weights = torch.arange(1, len(gathered) + 1)[:, None]
    (gradient,) = torch.autograd.grad((gathered * weights * (rank + 1)).sum(), rows)
    sources = torch.full((len(rows), 1), rank)
    twin = collectives.gloo_twin(None)
    others = dist.new_group([1, 2])
    in_twin = rows.new_tensor([rank])
    dist.all_reduce(in_twin, group=twin)
    found = {
        "host_group": [collectives.host_group() is None, collectives.gloo_twin(None) is twin],
        "gloo_twin": [in_twin.item(), dist.get_world_size(twin)],
        # Ranks 1 and 2 alone make this one.
        "part": dist.get_process_group_ranks(collectives.gloo_twin(others)) if rank else [1, 2],
        "any_rank": [collectives.any_rank(rank == 2), collectives.any_rank(False)],
        "shapes": collectives.shapes(rows),
        "all_gather": collectives.all_gather(rows.detach(), COUNTS).tolist(),
        "gather_rows": gathered.tolist(),
        "equal": collectives.gather_rows(torch.tensor([[float(rank)]])).tolist(),
        "gradient": gradient.tolist(),
        "shared_gradient": shared_gradient(),
        "ring": [
            [source, *(tensor.tolist() for tensor in held)]
            for source, held in collectives.ring([rows.detach(), sources], COUNTS)
        ],
    }
    everyone = [None] * len(COUNTS)
    dist.all_gather_object(everyone, found)
    if rank == 0:
        Path(result).write_text(json.dumps(everyone))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
