"""Learning rates as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


def scaled_learning_rate(
    base: float, global_batch_size: int, scaling: Literal["linear", "sqrt"]
) -> float:
    """Scale a rate given for 256 images to a batch (Chen et al. 2020, section 2.3 and B.1).

    ``linear``: base * batch / 256 (0.3 gives 4.8 at 4096). ``sqrt``: base * sqrt(batch / 256);
    the paper's 0.075 * sqrt(batch) is base 1.2.
    """
    factor = global_batch_size / 256
    return base * (factor if scaling == "linear" else math.sqrt(factor))


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0 to 1, then cosine to 0 or constant; multiplies the peak rate.

    Attributes:
        warmup_steps: Steps of the warm-up; step s of it has factor (s + 1) / warmup_steps.
        kind: What follows the warm-up.
    """

    warmup_steps: int
    kind: Literal["cosine", "constant"]

    def factor(self, step: int, total_steps: int | None) -> float:
        """Return the factor of a step, 0..1.

        Args:
            step: Step from 0.
            total_steps: Length of the run; None while it is not known yet, which holds 1 after the
                warm-up.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant" or total_steps is None:
            return 1.0
        rest = max(1, total_steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - self.warmup_steps) / rest)))
