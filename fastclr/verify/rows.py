"""What a check found, and how large a deviation may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Status = Literal["pass", "FAIL", "not applicable", "not run"]

# Two computations in one precision differ from the truth by draws of one error: a rank may be so
# much unluckier than the one process that tells how large that error is.
SLACK = 4.0
# An error that comes out as 0 by chance (of one number, say) sets no limit below this.
FLOOR = 16 * torch.finfo(torch.float32).eps
# Nor does one that no rounding explains, of a device that is broken, set one above these.
CEILING = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}
TF32_CEILING = 0.02


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        check: Which part it is about.
        what: What was compared with what.
        status: ``not run`` where an earlier check left the ranks out of step; no pass either.
        deviation: How far off; relative where the row does not say otherwise; None if nothing
            could be compared.
        limit: The largest deviation that passes.
        note: Where the deviation is, or why there is none.
        seconds: Time of the whole measurement, in its first row; 0 in those that came with it.
    """

    check: str
    what: str
    status: Status
    deviation: float | None = None
    limit: float | None = None
    note: str = ""
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong, or nothing can be."""
        return self.status in ("pass", "not applicable")


def compared(check: str, what: str, deviation: float, limit: float, note: str = "") -> Row:
    """Return the row of a comparison; what is not finite fails, and JSON has no word for it."""
    status: Status = "pass" if deviation <= limit else "FAIL"
    if not math.isfinite(deviation):
        return Row(
            check, what, status, None, limit, f"the deviation is {deviation}. {note}".strip()
        )
    return Row(check, what, status, deviation, limit, note)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return |found - expected| / |expected|, of vectors of any shape."""
    expected = expected.double()
    gap = (found.double() - expected).norm()
    return 0.0 if gap == 0 else (gap / expected.norm()).item()


def worst(deviations: Sequence[float]) -> int:
    """Return the place of the largest; what is not a number is larger than any."""
    return max(range(len(deviations)), key=lambda i: (math.isnan(deviations[i]), deviations[i]))


def limit_for(own_error: float, dtype: torch.dtype = torch.float32, tf32: bool = False) -> float:
    """Return the limit where plain torch in one process and precision is off by ``own_error``.

    Args:
        own_error: Of no code of ours: what is wrong there too must not raise the limit.
        dtype: The lowest precision that is computed in.
        tf32: Whether float32 products are rounded to TF32.
    """
    ceiling = TF32_CEILING if tf32 and dtype == torch.float32 else CEILING[dtype]
    return min(SLACK * own_error + FLOOR, ceiling)
