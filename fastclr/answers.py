"""A run's answers to its test images, and what two runs' answers tell of each other."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np

from fastclr.config import ConfigError
from fastclr.evaluation.draws import Int64
from fastclr.evaluation.significance import Significance, paired_permutation
from fastclr.files import write_shared

FOLDER = "answers"


def keep_answers(
    run_dir: Path, name: str, answer_X: Int64, label_X: Int64, test: str, metric: str
) -> None:
    """Keep a protocol's answers for comparisons.

    Args:
        run_dir: The run's folder.
        name: The protocol.
        answer_X: int64 answers to the test images.
        label_X: Their labels.
        test: Digest of the test images.
        metric: Key of :data:`~fastclr.evaluation.scoring.METRICS`.
    """
    folder, data = run_dir / FOLDER, io.BytesIO()
    folder.mkdir(exist_ok=True)
    np.savez(
        data,
        answer_X=answer_X,
        label_X=label_X,
        name=np.array(name),
        test=np.array(test),
        metric=np.array(metric),
    )
    write_shared(folder / f"{name.replace('/', '--')}.npz", data.getvalue())


def compare(first: Path, second: Path) -> dict[str, Significance]:
    """Compare two runs on the test images that both answered, protocol by protocol.

    Raises:
        ConfigError: If they have no protocol in common, or a file is damaged.
    """
    found = {}
    for file in sorted((first / FOLDER).glob("*.npz")):
        if not (second / FOLDER / file.name).exists():
            continue
        ours, theirs = (_read(run / FOLDER / file.name) for run in (first, second))
        label_X = ours["label_X"]
        if ours["test"] == theirs["test"] and np.array_equal(label_X, theirs["label_X"]):
            found[str(ours["name"])] = paired_permutation(
                ours["answer_X"] == label_X,
                theirs["answer_X"] == label_X,
                label_X if ours["metric"] == "mean_per_class" else None,
            )
    if not found:
        raise ConfigError(
            f"{first} and {second} have no answers to the same test images: score both with "
            "linear-lbfgs, linear-sgd, semi-1, semi-10, finetune or transfer on the same data."
        )
    return found


def _read(file: Path) -> dict[str, np.ndarray]:
    """Read a file of answers."""
    names = ("answer_X", "label_X", "name", "test", "metric")
    try:
        with np.load(file, allow_pickle=False) as found:
            return {name: found[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{file} is damaged ({error}): delete it and score again.") from error
