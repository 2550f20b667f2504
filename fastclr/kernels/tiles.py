"""Tiles of the similarity matrix: every pair of an anchor and a key once, never the matrix.

Keys lie rank-major and, within a rank, view-major: [z0 of rank 0, z1 of rank 0, z0 of rank 1, ...].
Tiles never straddle a view or a rank, and our own rows are cut alike as anchors and as keys: the
anchors themselves, and their positives, are diagonals of whole tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

BLOCK = 512  # 1 MiB of float32: two buffers stay in a core's share of the cache


@dataclass(frozen=True)
class Keys:
    """Rows that the anchors are compared with: of all ranks, or of one on its way round the ring.

    Attributes:
        rows_MD: Rows, of the anchors' dtype.
        images_R: Images of each rank whose rows these are; M = 2 * sum.
        own: Which of these ranks is ours; None if none is.
        start: Place of the first row among the rows of the whole world.
        shared_MK: What each row's rank shares about it, for the gradient; None in the forward.
    """

    rows_MD: torch.Tensor
    images_R: Sequence[int]
    own: int | None
    start: int = 0
    shared_MK: torch.Tensor | None = None

    @property
    def first(self) -> int | None:
        """Place of our own rows among these; None if they are not."""
        return None if self.own is None else 2 * sum(self.images_R[: self.own])


class Tile(NamedTuple):
    """Similarities of some anchors to some keys of one view of one rank.

    Attributes:
        rows: Which anchors.
        columns: Which keys.
        s_block: (rows, columns), in nats; the receiver's to overwrite until the next tile.
        same_view: Whether the keys are of the anchors' own view.
        diagonal: Whether the diagonal is the anchors themselves (same view) or their positives.
        mirrored: Whether the tile also stands for its mirror image, which does not come.
        in_view_0: Whether the anchors are of view 0.
    """

    rows: slice
    columns: slice
    s_block: torch.Tensor
    same_view: bool
    diagonal: bool
    mirrored: bool
    in_view_0: bool


class _Span(NamedTuple):
    """A run of rows within one view of one rank."""

    rows: slice
    rank: int | None
    view: int
    block: int


def _spans(images_R: Sequence[int], ranks: Sequence[int | None]) -> Iterator[_Span]:
    """Cut each view of each rank evenly into spans of at most BLOCK rows."""
    start = 0
    for images, rank in zip(images_R, ranks, strict=True):
        blocks = -(-images // BLOCK)
        for view in range(2):
            for block in range(blocks):
                low, high = (images * i // blocks for i in (block, block + 1))
                yield _Span(slice(start + low, start + high), rank, view, block)
            start += images


def tiles(
    rows_ND: torch.Tensor, keys: Keys, *, symmetric: bool = False, other_view: bool = False
) -> Iterator[Tile]:
    """Yield the tiles of rows_ND @ keys.T in a fixed order.

    Args:
        rows_ND: Anchors, view-major.
        keys: Rows to compare them with.
        symmetric: Leave out the lower triangle where the keys are the anchors themselves.
        other_view: Leave out the keys of the anchors' own view.
    """
    symmetric = symmetric and len(keys.images_R) == 1 and keys.own is not None
    columns = list(_spans(keys.images_R, range(len(keys.images_R))))
    buffer = rows_ND.new_empty(BLOCK * BLOCK)
    for i, row in enumerate(_spans([len(rows_ND) // 2], [keys.own])):
        for k, column in enumerate(columns):
            same_view = row.view == column.view
            if (symmetric and k < i) or (other_view and same_view):
                continue
            a_ID, b_KD = rows_ND[row.rows], keys.rows_MD[column.rows]
            s_block = buffer[: len(a_ID) * len(b_KD)].view(len(a_ID), len(b_KD))
            torch.mm(a_ID, b_KD.T, out=s_block)
            own = row.rank is not None and row.rank == column.rank
            diagonal = own and row.block == column.block
            mirrored = symmetric and k > i
            yield Tile(row.rows, column.rows, s_block, same_view, diagonal, mirrored, row.view == 0)
