"""What came of drills: a row each, of its last run, and the table of all."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drill import ROOT

from fastclr.measurements import measurement, write_rows

sys.path.insert(0, str(ROOT / "benchmarks"))
from report_parts.rows import read_rows

_HEADER = """\
# Drills

The last run of each by `python tests/drills/run.py --out benchmarks/results`: {drills} drills,
{cells} cells, {failed}. Tier P is for every change, L for a release.

{processor}, {cores} cores; torch {torch}, deepspeed {deepspeed}.

| drill | what passing means | tier | seed | passed | seconds | slowest cell | seen | commit, day |
|---|---|---|---:|---:|---:|---:|---|---|
"""
_FOOTER = "\nNot tried: NCCL, GPUs, real S3, real SLURM, a real loss of power.\n"


@dataclass(frozen=True)
class Result:
    """What came of a drill.

    Attributes:
        name: A1, ...
        seed: Of all that was drawn.
        num_cells: Cells tried.
        num_failed: Cells that did not pass.
        failures: What went wrong, a line each, of the first ones.
        seconds: All in all.
        slowest: Longest cell.
        seen: What was seen.
        skipped: Why it could not be run, or "".
    """

    name: str
    seed: int
    num_cells: int
    num_failed: int
    failures: list[str]
    seconds: float
    slowest: float
    seen: str
    skipped: str = ""

    @property
    def num_passed(self) -> int:
        """Cells that passed."""
        return max(0, self.num_cells - self.num_failed)

    def line(self, what: str) -> str:
        """Return one line for people.

        Args:
            what: What passing means.
        """
        if self.skipped:
            return f"{self.name:4} skipped: {self.skipped}"
        verdict = "FAILED, " if self.failures else ""
        text = f"{self.name:4} {verdict}seed {self.seed}: {self.num_passed} of {self.num_cells} "
        text += f"cells, {self.seconds:.1f} s (slowest {self.slowest:.1f} s): {what}"
        return text + (f" [{self.seen}]" if self.seen else "")


def add(folder: Path, result: Result, tier: str, drills: Mapping[str, str]) -> None:
    """Put a result into a folder's rows, in the place of an older one of its drill.

    Args:
        folder: Holds ``drills.jsonl`` and ``drills.md``, or will.
        result: Of a drill.
        tier: P or L.
        drills: By name what passing means, in the table's order.
    """
    file = folder / "drills.jsonl"
    rows = {row["variant"]: row for row in read_rows(file)}
    rows[result.name] = measurement(
        "drill",
        result.name,
        [result.seconds],
        sizes={
            "cells": result.num_cells,
            "passed": result.num_passed,
            "seed": result.seed,
            "tier": tier,
            "slowest_seconds": result.slowest,
            "seen": "; ".join(
                [*(f.splitlines()[0][:200] for f in result.failures), result.seen]
            ).strip("; "),
            "skipped": result.skipped,
        },
    )
    known = [rows[name] for name in drills if name in rows]
    write_rows(file, known)
    (folder / "drills.md").write_text(_page(known, drills), encoding="utf-8")


def _page(rows: list[dict[str, Any]], drills: Mapping[str, str]) -> str:
    """Return the table of all rows."""
    done = [row["sizes"] for row in rows if not row["sizes"]["skipped"]]
    failed = [row["variant"] for row in rows if row["sizes"]["passed"] < row["sizes"]["cells"]]
    last = max(rows, key=lambda row: row["measured"])
    header = _HEADER.format(
        drills=len(done),
        cells=sum(sizes["cells"] for sizes in done),
        failed=f"failed: {', '.join(failed)}" if failed else "none failed",
        processor=last["hardware"]["processor"],
        cores=last["hardware"]["cores"],
        torch=last["versions"].get("torch"),
        deepspeed=last["versions"].get("deepspeed"),
    )
    return header + "".join(_line(row, drills[row["variant"]]) for row in rows) + _FOOTER


def _line(row: dict[str, Any], what: str) -> str:
    """Return a row of the table."""
    sizes = row["sizes"]
    seen = f"not run: {sizes['skipped']}" if sizes["skipped"] else sizes["seen"].replace("|", "/")
    where = f"{(row['commit'] or 'no clone')[:7]}{' with changes' * bool(row['dirty'])}"
    return (
        f"| {row['variant']} | {what} | {sizes['tier']} | {sizes['seed']} | "
        f"{sizes['passed']} of {sizes['cells']} | {row['p50_seconds']:.1f} | "
        f"{sizes['slowest_seconds']:.1f} | {seen} | {where}, {row['measured'][:10]} |\n"
    )
