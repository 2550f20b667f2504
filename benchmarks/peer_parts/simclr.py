"""SimCLR of other libraries around our encoder and head, on Lightning, as lightly documents it."""

from __future__ import annotations

import gc
import logging
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from fastclr.config import Config, ViewsConfig
from fastclr.optim import parameter_groups
from fastclr.simclr import SimCLR
from peer_parts.nt_xent import Loss

OptimizerOf = Callable[[nn.Module], torch.optim.Optimizer]


def lightly_transform(views: ViewsConfig) -> Any:
    """Return lightly's two views of a Pillow image, with our numbers and without normalisation."""
    from lightly.transforms import SimCLRTransform

    return SimCLRTransform(
        input_size=views.size,
        cj_strength=views.color_strength,
        cj_prob=views.jitter_prob,
        min_scale=views.crop_scale[0],
        random_gray_scale=views.grayscale_prob,
        gaussian_blur=views.blur_prob,
        sigmas=views.blur_sigma,
        normalize=None,
    )


def endless(data: Dataset[Any], batch_size: int, num_workers: int) -> Iterable[Any]:
    """Return torch's DataLoader over random images, in one epoch that does not end."""
    return DataLoader(
        data, batch_size, sampler=RandomSampler(data, replacement=True, num_samples=10**9),
        num_workers=num_workers, persistent_workers=num_workers > 0,
    )  # fmt: skip


def lightly_loader(folder: Path, views: ViewsConfig, batch_size: int, num_workers: int) -> Any:
    """Return lightly's data set of a folder of class folders, in torch's DataLoader."""
    from lightly.data import LightlyDataset

    data = LightlyDataset(str(folder), transform=lightly_transform(views))
    return endless(data, batch_size, num_workers)


def lightly_loss(temperature: float) -> Loss:
    """Return lightly's NT-Xent."""
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=temperature)


def lightly_lars(model: nn.Module) -> torch.optim.Optimizer:
    """Return lightly's LARS as its ImageNet benchmark sets it: norms and biases undecayed."""
    from lightly.utils.lars import LARS

    groups = [
        {"params": group["params"], "weight_decay": group["weight_decay"]}
        for group in parameter_groups(model, 1e-6)
    ]
    return LARS(groups, lr=0.1, momentum=0.9)


def seconds_per_step(
    config: Config,
    loader: Iterable[Any],
    loss: Loss,
    optimizer_of: OptimizerOf,
    *,
    warm_up: int,
    steps: int,
    at_once: int = 1,
    limit_seconds: float = float("inf"),
) -> float:
    """Train with Lightning's loop; return the mean seconds of a step after some steps.

    Args:
        config: Encoder and head.
        loader: Gives ``((x0, x1), ...)``, two views (B, C, H, W) in 0..1.
        loss: Of two projections (B, D).
        optimizer_of: Makes the optimizer of a model.
        warm_up: Steps not measured.
        steps: Steps measured.
        at_once: Workers of the loader. Where it is waited for, batches come that many at a time:
            a whole number of such groups is measured.
        limit_seconds: Measure fewer steps, one group at least, where they would take longer.
    """
    import pytorch_lightning as pl

    ends: list[float] = []

    class Module(pl.LightningModule):
        """The example's module around our encoder and head."""

        def __init__(self) -> None:
            super().__init__()
            model = SimCLR.from_config(config)
            self.network = nn.Sequential(model.encoder, model.projection_head)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            (x0, x1), *_ = batch
            return loss(self.network(x0), self.network(x1))

        def on_train_batch_end(self, *_: Any) -> None:
            ends.append(time.perf_counter())
            done = len(ends) - warm_up
            if done > 0 and done % at_once == 0:
                passed = ends[-1] - ends[warm_up - 1]
                self.trainer.should_stop = done >= steps or passed > limit_seconds

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.network)

    for name in ("pytorch_lightning", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(), loader)
    del trainer, loader
    gc.collect()  # ends the loader's workers, before anything else is timed
    return (ends[-1] - ends[warm_up - 1]) / (len(ends) - warm_up)


def lightly_seconds_per_step(
    folder: Path, config: Config, num_workers: int, *, warm_up: int, steps: int
) -> float:
    """Train lightly's SimCLR: its data set, transform, loss and LARS; see :func:`seconds_per_step`.

    Args:
        folder: Class folders of images.
        config: Encoder, head, views, temperature and batch.
        num_workers: Processes of the DataLoader.
        warm_up: Steps not measured.
        steps: Steps measured.
    """
    assert config.global_batch_size
    loader = lightly_loader(folder, config.views, config.global_batch_size, num_workers)
    loss = lightly_loss(config.loss.temperature)
    return seconds_per_step(
        config, loader, loss, lightly_lars, warm_up=warm_up, steps=steps,
        at_once=max(1, num_workers),
    )  # fmt: skip
