"""The files that a run left behind, checked: what the page needs is there and finite."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from fastclr.config import ConfigError
from fastclr.evaluation import score_sheet
from fastclr.report import charts

_FIELDS = {
    "config.json": {
        "config.encoder.name": str,
        "config.loss.temperature": Real,
        "config.global_batch_size": int,
        "ds_config": dict,
        "command": str,
        "versions": dict,
        "hardware.device": str,
        "hardware.processor": str,
        "hardware.cores": int,
        "data.train.path": str,
        "data.train.num_samples": int,
        "started": str,
    },
    "summary.json": {
        "images": int,
        "epochs": Real,
        "training_seconds": Real,
        "images_per_second": Real,
        "data_wait_fraction": Real,
        "num_ranks": int,
        "ended": str,
    },
    "scores.json": {
        **{f"scores.{encoder}.linear_top1": Real for encoder in charts.ENCODERS},
        **{f"scores.{encoder}.knn_top1": Real for encoder in charts.ENCODERS},
        "protocol.linear": str,
        "protocol.knn": str,
        "num_test": int,
        "num_classes": int,
        "class_names": list,
    },
}
_METRICS = (
    "step",
    "loss",
    "contrastive_accuracy",
    "images_per_second",
    "data_wait_fraction",
    "training_seconds",
)
_EVALUATIONS = ("epoch", "linear_top1", "knn_top1")
RANK, JOINT = "h_effective_rank", "joint_top1"
REMEDY = "Restore it from a copy of the run, or run the training or evaluation that wrote it again."


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object and check the fields that the page needs."""
    try:
        # NaN is no JSON: as null it fails the field check below instead of reaching report.json.
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing: the report is made from it. {REMEDY}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}). {REMEDY}") from error
    for field, kind in _FIELDS[path.name].items():
        value = document
        for key in field.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise ConfigError(
                f"{path}: {field} is {value!r}, the report needs a {kind.__name__}. {REMEDY}"
            )
    return document


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Read the logged rows as one finite float64 column a metric."""
    if not path.exists():
        raise ConfigError(f"{path} is missing: the curves are drawn from it. {REMEDY}")
    lines = path.read_bytes().splitlines()
    if not lines:
        raise ConfigError(f"{path} is empty: there is no curve to draw. Train with --log-every 1.")
    return _columns(path, lines, _METRICS)


def read_evaluations(path: Path) -> dict[str, np.ndarray]:
    """Read the scores taken while training as columns; nothing where there are none."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    # An evaluation without pairs of views has no monitors, one without a joint probe no score.
    there = [k for k in (RANK, JOINT) if all(f'"{k}"'.encode() in line for line in lines)]
    return _columns(path, lines, (*_EVALUATIONS, *there))


def _columns(path: Path, lines: Sequence[bytes], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the rows in the lines as one finite float64 column a name; {} for no line."""
    rows = [_read_row(path, number, line, names) for number, line in enumerate(lines, start=1)]
    return dict(zip(names, np.array(rows).T, strict=True)) if rows else {}


def _read_row(path: Path, number: int, line: bytes, names: Sequence[str]) -> list[float]:
    """Read one logged row, in the order of the names."""
    try:
        document = json.loads(line)
        row = {key: float(document[key]) for key in names}
        if not all(map(math.isfinite, row.values())):
            raise ValueError(f"not finite: {row}")
        return list(row.values())
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ConfigError(
            f"{path}, line {number} is no row of metrics ({type(error).__name__}: {error}): "
            f"the curves would have a hole. Delete that line. It starts {line[:60]!r}."
        ) from error


def has_scores(file: Path) -> bool:
    """Tell whether there are the quick protocol's scores, which the page shows first."""
    if not file.exists():
        return False
    try:
        return set(json.loads(file.read_text(encoding="utf-8"))) != {"protocols"}
    except (OSError, ValueError, TypeError):
        return True  # damaged: reading it says so


def read_protocols(file: Path) -> dict[str, Any]:
    """Return the entries of all protocols of a file that is none or can be read.

    Raises:
        ConfigError: If they are damaged.
    """
    document = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    entries = document.get("protocols", {})
    if not isinstance(entries, dict):
        raise ConfigError(f"{file}: protocols is {entries!r}, no object. {REMEDY}")
    score_sheet.lines(entries)
    return entries
