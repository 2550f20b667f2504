"""What the commands do, importable: train a run, evaluate it, report it."""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastclr import checkpointing, ds_config, losses
from fastclr.batch import Batch
from fastclr.config import Config, ConfigError
from fastclr.engine import device_of
from fastclr.evaluation import knn, linear, online
from fastclr.evaluation.features import Features, Pixels, extract
from fastclr.facts import hardware, now, num_cores, redacted, versions
from fastclr.files import write_json
from fastclr.interruption import Interruption
from fastclr.optim import LARS
from fastclr.report import ViewPair, write_report
from fastclr.simclr import SimCLR
from fastclr.trainer import Summary, Trainer
from fastclr.world import World
from pipelines import ShardSet, SimCLRPolicy, make_loader, photos
from pipelines.backends import resolve_backend
from pipelines.evaluation_views import evaluation_batches
from pipelines.loader import Loader, default_threads
from pipelines.memory import InMemory

logger = logging.getLogger(__name__)

Say = Callable[[str], None]
NUM_PAIRS, NUM_THUMBNAILS, NUM_WATCHED = 12, 1000, 256

# May change between the starts of one run; everything else is what the run is.
VOLATILE = (
    "run_dir", "log_every", "checkpoint_every", "keep_checkpoints", "keep_every", "start_from",
    "initial_weights", "data.train", "data.num_threads", "data.prefetch", "data.in_memory",
    "data.on_damage", "data.most_damaged", "evaluation.test", "evaluation.train",
    "evaluation.every_epochs", "evaluation.most_images", "faults.non_finite",
    "faults.most_skipped", "faults.watchdog_seconds",
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
    """
    world = World.detect()
    _set_up_logging()
    config, ds = ds_config.resolve(config, ds_config.read(ds_path), world)
    config = _settle_backend(config, device_of(world))
    shard_set = ShardSet.open(config.data.train)
    run_dir = Path(config.run_dir)
    _refuse_another_run(run_dir, config)
    _share_cores(world)
    loader = make_loader(
        _decoded(config, shard_set, world) if config.data.in_memory else shard_set,
        _policies(config),
        micro_batch_size=ds_config.images_per_rank(ds, world),
        seed=config.seed,
        backend=config.data.backend,
        world=world,
        device=device_of(world),
        num_threads=config.data.num_threads,
        prefetch=config.data.prefetch,
        on_damage=config.data.on_damage,
        most_damaged=config.data.most_damaged,
    )
    trainer = _trainer(config, ds, loader, shard_set, interruption)
    trainer.check(loader)
    facts = {
        "config": asdict(config),
        "ds_config": redacted(ds),
        "command": shlex.join(command),
        "versions": versions(),
        "hardware": hardware(_device_name(trainer.device)),
        "data": {"train": _data_facts(shard_set)},
        "started": now(),
    }
    if world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / "config.json", facts)
        print(
            f"training {config.encoder.name} on {len(shard_set)} images, views by "
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
    return summary


def _settle_backend(config: Config, device: torch.device) -> Config:
    """Put the back-end that ``auto`` means here into the configuration: it is what the run is."""
    backend = resolve_backend(config.data.backend, device, config.data.in_memory)
    return replace(config, data=replace(config.data, backend=backend))


def _policies(config: Config) -> list[SimCLRPolicy]:
    """Return the augmentation of each of the two views."""
    views = (config.views, config.views_second or config.views)
    return [SimCLRPolicy(**asdict(view)) for view in views]


def _decoded(config: Config, shard_set: ShardSet, world: World) -> InMemory:
    """Decode all images before the run."""
    threads = config.data.num_threads or default_threads(world)
    with Progress(console=Console(stderr=True), disable=not world.is_main) as progress:
        task = progress.add_task("decoding all images", total=len(shard_set))
        return InMemory(
            shard_set,
            num_threads=threads,
            num_local_ranks=world.num_local_ranks,
            on_damage=config.data.on_damage,
            most_damaged=config.data.most_damaged,
            progress=lambda count: progress.advance(task, count),
        )


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
    shard_set: ShardSet,
    interruption: Interruption | None,
) -> Trainer:
    """Build model, loss, optimizer and trainer."""
    model = SimCLR.from_config(config)
    if config.initial_weights:
        _load_initial_weights(model, Path(config.initial_weights))
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
        evaluation=_online_evaluation(config, shard_set, loader.world),
        evaluate_every=config.evaluation.every_epochs * loader.batches_per_epoch,
        faults=config.faults,
        interruption=interruption,
    )


def _online_evaluation(
    config: Config, shard_set: ShardSet, world: World
) -> online.OnlineEvaluation | None:
    """Score held-out images while training, and watch some training images for collapse."""
    settings = config.evaluation
    if not settings.test:
        return None
    found = labelled_sets(Path(settings.train or config.data.train), Path(settings.test))
    sets = [_image_set(s, config.views.size, settings.most_images, world) for s in found]
    pairs = _first_batch(config, shard_set, config.data.backend, NUM_WATCHED, world)
    return online.OnlineEvaluation(*sets, pairs_VBCHW=pairs.views_VBCHW)


def _image_set(shard_set: ShardSet, size: int, most: int, world: World) -> online.ImageSet:
    """Describe the first images of a shard set to the online evaluation."""
    return online.ImageSet(
        name=str(shard_set.path),
        label_X=shard_set.label_N[:most],
        num_classes=shard_set.num_classes,
        batches=lambda: evaluation_batches(shard_set, size, world=world, limit=most),
    )


def _load_initial_weights(model: SimCLR, file: Path) -> None:
    """Load a whole model, or an encoder alone.

    Raises:
        ConfigError: If the file is no safetensors file, or its tensors are not the model's.
    """
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"initial_weights {file} cannot be read ({error}): give a safetensors file, e.g. "
            "RUN/checkpoints/step-*/model.safetensors."
        ) from error
    whole = any(key.startswith("projection_head.") for key in state)
    target = model if whole or any(k.startswith("encoder.") for k in state) else model.encoder
    if target is model and not whole:
        state = {key.removeprefix("encoder."): value for key, value in state.items()}
        target = model.encoder
    load_state(target, state, f"initial_weights {file}")


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
    before = _flat(read_json(run_dir / "config.json")["config"])
    now = _flat(json.loads(json.dumps(asdict(config))))
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


def _share_cores(world: World) -> None:
    """Give each rank of this node its part of the cores, unless the user has said otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores() // world.num_local_ranks))


def _data_facts(shard_set: ShardSet) -> dict[str, Any]:
    """Say which data it was."""
    return {
        "path": str(shard_set.path),
        "num_samples": len(shard_set),
        "num_classes": shard_set.num_classes,
        "digest": shard_set.digest,
    }


def _device_name(device: torch.device) -> str:
    """Name the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def read_json(file: Path) -> dict[str, Any]:
    """Read one of a run's own files.

    Raises:
        ConfigError: If it is missing or damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}): {file.parent} is no folder of a finished run. Name "
            "the --run-dir of a training run."
        ) from error


def load_run(run_dir: Path) -> Config:
    """Read the resolved configuration of a run."""
    return Config.from_dict(read_json(run_dir / "config.json")["config"])


def evaluate(run_dir: Path, train_path: Path, test_path: Path, say: Say = print) -> dict[str, Any]:
    """Score a run's encoder, the same encoder untrained, and raw pixels; write ``scores.json``.

    Also writes the test features, ``features/h_test.npy`` and ``label_test.npy``, for the report.

    Args:
        run_dir: Folder of a training run with a checkpoint.
        train_path: Labelled shard set the probes are fitted on.
        test_path: Labelled shard set they are scored on.
        say: Told what is being done.

    Raises:
        ConfigError: If the run has no checkpoint, or the data no labels or other classes.
        ShardError: If the data is missing or damaged.
    """
    started = time.perf_counter()
    config = load_run(run_dir)
    checkpoint = checkpointing.latest(run_dir / "checkpoints")
    if checkpoint is None:
        raise ConfigError(f"{run_dir} has no checkpoint yet: train it first.")
    sets = labelled_sets(train_path, test_path)
    trained, untrained = SimCLR.from_config(config).encoder, SimCLR.from_config(config).encoder
    load_state(
        trained, checkpointing.load_weights(checkpoint, "encoder."), f"weights of {checkpoint}"
    )
    device = device_of(World())
    scores = {}
    for name, encoder in {"trained": trained, "untrained": untrained, "pixels": Pixels()}.items():
        say(f"{name}: features of {len(sets[0])} train and {len(sets[1])} test images")
        train, test = (
            extract(encoder.to(device), evaluation_batches(s, config.views.size), device)
            for s in sets
        )
        if name == "trained":
            _save_features(run_dir / "features", test)
        say(f"{name}: nearest neighbours")
        knn_top1 = knn.knn_accuracy(train, test)
        say(f"{name}: linear probe on {train.h_XF.shape[1]} features")
        probe = linear.linear_probe(train, test)
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
        "test": str(test_path),
        "seconds": time.perf_counter() - started,
    }
    write_json(run_dir / "scores.json", {**result, **_other_protocols(run_dir)})
    return result


def _other_protocols(run_dir: Path) -> dict[str, Any]:
    """Return what other protocols have written into ``scores.json``; each says what it is of."""
    file = run_dir / "scores.json"
    before = read_json(file) if file.exists() else {}
    return {key: before[key] for key in ("protocols",) if key in before}


def labelled_sets(*paths: Path) -> list[ShardSet]:
    """Open shard sets that have the same classes."""
    sets = [ShardSet.open(path) for path in paths]
    for shard_set in sets:
        if shard_set.label_N.min() < 0:
            raise ConfigError(f"{shard_set.path} has images without a label: probes need labels.")
        if shard_set.class_names != sets[0].class_names:
            raise ConfigError(
                f"{sets[0].path} has the classes {sets[0].class_names}, {shard_set.path} "
                f"{shard_set.class_names}: a probe of one says nothing of the other."
            )
    return sets


def _save_features(folder: Path, features: Features) -> None:
    """Keep features for the report."""
    folder.mkdir(exist_ok=True)
    np.save(folder / "h_test.npy", features.h_XF)
    np.save(folder / "label_test.npy", features.label_X)


def report(run_dir: Path) -> Path:
    """Write ``report.json`` and ``report.html`` of a run; return the page's path.

    The shards it was trained and evaluated on have to be where they were, for the pictures.
    """
    config = load_run(run_dir)
    shard_set = ShardSet.open(config.data.train)
    thumbnails = []
    if (run_dir / "scores.json").exists():
        scores = read_json(run_dir / "scores.json")
        test = ShardSet.open(scores["test"]) if "test" in scores else []
        # Shard sets are shuffled when they are packed: the first rows are a sample of all.
        thumbnails = [test[i] for i in range(min(len(test), NUM_THUMBNAILS))]
    return write_report(
        run_dir,
        view_pairs=_view_pairs(config, shard_set),
        thumbnails=thumbnails,
        note=photos.NOTE if shard_set.class_names == photos.CLASS_NAMES else "",
    )


def _view_pairs(config: Config, shard_set: ShardSet) -> list[ViewPair]:
    """Draw the first epoch's views of a few images, as training saw them."""
    batch = _first_batch(config, shard_set, "reference", NUM_PAIRS, World())
    images = [shard_set[int(i)] for i in batch.sample_id_B]
    views = batch.views_VBCHW.permute(0, 1, 3, 4, 2).numpy()
    return list(zip(images, views[0], views[1], strict=True))


def _first_batch(
    config: Config, shard_set: ShardSet, backend: str, num_images: int, world: World
) -> Batch:
    """Return this rank's part of the first images of epoch 0, as training sees them."""
    loader = make_loader(
        shard_set,
        _policies(config),
        micro_batch_size=max(1, min(num_images, len(shard_set)) // world.num_ranks),
        seed=config.seed,
        backend=backend,
        world=world,
        on_damage=config.data.on_damage,
        most_damaged=config.data.most_damaged,
    )
    return next(iter(loader))
