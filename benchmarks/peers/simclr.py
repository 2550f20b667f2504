"""SimCLR as lightly's documentation writes it, with Lightning's loop and torch's DataLoader."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastclr.config import Config
from fastclr.simclr import SimCLR


def images_per_second(
    images: Path, config: Config, num_workers: int, warm_up: int, steps: int
) -> float:
    """Train lightly's SimCLR on a folder of images; return its speed after some steps.

    Args:
        images: Folder of class folders.
        config: Encoder, head, views, temperature and batch; the optimizer is SGD, as in lightly's
            example, which costs less than LARS.
        num_workers: Processes of the DataLoader.
        warm_up: Steps not measured.
        steps: Steps measured.
    """
    import pytorch_lightning as pl
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform

    views, batch_size = config.views, config.global_batch_size
    transform = SimCLRTransform(
        input_size=views.size,
        cj_strength=views.color_strength,
        cj_prob=views.jitter_prob,
        min_scale=views.crop_scale[0],
        random_gray_scale=views.grayscale_prob,
        gaussian_blur=views.blur_prob,
        normalize=None,
    )
    data = torch.utils.data.DataLoader(
        LightlyDataset(str(images), transform=transform),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    ends: list[float] = []

    class Module(pl.LightningModule):
        """The example's module around our encoder and head."""

        def __init__(self) -> None:
            super().__init__()
            model = SimCLR.from_config(config)
            self.network = nn.Sequential(model.encoder, model.projection_head)
            self.criterion = NTXentLoss(temperature=config.loss.temperature)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            (x0, x1), *_ = batch
            return self.criterion(self.network(x0), self.network(x1))

        def on_train_batch_end(self, *_: Any) -> None:
            ends.append(time.perf_counter())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.06)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_steps=warm_up + steps,
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(), data)
    assert batch_size is not None
    return batch_size * steps / (ends[-1] - ends[warm_up - 1])
