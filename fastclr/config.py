"""Every setting of a run as frozen dataclasses, and the rules between them.

What the DeepSpeed JSON owns (precision, ZeRO, communication, clipping) is not repeated here;
:mod:`fastclr.ds_config` merges the two and refuses two owners for one key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, cast


class ConfigError(ValueError):
    """A setting that cannot work; the message names it, says why, and what to do."""


@dataclass(frozen=True)
class ViewsConfig:
    """Numbers of the SimCLR augmentation (Chen et al. 2020, appendix A).

    Attributes:
        size: Side of the square views in pixels.
        color_strength: Strength s of the colour jitter; 1.0 for ImageNet, 0.5 for CIFAR-10.
        crop_scale: Range of the crop's area as a fraction of the image's.
        crop_ratio: Range of the crop's width / height, drawn log-uniformly.
        flip_prob: Probability of the horizontal flip.
        jitter_prob: Probability of the colour jitter.
        brightness: Of the jitter: ``multiplicative``, a factor from max(0, 1 - 0.8 s) to
            1 + 0.8 s as in torchvision and the authors' later code, or ``additive``, -0.8 s to
            0.8 s added to colours of 0..1 as in their first and the paper's TensorFlow.
        grayscale_prob: Probability of dropping the colour.
        blur_prob: Probability of the Gaussian blur; 0 for CIFAR-10.
        blur_sigma: Range of the blur's standard deviation in pixels, drawn uniformly.
        blur_sigma_images: Images, one after the other in the order, whose views share it; 1 for
            each its own. The authors' code draws one for a replica's batch: give the batch's size.
        colour_model: ``exact``, the paper's colour jitter, or ``affine``: all of its steps as one
            matrix, without clips between them, the hue as a rotation around the gray axis. Faster,
            but other colours (4 levels of 255 on average); back-end ``dali`` only.
    """

    size: int = 224
    color_strength: float = 1.0
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_prob: float = 0.5
    jitter_prob: float = 0.8
    brightness: Literal["multiplicative", "additive"] = "multiplicative"
    grayscale_prob: float = 0.2
    blur_prob: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_sigma_images: int = 1
    colour_model: Literal["exact", "affine"] = "exact"

    @property
    def blur_taps(self) -> int:
        """Width of the blur kernel in pixels: 10 % of the side, odd; 23 at 224, 3 at 32."""
        return 2 * int((self.size // 10) / 2) + 1

    def problems(self) -> list[str]:
        """Say what cannot work, one sentence a problem."""
        found = [
            f"views.{name} is {getattr(self, name)}: a probability lies in 0..1."
            for name in ("flip_prob", "jitter_prob", "grayscale_prob", "blur_prob")
            if not 0 <= getattr(self, name) <= 1
        ]
        for name in ("crop_scale", "crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                found.append(f"views.{name} is {low} {high}: give 0 < low <= high.")
        if self.crop_scale[1] > 1:
            found.append(f"views.crop_scale ends at {self.crop_scale[1]}: an area is at most 1.")
        if self.blur_sigma_images < 1:
            found.append(f"views.blur_sigma_images is {self.blur_sigma_images}: give 1 or more.")
        if self.colour_model not in ("exact", "affine"):
            found.append(f"views.colour_model is {self.colour_model!r}: choose exact or affine.")
        if self.brightness not in ("multiplicative", "additive"):
            found.append(
                f"views.brightness is {self.brightness!r}: choose multiplicative or additive."
            )
        elif self.brightness == "additive" and self.colour_model == "affine":
            found.append(
                "views.brightness is additive and views.colour_model affine: what is added has no "
                "place in its matrices. Set colour_model to exact, or brightness to multiplicative."
            )
        if self.size < 8:
            found.append(f"views.size is {self.size}: views need at least 8 pixels a side.")
        if not 0 <= self.color_strength <= 2.5:
            found.append(
                f"views.color_strength is {self.color_strength}: the hue shift is 0.2 times it "
                "and must stay within half a turn; give 0..2.5."
            )
        return found


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and who augments them.

    Attributes:
        train: Shard set: a folder made by ``fastclr shards``, here or behind a URL (http(s),
            s3, ...); tars made by others, as a folder or pattern; or a mixture ``a:0.7,b:0.3``.
        cache_dir: Folder for copies of remote shards and indexes of others' tars, shared by the
            ranks of a node; empty for ``fastclr`` in the user's cache folder (XDG_CACHE_HOME).
        cache_gib: Bound of the copies of remote shards in GiB; those used longest ago make room.
        backend: Augmentation back-end: ``threads``, ``kornia``, ``dali``, ``triton`` or
            ``reference``; ``auto`` for the fastest that is here, settled before the run begins.
        num_threads: Threads that prepare batches; 0 for this rank's part of the cores.
        prefetch: Batches prepared ahead of the training step.
        in_memory: Decode all images before the run and keep their pixels; refused where they would
            take more than half of the free memory.
        on_damage: A damaged sample met while training ends the run (``raise``), or the next good
            one of the order takes its place (``replace``). What cannot be read always raises, and
            so does any damage in an evaluation.
        most_damaged: Damaged samples a rank replaces before it is an error after all.
    """

    train: str = ""
    cache_dir: str = ""
    cache_gib: float = 64.0
    backend: str = "auto"
    num_threads: int = 0
    prefetch: int = 4
    in_memory: bool = False
    on_damage: Literal["raise", "replace"] = "raise"
    most_damaged: int = 100


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder f: images to representations h.

    Attributes:
        name: Any timm model, or ``resnet10`` (one basic block a stage), or ``resnet8`` and
            ``resnet14`` (one and two basic blocks in each of three stages).
        width: Width multiplier of a ResNet: SimCLR's 1, 2, 4, or a fraction for a small machine.
        stem: ``imagenet`` (7x7 stride 2 and max-pool), ``small`` (3x3 stride 1, no max-pool;
            the paper's CIFAR-10 stem), or ``small_stride2`` (3x3 stride 2, no max-pool).
        activation_checkpointing: Keep the blocks' inputs alone and compute the rest again in the
            backward pass: a third more time, a fraction of the memory.
    """

    name: str = "resnet50"
    width: float = 1.0
    stem: Literal["imagenet", "small", "small_stride2"] = "imagenet"
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class HeadConfig:
    """The projection head g: representations h to projections z.

    Attributes:
        kind: ``none``, ``linear`` or ``mlp``.
        depth: Layers of the mlp; 2 in the paper, 3 in the authors' later code.
        hidden_dim: Width of its hidden layers; 0 takes the encoder's.
        output_dim: Width D of z.
        norm: Normalisation after each hidden layer: ``batch``, ``layer`` or ``none``.
    """

    kind: str = "mlp"
    depth: int = 2
    hidden_dim: int = 0
    output_dim: int = 128
    norm: Literal["batch", "layer", "none"] = "batch"

    def problems(self) -> list[str]:
        """Say what cannot work, one sentence a problem."""
        found: list[str] = []
        if self.depth < 2 and self.kind == "mlp":
            found.append(f"head.depth is {self.depth}: an mlp has 2 layers or more; use linear.")
        if self.output_dim < 2 or self.hidden_dim < 0:
            found.append(
                f"head.output_dim is {self.output_dim} and head.hidden_dim {self.hidden_dim}: "
                "z needs 2 dimensions or more, and widths are not negative."
            )
        return found


@dataclass(frozen=True)
class LossConfig:
    """A contrastive loss (Chen et al. 2020, equation 1 and table 2).

    Attributes:
        name: ``nt_xent``, ``nt_logistic`` or ``margin_triplet``.
        temperature: Divides the cosines; 0.1 for ImageNet, 0.5 for long CIFAR-10 runs. Not for the
            triplet loss.
        normalize: Compare unit rows; False, for NT-Xent, compares dot products.
        margin: Of the triplet loss, in cosine; None for 0.8.
        semi_hard: Mine one semi-hard negative an anchor; not for NT-Xent.
        negatives: Of both views of all other images, or of the other view only.
        exchange: Gather all projections on each rank, or pass them round in a ring.
    """

    name: str = "nt_xent"
    temperature: float = 0.1
    normalize: bool = True
    margin: float | None = None
    semi_hard: bool = False
    negatives: Literal["both", "other_view"] = "both"
    exchange: Literal["gather", "ring"] = "gather"

    def problems(self) -> list[str]:
        """Say what cannot work, one sentence a problem."""
        found: list[str] = []
        if not 0 < self.temperature <= 100:
            found.append(f"loss.temperature is {self.temperature}: give 0 < t <= 100.")
        if self.margin is not None and not 0 <= self.margin <= 2:
            found.append(f"loss.margin is {self.margin}: cosines differ by 0 to 2.")
        for setting, is_set, has_it in (
            ("normalize off", not self.normalize, self.name == "nt_xent"),
            ("margin", self.margin is not None, self.name == "margin_triplet"),
            ("semi_hard", self.semi_hard, self.name != "nt_xent"),
        ):
            if is_set and not has_it:
                found.append(f"loss.{setting} does nothing for {self.name}: leave it out.")
        return found


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its rate; ``None`` leaves a value to the DeepSpeed JSON or the default.

    Attributes:
        name: ``LARS``, or a type of the DeepSpeed JSON: ``SGD``, ``Adam``, ``AdamW``,
            ``Lamb``.
        learning_rate: Peak rate as it is; excludes ``base_learning_rate``.
        base_learning_rate: Peak rate for 256 images, scaled by the global batch.
        scaling: ``linear``: base * batch / 256; ``sqrt``: base * sqrt(batch / 256).
        weight_decay: L2 decay; never on BatchNorm and biases. 1e-6 in the paper.
        momentum: Momentum of LARS and SGD.
        trust_coefficient: LARS's eta.
        denominator: LARS's, ``decayed_gradient`` or ``sum_of_norms``.
        rate_inside_momentum: Whether LARS's buffer holds steps or gradients.
        clip: Whether LARS's rate is a ceiling, as in apex's LARC.
        nesterov: Whether LARS looks ahead.
        warmup_epochs: Epochs over which the rate rises linearly from 0.
        schedule: ``cosine`` to 0 or ``constant`` after the warm-up; ``none`` where the DeepSpeed
            JSON has a ``scheduler`` that owns the rate.
    """

    name: str | None = None
    learning_rate: float | None = None
    base_learning_rate: float | None = None
    scaling: Literal["linear", "sqrt"] = "linear"
    weight_decay: float | None = None
    momentum: float | None = None
    trust_coefficient: float | None = None
    denominator: Literal["decayed_gradient", "sum_of_norms"] | None = None
    rate_inside_momentum: bool | None = None
    clip: bool | None = None
    nesterov: bool | None = None
    warmup_epochs: float = 10.0
    schedule: Literal["cosine", "constant", "none"] = "cosine"


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation during training, outside the training time.

    Attributes:
        test: Labelled data set that is scored, named as ``data.train``; empty for no evaluation.
        train: Labelled data set whose features the probes are fitted on; empty for ``data.train``.
        every_epochs: Epochs between evaluations; the last step is always evaluated.
        most_images: Images taken of each, the first ones.
        joint_probe: Train a linear classifier beside the encoder, which does not notice it, on the
            labels of ``data.train``; it is scored in every evaluation.
    """

    test: str = ""
    train: str = ""
    every_epochs: int = 1
    most_images: int = 10_000
    joint_probe: bool = False


@dataclass(frozen=True)
class FaultsConfig:
    """What is done when something goes wrong.

    Attributes:
        non_finite: ``stop``, or ``skip`` the batch; skipping waits for the device in each step.
        most_skipped: Batches skipped before the run stops after all.
        compare_every: Steps between two comparisons of all ranks' weights, which find a bit that
            was turned on one of them; before each checkpoint they are compared in any case.
        watchdog_seconds: How long any one thing may take, a collective's wait for another rank
            among them; then the process says which and leaves.
    """

    non_finite: Literal["stop", "skip"] = "stop"
    most_skipped: int = 10
    compare_every: int = 100
    watchdog_seconds: float = 600.0


@dataclass(frozen=True)
class Config:
    """One run.

    Attributes:
        data: Images and back-end.
        views: Augmentation of both views, or of the first.
        views_second: Augmentation of the second view, where it is to be another.
        encoder: Encoder f.
        head: Projection head g.
        loss: Contrastive loss.
        optimizer: Optimizer and schedule.
        evaluation: Online evaluation.
        faults: What is done when something goes wrong.
        batch_norm: Statistics over all ranks, or local to each, which leaks the positives; or
            ``none``: GroupNorm in the place of every BatchNorm.
        compile: Compile encoder and head with ``torch.compile``.
        run_dir: Folder of this run; a checkpoint in it is gone on from.
        start_from: Checkpoint of another run, a folder, that a new run goes on from.
        initial_weights: File of a model or its encoder that a new run begins with: safetensors of
            this project, or what torchvision, timm, lightly, solo-learn and converted SimCLR
            encoders are saved in (``.safetensors``, ``.pth``, ``.ckpt``).
        initial_weights_input: What those of others were trained on: ``unit``, images in 0..1, or
            ``imagenet``, ImageNet's mean and std taken off; ``as_format``, as that library does.
        epochs: Length of the run in epochs; excludes ``minutes``.
        minutes: Length in minutes of training; the number of steps follows the speed, so two such
            runs are not the same.
        global_batch_size: Images of the contrastive batch over all ranks; also the DeepSpeed
            JSON's ``train_batch_size``.
        seed: Seed of weights, order and views.
        log_every: Steps between log rows.
        checkpoint_every: Steps between checkpoints; 0 for the end of each epoch.
        keep_checkpoints: Last checkpoints kept; older ones are deleted.
        keep_every: Checkpoints at multiples of so many steps are kept too; 0 for none.
    """

    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    views_second: ViewsConfig | None = None
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    batch_norm: Literal["global", "local", "none"] = "global"
    compile: bool = False
    run_dir: str = ""
    start_from: str = ""
    initial_weights: str = ""
    initial_weights_input: Literal["as_format", "unit", "imagenet"] = "as_format"
    epochs: float | None = None
    minutes: float | None = None
    global_batch_size: int | None = None
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    keep_every: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Rebuild a configuration from what ``dataclasses.asdict`` and JSON made of it.

        Raises:
            ConfigError: If a key is unknown: another version of fastclr wrote it.
        """
        try:
            parts = {
                f.name: f.default_factory(**_tuples(values[f.name]))
                for f in fields(cls)
                if f.default_factory is not MISSING
            }
            if second := values.get("views_second"):
                parts["views_second"] = ViewsConfig(**_tuples(second))
            return cls(**{**_tuples(values), **parts})
        except (TypeError, KeyError) as error:
            raise ConfigError(
                f"the saved configuration does not fit this version of fastclr ({error}): use the "
                "version that wrote it."
            ) from error

    def problems(self) -> list[str]:
        """Say what cannot work, one sentence a problem; all cross-field rules at once."""
        found = self.views.problems() + self.head.problems() + self.loss.problems()
        if self.views_second:
            found += [p.replace("views.", "views_second.") for p in self.views_second.problems()]
            if self.views_second.size != self.views.size:
                found.append(
                    f"views_second.size is {self.views_second.size} and views.size "
                    f"{self.views.size}: both views go through one encoder; give one size."
                )
        found += self._optimizer_problems()
        if not self.run_dir:
            found.append("run_dir is empty: say where results go, e.g. --run-dir runs/first.")
        if not self.data.train:
            found.append("data.train is empty: name a shard set, e.g. --data.train data/train.")
        if (self.epochs is None) == (self.minutes is None):
            found.append(
                f"epochs is {self.epochs} and minutes is {self.minutes}: give exactly one; what a "
                "recipe sets is left out by None (--epochs None --minutes 5)."
            )
        for name, length in {"epochs": self.epochs, "minutes": self.minutes}.items():
            if length is not None and not 0 < length < math.inf:
                found.append(f"{name} is {length}: the length of a run is positive.")
        if not 0 < self.data.cache_gib < math.inf:
            found.append(f"data.cache_gib is {self.data.cache_gib}: a shard has to fit; give more.")
        if self.evaluation.joint_probe and not self.evaluation.test:
            found.append(
                "evaluation.joint_probe without evaluation.test: a probe is scored on labelled "
                "images. Name some, or leave it out."
            )
        if self.start_from and self.initial_weights:
            found.append(
                f"start_from is {self.start_from} and initial_weights {self.initial_weights}: the "
                "first brings its own weights. Give one."
            )
        if not 0 <= self.seed < 2**63:
            found.append(f"seed is {self.seed}: give 0 <= seed < 2**63.")
        for name, least in {
            "data.num_threads": 0,
            "data.prefetch": 1,
            "data.most_damaged": 0,
            "log_every": 1,
            "checkpoint_every": 0,
            "keep_checkpoints": 1,
            "keep_every": 0,
            "evaluation.every_epochs": 1,
            "evaluation.most_images": 20,
            "faults.most_skipped": 0,
            "faults.compare_every": 1,
            "faults.watchdog_seconds": 1,
        }.items():
            holder, _, key = name.rpartition(".")
            value = getattr(getattr(self, holder) if holder else self, key)
            if value < least:
                found.append(f"{name} is {value}: give {least} or more.")
        return found

    def _optimizer_problems(self) -> list[str]:
        """Say what cannot work in the optimizer's settings."""
        found: list[str] = []
        rates = (self.optimizer.learning_rate, self.optimizer.base_learning_rate)
        if None not in rates:
            found.append(
                f"optimizer.learning_rate {rates[0]} and base_learning_rate {rates[1]} are both "
                "set: keep one; the second is scaled by the batch, the first is not."
            )
        for name in ("learning_rate", "base_learning_rate", "weight_decay"):
            value = getattr(self.optimizer, name)
            if value is not None and not 0 <= value < math.inf:
                found.append(f"optimizer.{name} is {value}: give a finite number >= 0.")
        momentum, trust = self.optimizer.momentum, self.optimizer.trust_coefficient
        if momentum is not None and not 0 <= momentum < 1:
            found.append(f"optimizer.momentum is {momentum}: give 0 <= momentum < 1.")
        if trust is not None and not 0 < trust < math.inf:
            found.append(f"optimizer.trust_coefficient is {trust}: give a number > 0.")
        if not self.optimizer.warmup_epochs >= 0:
            found.append(f"optimizer.warmup_epochs is {self.optimizer.warmup_epochs}: give >= 0.")
        return found


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn JSON's lists back into tuples."""
    return {k: tuple(cast("list[Any]", v)) if isinstance(v, list) else v for k, v in values.items()}


def raise_all(problems: list[str]) -> None:
    """Raise one ConfigError that lists every problem; do nothing when there is none."""
    if problems:
        raise ConfigError("\n".join(problems))
