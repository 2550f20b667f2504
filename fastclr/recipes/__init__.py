"""Named recipes: functions that return a Config. What they leave None, the DeepSpeed JSON owns."""

from __future__ import annotations

from collections.abc import Callable

from fastclr.config import (
    Config,
    EncoderConfig,
    HeadConfig,
    LossConfig,
    OptimizerConfig,
    ViewsConfig,
)


def simclr_v1_paper() -> Config:
    """ImageNet as in Chen et al. 2020: ResNet-50, batch 4096, 100 epochs, LARS.

    Never run by this project, which has had no such machine: the numbers are the paper's.
    """
    return Config(
        encoder=EncoderConfig("resnet50"),
        optimizer=OptimizerConfig(name="LARS", base_learning_rate=0.3, weight_decay=1e-6),
        epochs=100,
        global_batch_size=4096,
    )


def cifar10_paper() -> Config:
    """CIFAR-10 as in the paper's appendix B.9, at batch 512 (the authors' README)."""
    return Config(
        encoder=EncoderConfig("resnet18", stem="small"),
        views=ViewsConfig(size=32, color_strength=0.5, blur_prob=0.0),
        loss=LossConfig(temperature=0.5),
        optimizer=OptimizerConfig(name="LARS", base_learning_rate=1.0, weight_decay=1e-6),
        epochs=1000,
        global_batch_size=512,
    )


def cifar10_cpu() -> Config:
    """CIFAR-10 on 2 CPU cores within half an hour; see the README for what it reaches."""
    return Config(
        encoder=EncoderConfig("resnet10", width=0.5, stem="small_stride2"),
        head=HeadConfig(output_dim=64),
        views=ViewsConfig(size=32, color_strength=0.5, blur_prob=0.0),
        loss=LossConfig(temperature=0.2),
        optimizer=OptimizerConfig(
            name="LARS", base_learning_rate=2.0, weight_decay=1e-6, warmup_epochs=1
        ),
        minutes=24,
        global_batch_size=256,
    )


def demo() -> Config:
    """Tiles of 16 photographs in about two minutes on 2 CPU cores."""
    return Config(
        encoder=EncoderConfig("resnet10", width=0.25, stem="small"),
        head=HeadConfig(output_dim=64),
        views=ViewsConfig(size=32, color_strength=0.5, blur_prob=0.0),
        loss=LossConfig(temperature=0.2),
        optimizer=OptimizerConfig(
            name="LARS", base_learning_rate=2.0, weight_decay=1e-6, warmup_epochs=2
        ),
        epochs=12,
        global_batch_size=128,
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "simclr-v1-paper": simclr_v1_paper,
    "cifar10-paper": cifar10_paper,
    "cifar10-cpu": cifar10_cpu,
    "demo": demo,
}
