"""Take a step of a run again, to the bit: ``fastclr replay runs/demo --step 1234``.

With as many ranks as took it: ``deepspeed --num_accelerators 2 --module fastclr replay ...``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table


def replay(run: Annotated[Path, tyro.conf.Positional], step: int, train: str = "") -> bool:
    """Train from the checkpoint before a step to it, and compare images, views and losses.

    Exits with 0 if all are equal bit for bit, 1 if not, 78 if the run cannot be taken up there.

    Args:
        run: Folder of a training run; nothing of it changes.
        step: Last step taken again, from 1.
        train: Its training data, where that lies elsewhere now.
    """
    from fastclr.audit import replay as take_again

    rows = take_again(run, step, train)
    table = Table("what", "differ", "result")
    for row in rows:
        table.add_row(row.what, f"{row.deviation:.0f}", row.status)
    if rows:
        Console().print(table)
    return all(row.is_good for row in rows)
