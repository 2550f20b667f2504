"""Named recipes: functions that return a Config. What they leave None, the DeepSpeed JSON owns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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

    The paper gives its jitter twice: brightness is multiplicative in the PyTorch form, which this
    is, and additive in the TensorFlow one (``--views.brightness additive``). Never run by this
    project, which has had no such machine: the numbers are the paper's.
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


def simclr_tf_head() -> Config:
    """ImageNet as the authors' code does it at its head today: SimCLR v2's head, square root rule.

    Never run by this project. Of the source: google-research/simclr, flags as they are by default.
    """
    return Config(
        encoder=EncoderConfig("resnet50"),
        head=HeadConfig(depth=3),  # theirs ends in one more BatchNorm without bias
        loss=LossConfig(temperature=0.1),
        # Rate 0.075 times the root of the batch is 1.2 for 256 images. Their decay of 1e-4 stands
        # beside the sum of both views' losses, twice the mean here: half of it is the same for the
        # weights that LARS adapts. BatchNorm and biases learn at twice the rate there.
        optimizer=OptimizerConfig(
            name="LARS", base_learning_rate=1.2, scaling="sqrt", weight_decay=0.5e-4
        ),
        epochs=100,  # this and the batch: of the paper's ablations
        global_batch_size=4096,
    )


def cifar10_readme() -> Config:
    """CIFAR-10 by the command in the README of google-research/simclr, which reaches about 91.

    Never run by this project in full.
    """
    paper = cifar10_paper()
    return replace(
        paper,
        head=HeadConfig(depth=3),  # the code's default since SimCLR v2; the command does not say
        # The command's decay is 1e-4, 1e-6 before June 2020; halved as in simclr_tf_head.
        optimizer=replace(paper.optimizer, weight_decay=0.5e-4),
    )


def rastogi_2021() -> Config:
    """Rastogi's experiment on the head's layers as in thunderInfy/simclr, 2021.

    His data are five classes of ImageNet, 1,250 training images. What differs here: his images are
    scaled to -1..1, his last layer has a bias, and his Adam has the decay inside the gradient,
    where DeepSpeed's Adam is AdamW unless its JSON says ``"adam_w_mode": false``. Never run by this
    project.
    """
    return Config(
        encoder=EncoderConfig("resnet18"),
        head=HeadConfig(depth=3, hidden_dim=100, output_dim=100, norm="none"),
        views=ViewsConfig(flip_prob=0.0, blur_prob=0.0),
        loss=LossConfig(temperature=0.05),
        optimizer=OptimizerConfig(
            name="Adam", learning_rate=1e-3, weight_decay=1e-4, warmup_epochs=0, schedule="constant"
        ),
        epochs=200,  # and 1000 in his second experiment
        global_batch_size=250,
    )


def ae_2408_14514() -> Config:
    """CIFAR as in Schliebitz et al. 2024 (arXiv 2408.14514), with the learned head.

    They start from torchvision's ResNet-34 with ImageNet weights and images of 0..1: name the file
    behind ``--initial-weights``. The head that begins as an autoencoder is no setting of a run: see
    the study autoencoder_heads. What differs here: their last layer has a bias, their decay is on
    all weights, their cosine ends at a fiftieth of the rate and falls once an epoch, and they keep
    the checkpoint of the lowest validation loss. Never run by this project.
    """
    return Config(
        encoder=EncoderConfig("resnet34"),  # at 32 pixels too, with the stem of ImageNet
        head=HeadConfig(hidden_dim=512, output_dim=128, norm="none"),
        views=ViewsConfig(size=32),  # full strength and blur, at 32 pixels too
        loss=LossConfig(temperature=0.5),
        optimizer=OptimizerConfig(
            name="SGD", base_learning_rate=0.3, weight_decay=1e-5, momentum=0.9, warmup_epochs=0
        ),
        initial_weights_input="unit",
        epochs=150,
        global_batch_size=1280,
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
    "simclr-tf-head": simclr_tf_head,
    "cifar10-paper": cifar10_paper,
    "cifar10-readme": cifar10_readme,
    "rastogi-2021": rastogi_2021,
    "ae-2408.14514": ae_2408_14514,
    "cifar10-cpu": cifar10_cpu,
    "demo": demo,
}
