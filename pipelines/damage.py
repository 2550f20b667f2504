"""What is done about damaged samples while training: raise, or replace, count and cap."""

from __future__ import annotations

import logging
import threading
from typing import Any, Literal

import numpy as np

from fastclr.config import ConfigError
from pipelines.decode import DamagedImage, check_header
from pipelines.image_set import ImageSet
from pipelines.order import Int64, SampleOrder
from pipelines.shards import DamagedSample, ShardError

logger = logging.getLogger(__name__)

OnDamage = Literal["raise", "replace"]
MOST_DAMAGED = 100


class Damage:
    """The policy, and the damaged samples met so far; from any thread.

    Only bytes that were read and are no good image count. What cannot be read always raises.

    Args:
        on_damage: ``raise``, or ``replace`` the sample by the next good one of the order.
        most_damaged: Samples replaced before it is an error after all.

    Attributes:
        found: Sample ids, and what is wrong with each, in the order they were met.
    """

    def __init__(self, on_damage: OnDamage = "raise", most_damaged: int = MOST_DAMAGED) -> None:
        if on_damage not in ("raise", "replace") or most_damaged < 0:
            raise ConfigError(
                f"on_damage is {on_damage!r} and most_damaged {most_damaged}: give raise or "
                "replace, and 0 or more."
            )
        self.on_damage, self.most_damaged = on_damage, most_damaged
        self.found: dict[int, str] = {}
        self._lock = threading.Lock()

    def note(self, sample_id: int, error: DamagedSample) -> None:
        """Note a damaged sample, once.

        Raises:
            DamagedSample: The error itself, where damage is not to be replaced.
            ShardError: If these are too many.
        """
        if self.on_damage == "raise":
            raise error
        with self._lock:
            is_new = sample_id not in self.found
            self.found.setdefault(sample_id, str(error))
            count = len(self.found)
        if is_new:
            logger.warning("%s The next sample of the order takes its place.", error)
        if count > self.most_damaged:
            raise ShardError(
                f"{count} samples are damaged, data.most_damaged is {self.most_damaged}; the last "
                f"is {error} Restore the data, or allow more."
            ) from error


class GoodSamples:
    """Samples of an order, each damaged one replaced by the next good one of the same epoch.

    The replacement is a pure function of the data: neither ranks nor batches nor threads change it.

    Args:
        shard_set: Images.
        order: Which stands where.
        damage: Policy.
        takes_bytes: Whether images are wanted encoded; only their headers are checked then.
    """

    def __init__(
        self, shard_set: ImageSet, order: SampleOrder, damage: Damage, takes_bytes: bool
    ) -> None:
        self._set, self._order, self._damage = shard_set, order, damage
        self._takes_bytes = takes_bytes

    def take(self, epoch: int, position: int, sample_id: int) -> tuple[int, Any]:
        """Return a sample, or the first good one after its position, wrapping in the epoch.

        Args:
            epoch: Epoch from 0.
            position: Place in the epoch's order.
            sample_id: What the order has there.

        Returns:
            The id and the image: uint8 (H, W, 3), or its bytes.

        Raises:
            ShardError: If it cannot be read, too many are damaged, or damage is to raise.
        """
        num_positions = self._order.num_positions
        for ahead in range(num_positions):
            if ahead:
                place = (position + ahead) % num_positions
                sample_id = int(self._order.ids(epoch, place, place + 1)[0])
            if sample_id in self._damage.found:
                continue
            try:
                return sample_id, self._image(sample_id)
            except DamagedSample as error:
                self._damage.note(sample_id, error)
        raise ShardError(f"all {num_positions} samples are damaged: restore the data.")

    def take_all(self, epoch: int, positions: Int64, sample_ids: Int64) -> list[tuple[int, Any]]:
        """Do :meth:`take` for several positions, as far as possible at once."""
        images: list[Any] = [None] * len(sample_ids)
        if not self._takes_bytes:
            images = self._set.images(sample_ids)
        wanted = zip(positions.tolist(), sample_ids.tolist(), images, strict=True)
        return [
            self.take(epoch, position, sample_id) if image is None else (sample_id, image)
            for position, sample_id, image in wanted
        ]

    def _image(self, sample_id: int) -> Any:
        """Return one image, checked as far as its form allows."""
        if not self._takes_bytes:
            return self._set[sample_id]
        data = self._set.read(sample_id)
        try:
            found = check_header(data)
        except DamagedImage as error:
            raise DamagedSample(self._set.place(sample_id), error) from error
        expected = tuple(self._set.sizes(np.array([sample_id]))[0].tolist())
        if found != expected:
            raise DamagedSample(
                self._set.place(sample_id), f"is {found} pixels, its index says {expected}"
            )
        return data
