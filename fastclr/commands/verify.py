"""Verify a machine before training on it: ``fastclr verify --ds-config FILE``.

Any number of ranks, by any launcher: ``deepspeed --module fastclr verify``, torchrun.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

COLOURS = {"pass": "green", "FAIL": "bold red", "not applicable": "yellow", "not run": "red"}


def verify(
    ds_config: str = "fp32",
    json: Path | None = None,
    scratch: Path = Path("runs"),
    ledger: Path | None = None,
    train: str = "",
) -> bool:
    """Compare losses, gradients, LARS, BatchNorm, order, views and resume with one process.

    Exits with 0 if all is as it should be, 1 if anything is not, 78 for a JSON that is refused.

    Args:
        ds_config: DeepSpeed JSON of the run to come, or the name of one that comes with fastclr
            (fp32, fp32_clipped); its batch sizes are replaced by tiny ones.
        json: File to write the rows to.
        scratch: Folder that all ranks see; what is written there is removed.
        ledger: Folder of a training run: prove instead, from the record of its steps, that it saw
            each image once an epoch, over interruptions and changes of ranks.
        train: Training data of that run, where it lies elsewhere now.
    """
    if ledger:
        from fastclr.audit import audit

        rows = audit(ledger, train)
        _print(rows)
        return all(row.is_good for row in rows)
    from fastclr import verify as verification
    from fastclr.files import write_json
    from fastclr.world import World

    rows = verification.verify(ds_config, scratch=scratch)
    # Rank 0 speaks for all: launchers stop everybody when one process fails, and with it the table.
    if not World.detect().is_main:
        return True
    summary = verification.summary(ds_config, rows)
    if json:
        write_json(json, {**summary, "rows": [asdict(row) for row in rows]})
    _show(rows, summary)
    return all(row.is_good for row in rows)


def _print(rows: list[Any]) -> Console:
    """Print the table."""
    table = Table("check", "what", "deviation", "limit", "result", "seconds")
    for row in rows:
        numbers = ("" if x is None else f"{x:.2g}" for x in (row.deviation, row.limit))
        note = f"\n[dim]{escape(row.note)}" if row.note and row.status != "pass" else ""
        result = f"[{COLOURS[row.status]}]{row.status}"
        seconds = f"{row.seconds:.1f}" if row.seconds else ""
        table.add_row(row.check, escape(row.what) + note, *numbers, result, seconds)
    console = Console()
    console.width = console.width if console.is_terminal else 132
    console.print(table)
    return console


def _show(rows: list[Any], summary: dict[str, Any]) -> None:
    """Print the table and one line that says what it is about."""
    console = _print(rows)
    versions = ", ".join(f"{k} {summary['versions'][k]}" for k in ("fastclr", "torch", "deepspeed"))
    counts = ", ".join(f"{count} {status}" for status, count in summary["counts"].items() if count)
    console.print(
        f"{versions}; {summary['device']}, {summary['backend']}, ranks: {summary['num_ranks']}, "
        f"ZeRO stage {summary['zero_stage']}, {summary['precision']}, accumulation "
        f"{summary['accumulation']}: {counts}",
        highlight=False,
        soft_wrap=True,
    )
