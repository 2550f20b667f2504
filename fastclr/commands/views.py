"""Draw augmented pairs with their numbers: ``fastclr views DIR --out views.png``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro

from fastclr.config import ViewsConfig
from pipelines.mixture import open_sets
from pipelines.policy import SimCLRPolicy
from pipelines.view_sheet import view_sheet


def show_views(
    path: Annotated[str, tyro.conf.Positional],
    out: Path,
    views: ViewsConfig = ViewsConfig(),  # noqa: B008
    num_images: int = 8,
    seed: int = 0,
    epoch: int = 0,
    backend: str = "auto",
) -> None:
    """Draw the first images of an epoch, both views of each, and the numbers they were made with.

    Args:
        path: Data set: a folder, a URL, others' tars, or a mixture a:0.7,b:0.3.
        out: PNG to write, e.g. views.png.
        views: Augmentation, with the flags and meaning of training.
        num_images: Images, a row each.
        seed: Seed of the run.
        epoch: Epoch from 0.
        backend: Augmentation back-end, as ``--data.backend`` of training.
    """
    sheet = view_sheet(
        open_sets(path),
        SimCLRPolicy(**asdict(views)),
        num_images=num_images,
        seed=seed,
        epoch=epoch,
        backend=backend,
    )
    temporary = out.with_name(f".{out.name}.partial")
    sheet.save(temporary, "PNG")
    temporary.replace(out)
    print(f"{out}: {sheet.width} x {sheet.height} pixels")
