"""How large a study is run: the configuration that its arms start from, and the images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fastclr import recipes
from fastclr.config import (
    Config,
    EncoderConfig,
    HeadConfig,
    LossConfig,
    OptimizerConfig,
    ViewsConfig,
)


@dataclass(frozen=True)
class Scale:
    """A size of all studies.

    Attributes:
        base: What the arms are variations of.
        num_train: Training images, the first of the set; they are also what probes are fitted on.
        num_test: Test images, the first of the set.
        output_dims: Widths of z that are compared.
        feature_dim: Width of h.
        autoencoder_epochs: Length of the autoencoder's training.
        forgetting_images: Training images of the probes that tell changes.
        tuning_epochs: Epochs of fine-tuning on a few labels; 0 for the source's 60 and 30.
        transfer_steps: Steps of fine-tuning on another set; 0 for a linear probe alone.
        expects: How long a run takes, as far as it is known.
    """

    base: Config
    num_train: int
    num_test: int
    output_dims: tuple[int, ...]
    feature_dim: int
    autoencoder_epochs: int
    forgetting_images: int
    tuning_epochs: int
    transfer_steps: int
    expects: str


def changed(config: Config, part: str, **settings: Any) -> Config:
    """Return a configuration with settings of one of its parts changed."""
    return replace(config, **{part: replace(getattr(config, part), **settings)})


def without_colour(config: Config) -> Config:
    """Return a configuration whose views have no colour distortion."""
    return changed(config, "views", jitter_prob=0.0, grayscale_prob=0.0)


_VIEWS = ViewsConfig(size=32, color_strength=0.5, blur_prob=0.0)
_ADAM = OptimizerConfig(name="Adam", learning_rate=3e-3, weight_decay=1e-6, warmup_epochs=0)

PILOT = Scale(
    base=Config(
        # A stem of stride 2 costs a quarter of one of stride 1 and, at equal time, learns no less.
        encoder=EncoderConfig("resnet8", width=0.25, stem="small_stride2"),
        head=HeadConfig(output_dim=64, norm="none"),
        views=_VIEWS,
        loss=LossConfig(temperature=0.2),
        optimizer=_ADAM,
        epochs=30,
        global_batch_size=128,
    ),
    num_train=5120,
    num_test=5000,
    output_dims=(16, 64, 256),
    feature_dim=64,
    autoencoder_epochs=30,
    forgetting_images=2560,
    tuning_epochs=0,
    transfer_steps=0,
    expects="two minutes a run on one CPU core",
)

TOY = replace(
    PILOT,
    base=replace(
        PILOT.base,
        encoder=EncoderConfig("resnet8", width=0.125, stem="small_stride2"),
        head=HeadConfig(output_dim=8, norm="none"),
        epochs=1,
        global_batch_size=32,
    ),
    num_train=96,
    num_test=64,
    output_dims=(4, 8),
    feature_dim=32,
    autoencoder_epochs=2,
    forgetting_images=48,
    tuning_epochs=1,
    transfer_steps=1,
    expects="a second a run; shows that all of it works, and nothing else",
)

# Never run by this project, which has had no such machine.
SMALL = Scale(
    base=replace(recipes.RECIPES["cifar10-paper"](), epochs=100),
    num_train=50_000,
    num_test=10_000,
    output_dims=(32, 128, 512),
    feature_dim=512,
    autoencoder_epochs=100,
    forgetting_images=10_000,
    tuning_epochs=0,
    transfer_steps=2_000,
    expects="never run by this project; meant for a day of one GPU a study",
)
CIFAR10 = replace(
    SMALL,
    base=replace(
        changed(recipes.RECIPES["cifar10-paper"](), "encoder", name="resnet50"),
        global_batch_size=1024,
    ),
    feature_dim=2048,
    expects=(
        "never run by this project; the source's appendix B.9, of which another project reports 13 "
        "hours a run on two V100 (AndrewAtanov/simclr-pytorch)"
    ),
)
PAPER = Scale(
    base=recipes.RECIPES["simclr-v1-paper"](),
    num_train=1_281_167,
    num_test=50_000,
    output_dims=(32, 128, 512, 2048),
    feature_dim=2048,
    autoencoder_epochs=100,
    forgetting_images=50_000,
    tuning_epochs=0,
    transfer_steps=20_000,
    expects=(
        "never run by this project; the authors state 6 hours a run on 32 TPU v3 cores for 100 "
        "epochs of ResNet-50 at batch 4096"
    ),
)

SCALES: dict[str, Scale] = {
    "toy": TOY,
    "pilot": PILOT,
    "small": SMALL,
    "cifar10": CIFAR10,
    "paper": PAPER,
}
