"""Take a step of a run again, to the bit: ``python tools/replay.py runs/demo --step 1234``.

With as many ranks as took it: ``deepspeed --num_accelerators 2 tools/replay.py ...``, torchrun.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from fastclr.cli import guard


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


def main() -> int:
    """Parse the flags, run, return the exit code."""
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    good: list[bool] = []
    code = guard(lambda: good.append(tyro.cli(replay, args=words)))
    return code or int(good != [True])


if __name__ == "__main__":
    sys.exit(main())
