"""What is done for one run: training and scoring it, each as the study needs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastclr import data_sets, ds_config, losses
from fastclr.config import Config
from fastclr.contracts import BatchSource
from fastclr.engine import device_of
from fastclr.interruption import Interruption
from fastclr.optim import LARS
from fastclr.simclr import SimCLR
from fastclr.studies import colour_histograms, downstream, scoring, spaces
from fastclr.studies.alternating_steps import AlternatingTrainer, two_rate_optimizer
from fastclr.studies.head_starts import Context, build, fresh_head
from fastclr.studies.images import StudyImages
from fastclr.studies.scales import Scale
from fastclr.studies.study import Run
from fastclr.studies.supervised_steps import SupervisedTrainer, classifier
from fastclr.studies.view_changes import ChangedViews
from fastclr.trainer import Trainer
from fastclr.world import World
from pipelines.loader import make_loader

JSON = dict[str, Any]

DS_JSON = {"zero_optimization": {"stage": 0}, "tensorboard": {"enabled": False}}
_LOG_ROWS = 100  # of a run


@dataclass(frozen=True)
class Job:
    """All that is needed to do a run.

    Attributes:
        run: The run.
        images: Its images.
        scale: Its scale.
        run_dir: Folder for checkpoints and log; what is in it is gone on from.
        interruption: Catches signals.
        say: Told what is being done.
    """

    run: Run
    images: StudyImages
    scale: Scale
    run_dir: Path
    interruption: Interruption
    say: Callable[[str], None] = lambda _: None


def train(job: Job) -> tuple[SimCLR, JSON]:
    """Train a run's model, or go on with it; return it with means of the last log rows.

    Raises:
        ConfigError: If the run cannot work.
        Preempted: After a signal; what was done is saved in ``job.run_dir``.
        KeyboardInterrupt: After SIGINT, likewise.
        FloatingPointError: If the loss is not finite.
    """
    device = device_of(World())
    config = replace(job.run.config, run_dir=str(job.run_dir), data=_NAMED)
    config, ds = ds_config.resolve(config, DS_JSON, World())
    config = data_sets.settle_backend(config, device)
    model = build(
        job.run.variant, Context(config, job.images, job.scale.autoencoder_epochs, job.say), device
    )
    if job.run.variant.supervised:
        model = classifier(model, _width(model), len(job.images.class_names)).to(device)
    if not job.run.variant.trained:
        return model, {}
    source = _source(job, config, device)
    _trainer(job, config, ds, model, source).fit(source, epochs=config.epochs)
    return model, scoring.logged_means(job.run_dir)


def _source(job: Job, config: Config, device: torch.device) -> BatchSource:
    """Make a run's loader."""
    loader = make_loader(
        job.images.train,
        data_sets.policies_of(config),
        micro_batch_size=config.global_batch_size or 0,
        seed=config.seed,
        backend=config.data.backend,
        world=World(),
        device=device,
        num_threads=torch.get_num_threads(),
    )
    changes = job.run.variant.changes
    return ChangedViews(loader, changes, config.seed) if any(changes) else loader


def _trainer(job: Job, config: Config, ds: JSON, model: SimCLR, source: BatchSource) -> Trainer:
    """Make the trainer that a run's variant asks for."""
    total_steps = round((config.epochs or 0) * source.batches_per_epoch)
    settings: JSON = {
        "loss": losses.from_config(config.loss),
        "run_dir": job.run_dir,
        "warmup_epochs": config.optimizer.warmup_epochs,
        "schedule": config.optimizer.schedule,
        "batch_norm": config.batch_norm,
        "seed": config.seed,
        "world": World(),
        "log_every": max(1, total_steps // _LOG_ROWS),
        "checkpoint_every": max(1, total_steps),  # and when a signal comes
        "keep_checkpoints": 1,
        "interruption": job.interruption,
    }
    if how := job.run.variant.alternating:
        device = device_of(World())
        return AlternatingTrainer(
            model,
            alternating=how,
            renewed_steps=round(how.renewed_epochs * source.batches_per_epoch),
            fresh_head=lambda n: fresh_head(config, _width(model), n).to(device),
            optimizer=two_rate_optimizer(model, config.optimizer, how.head_rate),
            ds_config={k: v for k, v in ds.items() if k != "optimizer"},
            **settings,
        )
    kind = SupervisedTrainer if job.run.variant.supervised else Trainer
    return kind(model, optimizer=_lars(model, config), ds_config=ds, **settings)


def _width(model: SimCLR) -> int:
    """Return the width of h."""
    return model.encoder.feature_dim  # pyright: ignore[reportReturnType]


_NAMED = replace(Config().data, train="the study's images")  # a configuration must name some


def _lars(model: SimCLR, config: Config) -> LARS | None:
    """Return the optimizer that is no type of the DeepSpeed JSON, if it is asked for."""
    if config.optimizer.name != "LARS":
        return None
    settings = asdict(config.optimizer)
    return LARS.for_module(
        model, **{name: settings[name] for name in (*ds_config.NUMBERS, *ds_config.FORMS)}
    )


def _train_and_score(job: Job) -> JSON:
    """Train, then score h and every layer of the head."""
    model, logged = train(job)
    return _scores(job, model, logged)


def _scores(job: Job, model: SimCLR, logged: JSON) -> JSON:
    """Score a model; return it beside what was logged."""
    device = device_of(World())
    scores = scoring.layer_scores(model, job.images, device, job.say)
    for end, found in spaces.numbers(model, job.images, job.run.config, device).items():
        scores[end] = {**scores[end], **found}
    return {**scores, **({"log": logged} if logged else {})}


def _train_and_tell_changes(job: Job) -> JSON:
    """Do that, and tell changes of images from h and z."""
    model, logged = train(job)
    most = job.scale.forgetting_images
    told = scoring.changes_told(model, job.images, most, device_of(World()), job.say)
    return {**_scores(job, model, logged), **told}


def _train_and_picture(job: Job) -> JSON:
    """Do that, and make maps and spectra of h, z and the head."""
    model, logged = train(job)
    scores, seed = _scores(job, model, logged), job.run.config.seed
    shares, pictures = spaces.pictured(model, job.images, seed, device_of(World()), job.say)
    for end, share in shares.items():
        scores[end]["in_plane"] = share
    first = scoring.head_ranks(SimCLR.from_config(job.run.config))
    return {**scores, "first_weights": first, "pictures": pictures}


def _train_and_tune(job: Job) -> JSON:
    """Do that, and tune the encoder on a few labels."""
    model, logged = train(job)
    seed, device = job.run.config.seed, device_of(World())
    tuned = downstream.tuned(model, job.images, job.scale, seed, device, job.say)
    return {**_scores(job, model, logged), "tuned": tuned}


def _train_and_transfer(job: Job) -> JSON:
    """Do that, and carry the encoder to another data set."""
    model, logged = train(job)
    found = downstream.transferred(
        model,
        job.images,
        job.scale,
        job.run.config.seed,
        job.run.variant.trained,
        device_of(World()),
        job.say,
    )
    return {**_scores(job, model, logged), "transfer": found}


def _match_histograms(job: Job) -> JSON:
    """Match crops by their colours alone; nothing is trained."""
    return {
        "histogram": colour_histograms.matching(job.run.config, job.images),
        "pictures": colour_histograms.pictured(job.run.config, job.images),
    }


WORKS: dict[str, Callable[[Job], JSON]] = {
    "train": _train_and_score,
    "changes": _train_and_tell_changes,
    "spaces": _train_and_picture,
    "tuned": _train_and_tune,
    "transfer": _train_and_transfer,
    "histograms": _match_histograms,
}
