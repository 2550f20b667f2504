"""A number that says whether two tensors are the same to the bit.

Words of 8 bytes, each times an odd number of its own, added up modulo 2^64: one pass over the bytes
where they lie, on any device, in any order. Any one other word, or the same words in another order,
changes it. It finds mistakes and faults; a forger could pass by it.
"""

from __future__ import annotations

import torch


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """Return the digest of a tensor of any type; its layout in memory does not count.

    Returns:
        int64 scalar on its device.
    """
    return digest_rows(tensor.reshape(1, -1))[0]


def digest_rows(rows_RK: torch.Tensor) -> torch.Tensor:
    """Return the digest of each row of a tensor of any type, int64 (R,) on its device."""
    bytes_RK = rows_RK.detach().contiguous().view(torch.uint8)
    if rest := bytes_RK.shape[1] % 8:
        bytes_RK = torch.nn.functional.pad(bytes_RK, (0, 8 - rest))
    elif bytes_RK.storage_offset() % 8:  # a part of a larger buffer
        bytes_RK = bytes_RK.clone()
    words_RW = bytes_RK.view(torch.int64)
    return (words_RW * odd(words_RW.shape[1], words_RW.device)).sum(1)


def odd(count: int, device: torch.device) -> torch.Tensor:
    """Return odd numbers that differ in all their bits, int64."""
    numbers = torch.arange(1, count + 1, device=device) * -7046029254386353131  # 2^64 / golden
    return (numbers ^ (numbers >> 31)) | 1
