"""What the commands do, importable: train a run, evaluate it, report it."""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from fastclr import (
    checkpointing,
    collectives,
    data_sets,
    ds_config,
    evaluations,
    fencing,
    foreign_weights,
    losses,
)
from fastclr.config import Config, ConfigError
from fastclr.data_sets import DataSet
from fastclr.engine import device_of, leave, name_of
from fastclr.evaluation import knn, linear, online
from fastclr.evaluation.features import Features, Pixels, extract
from fastclr.evaluation.linear_joint import JointProbe
from fastclr.facts import hardware, now, num_cores, redacted, versions
from fastclr.files import write_json
from fastclr.interruption import Interruption
from fastclr.optim import LARS
from fastclr.report import ViewPair, write_report
from fastclr.simclr import SimCLR
from fastclr.trainer import Summary, Trainer
from fastclr.world import World
from pipelines import photos
from pipelines.evaluation_views import evaluation_batches
from pipelines.loader import Loader, default_threads
from pipelines.remote import redacted_urls

logger = logging.getLogger(__name__)

Say = Callable[[str], None]
NUM_PAIRS, NUM_THUMBNAILS, NUM_WATCHED = 12, 1000, 256

# May change between the starts of one run; everything else is what the run is.
VOLATILE = (
    "run_dir", "log_every", "checkpoint_every", "keep_checkpoints", "keep_every", "start_from",
    "initial_weights", "initial_weights_input", "data.train", "data.cache_dir", "data.cache_gib",
    "data.num_threads", "data.prefetch", "data.in_memory",
    "data.on_damage", "data.most_damaged", "evaluation.test", "evaluation.train",
    "evaluation.every_epochs", "evaluation.most_images", "faults.non_finite",
    "faults.most_skipped", "faults.compare_every", "faults.watchdog_seconds",
)  # fmt: skip


def train(
    config: Config, ds_path: str, command: list[str], interruption: Interruption | None = None
) -> Summary:
    """Train the run that a configuration describes, or go on with it.

    Writes ``config.json``, ``metrics.jsonl``, ``checkpoints/``, ``tensorboard/`` and, at the end,
    ``summary.json`` into ``config.run_dir``.

    Args:
        config: Settings; what it leaves None the DeepSpeed JSON or the defaults fill in.
        ds_path: DeepSpeed JSON file.
        command: How the user started this, for the report.
        interruption: Catches signals already; None to begin when training does.

    Raises:
        ConfigError: If anything cannot work; before a device is touched.
        ShardError: If the data is missing or damaged.
        StorageError: If its storage does not answer, an OSError.
    """
    _set_up_logging()
    run = prepare(config, ds_config.read(ds_path), interruption)
    config, data_set, loader, trainer = run.config, run.data_set, run.loader, run.trainer
    world, run_dir = loader.world, Path(config.run_dir)
    facts = {
        "config": _without_secrets(asdict(config)),
        "ds_config": redacted(run.ds),
        "command": redacted_urls(shlex.join(command)),
        "versions": versions(),
        "hardware": hardware(name_of(trainer.device)),
        "data": {"train": data_sets.facts_of(data_set)},
        "started": now(),
    }
    if world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / "config.json", facts)
        print(
            f"training {config.encoder.name} on {len(data_set)} images, views by "
            f"{config.data.backend}: batches of "
            f"{config.global_batch_size}, {2 * (config.global_batch_size or 0) - 2} negatives for "
            f"each anchor, {loader.dropped_per_epoch} images left over in each epoch",
            flush=True,
        )
    summary = trainer.fit(loader, epochs=config.epochs, minutes=config.minutes)
    if world.is_main:
        done = {**asdict(summary), "finished": True, "ended": now()}
        write_json(run_dir / "summary.json", done)
        print(
            f"trained {summary.steps} steps, {summary.images} images in "
            f"{summary.training_seconds / 60:.1f} minutes ({summary.images_per_second:.0f} "
            f"images/s, data wait {summary.data_wait_fraction:.1%}): {summary.checkpoint}"
        )
        if summary.damaged_samples:
            print(f"{summary.damaged_samples} damaged images were replaced; the log names them")
    leave()
    return summary


class Prepared(NamedTuple):
    """A run that is ready to begin.

    Attributes:
        config: Its settings, every value filled in.
        ds: Its DeepSpeed JSON, likewise.
        data_set: Images.
        loader: What the trainer is to be given.
        trainer: Checked against the loader.
    """

    config: Config
    ds: ds_config.JSON
    data_set: DataSet
    loader: Loader
    trainer: Trainer


def prepare(
    config: Config, ds: ds_config.JSON, interruption: Interruption | None = None
) -> Prepared:
    """Build everything a run needs, and check it; no device is touched and nothing is written.

    Args:
        config: Settings; what it leaves None the DeepSpeed JSON or the defaults fill in.
        ds: DeepSpeed JSON.
        interruption: Catches signals already; None to begin when training does.

    Raises:
        ConfigError: If anything cannot work.
        ShardError: If the data is missing or damaged.
        StorageError: If its storage does not answer, an OSError.
    """
    world = World.detect()
    config, ds = ds_config.resolve(config, ds, world)
    device = device_of(world)
    config = data_sets.settle_backend(config, device)
    data_set = data_sets.open_data(config.data.train, config.data)
    _refuse_another_run(Path(config.run_dir), config)
    fencing.refuse_if_taken(Path(config.run_dir))
    _share_cores(world)
    micro_batch_size = ds_config.images_per_rank(ds, world)
    loader = data_sets.training_loader(config, data_set, micro_batch_size, world, device)
    trainer = _trainer(config, ds, loader, data_set, interruption)
    trainer.check(loader)
    return Prepared(config, ds, data_set, loader, trainer)


def _set_up_logging() -> None:
    """Show warnings, or what FASTCLR_LOG_LEVEL says.

    Raises:
        ConfigError: If that is no level.
    """
    level = os.environ.get("FASTCLR_LOG_LEVEL", "WARNING").upper()
    if not isinstance(logging.getLevelName(level), int):
        raise ConfigError(f"FASTCLR_LOG_LEVEL is {level!r}: give DEBUG, INFO, WARNING or ERROR.")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for package in ("fastclr", "pipelines"):
        logging.getLogger(package).setLevel(level)


def _trainer(
    config: Config,
    ds: ds_config.JSON,
    loader: Loader,
    data_set: DataSet,
    interruption: Interruption | None,
) -> Trainer:
    """Build model, loss, optimizer and trainer."""
    model = SimCLR.from_config(config)
    probe = _joint_probe(config, data_set, model, loader.device)
    if config.initial_weights:
        file, expected = Path(config.initial_weights), config.initial_weights_input
        said = foreign_weights.load(model, file, expected)
        if loader.world.is_main:
            print(said, flush=True)
    if config.compile:
        model.encoder.compile()
        model.projection_head.compile()
    settings: dict[str, Any] = asdict(config.optimizer)  # ds_config.resolve filled them in
    of_lars = {name: settings[name] for name in (*ds_config.NUMBERS, *ds_config.FORMS)}
    return Trainer(
        model,
        loss=losses.from_config(config.loss),
        ds_config=ds,
        run_dir=config.run_dir,
        optimizer=LARS.for_module(model, **of_lars) if config.optimizer.name == "LARS" else None,
        warmup_epochs=config.optimizer.warmup_epochs,
        schedule=config.optimizer.schedule,
        batch_norm=config.batch_norm,
        seed=config.seed,
        world=loader.world,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        keep_checkpoints=config.keep_checkpoints,
        keep_every=config.keep_every,
        start_from=config.start_from or None,
        evaluation=_online_evaluation(config, data_set, loader.world, probe),
        evaluate_every=config.evaluation.every_epochs * loader.batches_per_epoch,
        probe=probe,
        faults=config.faults,
        interruption=interruption,
    )


def _joint_probe(
    config: Config, data_set: DataSet, model: SimCLR, device: torch.device
) -> JointProbe | None:
    """Make the classifier that is trained beside the encoder, if one is asked for.

    Raises:
        ConfigError: If the training images have no labels, or other classes than the test images.
    """
    if not config.evaluation.joint_probe:
        return None
    test = data_sets.open_data(config.evaluation.test, config.data)
    names = data_set.class_names
    if data_set.num_classes < 2 or names != test.class_names:
        raise ConfigError(
            f"evaluation.joint_probe: {data_set.path} has the classes {names}, {test.path} "
            f"{test.class_names}: a probe is trained on the labels of the first and scored on the "
            "second. Train on labelled images of the same classes, or leave it out."
        )
    return JointProbe(
        cast(int, model.encoder.feature_dim),
        data_set.num_classes,
        batch_size=cast(int, config.global_batch_size),
        device=device,
    )


def _online_evaluation(
    config: Config, data_set: DataSet, world: World, probe: JointProbe | None
) -> online.OnlineEvaluation | None:
    """Score held-out images while training, and watch some training images for collapse."""
    settings = config.evaluation
    if not settings.test:
        return None
    texts = (settings.train or config.data.train, settings.test)
    found = data_sets.labelled_sets(texts, config.data)
    sets = [_image_set(s, config.views.size, settings.most_images, world) for s in found]
    pairs = data_sets.first_batch(config, data_set, config.data.backend, NUM_WATCHED, world)
    return online.OnlineEvaluation(*sets, pairs_VBCHW=pairs.views_VBCHW, probe=probe)


def _image_set(data_set: DataSet, size: int, most: int, world: World) -> online.ImageSet:
    """Describe the first images of a data set to the online evaluation."""
    return online.ImageSet(
        name=str(data_set.path),
        label_X=data_set.labels(np.arange(min(most, len(data_set)))),
        num_classes=data_set.num_classes,
        batches=lambda: evaluation_batches(data_set, size, world=world, limit=most),
    )


def load_state(model: torch.nn.Module, state: Mapping[str, torch.Tensor], name: str) -> None:
    """Load weights that are the model's, all of them and no other.

    Args:
        model: Module that gets them.
        state: Tensors by name.
        name: What messages call them.

    Raises:
        ConfigError: If they are another architecture's.
    """
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    if wrong := sorted(k for k in wanted.keys() | found if wanted.get(k) != found.get(k)):
        key = wrong[0]
        raise ConfigError(
            f"{name} do not fit the model: {len(wrong)} tensors differ, the first "
            f"is {key}: {found.get(key, 'missing')} there, {wanted.get(key, 'missing')} here. Use "
            "the encoder and head they were trained with."
        )
    model.load_state_dict(state)


def _refuse_another_run(run_dir: Path, config: Config) -> None:
    """Refuse to go on with a run under other settings."""
    if not (run_dir / "config.json").exists():
        return
    # Settings that an older version did not know had their defaults.
    defaults, now = (_flat(json.loads(json.dumps(asdict(c)))) for c in (Config(), config))
    before = {**defaults, **_flat(read_json(run_dir / "config.json")["config"])}
    names = [*now, *(key for key in before if key not in now)]
    changed = [k for k in names if before.get(k) != now.get(k) and k not in VOLATILE]
    if changed:
        lines = [f"  {key}: {before.get(key)} before, {now.get(key)} now" for key in changed]
        raise ConfigError(
            f"{run_dir} holds a run with other settings:\n" + "\n".join(lines) + "\nRepeat the "
            "old values to go on with it, or choose a new --run-dir."
        )


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat


def _without_secrets(config: dict[str, Any]) -> dict[str, Any]:
    """Redact the URLs among a configuration's data sets."""
    data = {**config["data"], "train": redacted_urls(config["data"]["train"])}
    names = {name: redacted_urls(config["evaluation"][name]) for name in ("train", "test")}
    return {**config, "data": data, "evaluation": {**config["evaluation"], **names}}


def _share_cores(world: World) -> None:
    """Give each rank of this node its part of the cores, unless the user has said otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores() // world.num_local_ranks))


def read_json(file: Path) -> dict[str, Any]:
    """Read one of a run's own files.

    Raises:
        ConfigError: If it is missing or damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}): {file.parent} is no folder of a finished run. Name "
            "the --run-dir of a training run."
        ) from error


def load_run(run_dir: Path) -> Config:
    """Read the resolved configuration of a run.

    Raises:
        ConfigError: If it is missing, or damaged.
    """
    facts = read_json(run_dir / "config.json")
    if not isinstance(facts, dict) or not isinstance(facts.get("config"), dict):
        raise ConfigError(
            f"{run_dir / 'config.json'} is damaged: it has no configuration. Restore the run's "
            "folder."
        )
    return Config.from_dict(facts["config"])


def evaluate(
    run_dir: Path,
    train: str,
    test: str,
    say: Say = print,
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, Any]:
    """Score a run's encoder, the same encoder untrained, and raw pixels; write ``scores.json``.

    Also writes the test features, ``features/h_test.npy`` and ``label_test.npy``, for the report.
    Every rank calls this and takes a part of the features; the scores are rank 0's, the other ranks
    return an empty dictionary.

    Args:
        run_dir: Folder of a training run with a checkpoint.
        train: Labelled data set the probes are fitted on; see :func:`.data_sets.open_data`.
        test: Labelled data set they are scored on.
        say: Told what is being done.
        progress: Told numbers of images of which this rank has taken features.

    Raises:
        ConfigError: If the run has no checkpoint, or the data no labels or other classes.
        ShardError: If the data is missing or damaged.
    """
    started = time.perf_counter()
    config = load_run(run_dir)
    checkpoint = checkpointing.latest(run_dir / "checkpoints")
    if checkpoint is None:
        raise ConfigError(f"{run_dir} has no checkpoint yet: train it first.")
    sets = data_sets.labelled_sets((train, test), config.data)
    trained, untrained = SimCLR.from_config(config), SimCLR.from_config(config)
    load_state(trained, checkpointing.load_weights(checkpoint, ""), f"weights of {checkpoint}")
    world = World.detect()
    device, size, cache = device_of(world), config.views.size, run_dir / "features" / "cache"
    features = {}
    for name, model in {"trained": trained.to(device), "untrained": untrained.to(device)}.items():
        say(f"{name}: features of {len(sets[0])} train and {len(sets[1])} test images")
        features[name] = [
            evaluations.features_of(
                model, s, size, cache, layers=("h",), device=device, progress=progress
            )["h"]
            for s in sets
        ]
    if collectives.rank() > 0:
        return {}
    say(f"pixels of {len(sets[0])} train and {len(sets[1])} test images")
    features["pixels"] = [_pixels(s, size, world) for s in sets]
    scores = {}
    for name, (train_X, test_X) in features.items():
        if name == "trained":
            _save_features(run_dir / "features", test_X)
        say(f"{name}: nearest neighbours")
        knn_top1 = knn.knn_accuracy(train_X, test_X)
        say(f"{name}: linear probe on {train_X.h_XF.shape[1]} features")
        probe = linear.linear_probe(train_X, test_X)
        scores[name] = {
            "linear_top1": probe.top1,
            "linear_l2": probe.l2,
            "knn_top1": knn_top1,
        }
        say(f"{name}: linear {probe.top1:.1%}, kNN {knn_top1:.1%}")
    result = {
        "protocol": {"linear": linear.PROTOCOL, "knn": knn.PROTOCOL},
        "scores": scores,
        "checkpoint": checkpoint.name,
        "num_train": len(sets[0]),
        "num_test": len(sets[1]),
        "num_classes": sets[0].num_classes,
        "class_names": sets[0].class_names,
        "test": redacted_urls(test),
        "seconds": time.perf_counter() - started,
    }
    write_json(run_dir / "scores.json", {**result, **_other_protocols(run_dir)})
    return result


def _pixels(data_set: DataSet, size: int, world: World) -> Features:
    """Return raw pixels as features, float32 in 0..1."""
    batches = evaluation_batches(data_set, size, num_threads=default_threads(world))
    return extract(Pixels(), batches)


def _other_protocols(run_dir: Path) -> dict[str, Any]:
    """Return what other protocols have written into ``scores.json``; each says what it is of."""
    file = run_dir / "scores.json"
    before = read_json(file) if file.exists() else {}
    return {key: before[key] for key in ("protocols",) if key in before}


def _save_features(folder: Path, features: Features) -> None:
    """Keep features for the report."""
    folder.mkdir(exist_ok=True)
    np.save(folder / "h_test.npy", features.h_XF)
    np.save(folder / "label_test.npy", features.label_X)


def report(run_dir: Path, train: str = "", test: str = "") -> Path:
    """Write ``report.json`` and ``report.html`` of a run; return the page's path.

    For the pictures, the data it was trained and evaluated on has to be where it was.

    Args:
        run_dir: Folder of a training run.
        train: Its training data, where that lies elsewhere now or its URL had secrets.
        test: The test data of its scores, likewise.
    """
    config = load_run(run_dir)
    data_set = data_sets.open_data(train or config.data.train, config.data)
    thumbnails = []
    if (run_dir / "scores.json").exists():
        text = test or read_json(run_dir / "scores.json").get("test", "")
        test_set = data_sets.open_data(text, config.data) if text else []
        # Shard sets are shuffled when they are packed: the first rows are a sample of all.
        thumbnails = [test_set[i] for i in range(min(len(test_set), NUM_THUMBNAILS))]
    return write_report(
        run_dir,
        view_pairs=_view_pairs(config, data_set),
        thumbnails=thumbnails,
        note=photos.NOTE if data_set.class_names == photos.CLASS_NAMES else "",
    )


def _view_pairs(config: Config, data_set: DataSet) -> list[ViewPair]:
    """Draw the first epoch's views of a few images, as training saw them."""
    views = (config.views, config.views_second or config.views)
    exact = all(view.colour_model == "exact" for view in views)
    backend = "reference" if exact else config.data.backend
    batch = data_sets.first_batch(config, data_set, backend, NUM_PAIRS, World())
    images = [data_set[int(i)] for i in batch.sample_id_B]
    views = batch.views_VBCHW.permute(0, 1, 3, 4, 2).numpy()
    return list(zip(images, views[0], views[1], strict=True))
