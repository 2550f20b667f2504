"""A bit that was turned changes the digest, whatever the tensor."""

from __future__ import annotations

import pytest
import torch

from fastclr.digests import digest, digest_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (4, 3, 3, 3)])
def test_every_turned_bit_changes_the_digest(dtype, shape):
    generator = torch.Generator().manual_seed(3)
    tensor = torch.randint(0, 100, shape, generator=generator).to(dtype)
    before = int(digest(tensor))
    assert int(digest(tensor.clone())) == before
    raw = tensor.reshape(-1).view(torch.uint8)
    for bit in range(0, 8 * len(raw), 5):
        raw[bit // 8] ^= 1 << bit % 8
        assert int(digest(tensor)) != before
        raw[bit // 8] ^= 1 << bit % 8


def test_order_counts_and_memory_format_does_not():
    tensor = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    assert int(digest(tensor)) != int(digest(tensor.flip(1)))
    assert int(digest(tensor)) == int(digest(tensor.to(memory_format=torch.channels_last)))


def test_each_row_has_the_digest_it_has_alone():
    rows = torch.arange(60, dtype=torch.uint8).reshape(4, 15)
    assert digest_rows(rows).tolist() == [int(digest(row)) for row in rows]


def test_a_part_of_a_larger_buffer():
    buffer = torch.arange(9, dtype=torch.float32)
    assert int(digest(buffer[1:5])) == int(digest(buffer[1:5].clone()))
