"""Which rank the others wait for.

The steps of all ranks take the same time, whoever is slow: they wait for each other. What is a
rank's own are the parts of a step in which nobody waits: from the gradients, which all have at the
same time, over the update to the end of the step, and the wait for the next batch. A rank on a
loaded or throttled processor, or with slow storage, takes longer there than the others. On an
accelerator these are the host's parts: a slow device alone does not show.
"""

from __future__ import annotations

import logging
import socket
import statistics
import time

from fastclr import collectives
from fastclr.world import World

logger = logging.getLogger(__name__)

LEAST_FACTOR = 3.0  # of the other ranks' median
LEAST_SHARE = 0.01  # of all time, that the others wait


class Stragglers:
    """Measures this rank's own parts of steps, compares ranks, and names the slow one.

    Args:
        world: Which rank of how many.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._own, self._since = 0.0, 0.0
        self._began = time.perf_counter()
        self._named: dict[int, float] = {}

    def begin(self) -> None:
        """Begin a part of a step that is this rank's own."""
        self._since = time.perf_counter()

    def end(self) -> None:
        """End it."""
        self._own += time.perf_counter() - self._since

    def compare(self, steps: int) -> None:
        """Compare the ranks since the last time; every rank calls this at log rows.

        Args:
            steps: Taken since then.
        """
        own, since = self._own, self._began
        self._own, self._began = 0.0, time.perf_counter()
        if self._world.num_ranks == 1:
            return
        found = collectives.from_all((own, socket.gethostname()))
        if self._world.is_main:
            seconds = [own for own, _ in found]
            worst = max(range(len(seconds)), key=seconds.__getitem__)
            self._judge(worst, seconds, found[worst][1], steps, self._began - since)

    def _judge(
        self, worst: int, seconds: list[float], host: str, steps: int, passed: float
    ) -> None:
        """Warn of a rank that takes much longer than the others, once until it gets worse."""
        others = statistics.median(seconds[:worst] + seconds[worst + 1 :])
        factor = seconds[worst] / max(others, 1e-6)
        is_slow = factor >= LEAST_FACTOR and seconds[worst] - others >= LEAST_SHARE * passed
        if not is_slow or factor < 2 * self._named.get(worst, 0.0):
            return
        self._named[worst] = factor
        logger.warning(
            "rank %d on %s is slow: %.2f s for its own parts of the last %d steps, %.1f times the "
            "median of the others, who wait for it. Its processor or storage is loaded, throttled "
            "or broken.",
            worst, host, seconds[worst], steps, factor,
        )  # fmt: skip
