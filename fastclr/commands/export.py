"""Export an encoder: ``fastclr export runs/demo --to timm --out exports/demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def export(
    run: Annotated[Path, tyro.conf.Positional], to: str, out: Path, data_license: str = ""
) -> None:
    """Write a run's encoder so that another library loads it; checked by that library.

    Args:
        run: Folder of a training run (its --run-dir).
        to: safetensors, timm, torchvision, huggingface, onnx or torch_export.
        out: Folder that is made.
        data_license: Licence of the images it was trained on, for the card.
    """
    from fastclr.export import export_run

    print(export_run(run, to, out, data_license) / "README.md")
