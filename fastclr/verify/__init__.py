"""What a user runs on a new cluster before spending a GPU-month: does it compute what it says?

Every check is two functions: one measures on every rank, as a run under the given DeepSpeed JSON
would compute; the other judges on rank 0 by one process in float64 that holds the data of all
ranks. The data is another on each rank, in scale and distribution: symmetric errors cannot cancel.
"""

from __future__ import annotations

from fastclr.verify.checks import CHECKS, summary, verify
from fastclr.verify.rows import Row

__all__ = ["CHECKS", "Row", "summary", "verify"]
