"""What a loader needs of a data set."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipelines.decode import Pixels
from pipelines.order import Int64, SampleOrder


class ImageSet(Protocol):
    """Images by number, from 0; all of it from any thread.

    Attributes:
        digest: Tells this data from other data, also at another place.
    """

    digest: str

    def __len__(self) -> int: ...

    def __getitem__(self, sample_id: int) -> Pixels:
        """Return a decoded image, uint8 (H, W, 3).

        Raises:
            DamagedSample: If its bytes are no good image, or one of another size than it should be.
            ShardError: If it cannot be read.
        """
        ...

    def images(self, sample_ids: Int64) -> list[Pixels | None]:
        """Decode at once what is decoded faster so; None for each image to be asked for by itself.

        Raises:
            ShardError: If a shard's index is wrong.
            StorageError: If a remote shard cannot be fetched in time.
        """
        ...

    def read(self, sample_id: int) -> bytes:
        """Return an encoded image.

        Raises:
            ShardError: If it cannot be read.
        """
        ...

    def place(self, sample_id: int) -> str:
        """Name a sample for an error: its shard and key."""
        ...

    def sizes(self, sample_ids: Int64) -> npt.NDArray[np.int32]:
        """Return heights and widths in pixels, int32 (n, 2)."""
        ...

    def labels(self, sample_ids: Int64) -> Int64:
        """Return labels, int64 (n,); -1 where there is none."""
        ...

    def order(self, seed: int) -> SampleOrder:
        """Return which sample stands where in each epoch."""
        ...

    def prefetch(self, shards: list[int], tolerant: bool = False) -> None:
        """Take a hint: these shards are read next. Returns at once, and never fails.

        Args:
            shards: Their numbers.
            tolerant: Whether files that changed are warned of, instead of ending the reading.
        """
        ...
