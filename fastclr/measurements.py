"""Rows of JSON for what is measured: how long it took, when, on what, with which software."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastclr.facts import hardware, now, typed, versions


def facts() -> dict[str, Any]:
    """Return when, on what and with which software a measurement was made."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "measured": now(),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def measurement(
    name: str,
    variant: str,
    seconds: Sequence[float],
    *,
    sizes: Mapping[str, int | float | str],
    dtype: str = "float32",
    warm_ups: int = 0,
    images: int | None = None,
    peak_bytes: int | None = None,
) -> dict[str, Any]:
    """Return one measurement as a row: what was timed, how long it took, on what.

    Args:
        name: What was timed: "stage", "step", "weak scaling", ...
        variant: Which of its kinds: a stage's name, a peer's, a back-end's.
        seconds: Of each repeat.
        sizes: What the time depends on: batch, image side, ranks, ...
        dtype: Of the computation.
        warm_ups: Repeats before, not measured.
        images: Source images a repeat handled; gives images_per_second of the median.
        peak_bytes: Most memory held at once.
    """
    p20, p50, p80 = np.percentile(seconds, (20, 50, 80)).tolist()
    commit, dirty = _commit()
    return {
        "name": name,
        "variant": variant,
        "sizes": dict(sizes),
        "dtype": dtype,
        "p20_seconds": p20,
        "p50_seconds": p50,
        "p80_seconds": p80,
        "repeats": len(seconds),
        "warm_ups": warm_ups,
        "images_per_second": images / p50 if images else None,
        "peak_bytes": peak_bytes,
        **facts(),
        "driver": torch.version.cuda if torch.cuda.is_available() else None,
        "commit": commit,
        "dirty": dirty,
        "command": shlex.join(typed()),
    }


@lru_cache
def _commit() -> tuple[str | None, bool | None]:
    """Return the commit this is measured at and whether files differ; None outside a clone."""
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True)
        status = subprocess.run([*git, "status", "-s", "-uno"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return head.stdout.decode().strip(), bool(status.stdout.strip())


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, replacing the file."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path(path).parent.mkdir(parents=True, exist_ok=True)  # what was measured is not lost for it
    Path(path).write_text(text, encoding="utf-8")
