"""The protocols of the field, on a run; each is kept in ``scores.json`` when it is done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastclr import checkpointing, collectives, evaluations, pictures, runs
from fastclr.answers import keep_answers
from fastclr.config import ConfigError
from fastclr.evaluation import (
    finetune,
    forgetting,
    knn,
    layers,
    linear,
    linear_joint,
    linear_lbfgs,
    linear_sgd,
    picture_file,
    ridge,
    score_sheet,
    semi_supervised,
    transfer,
)
from fastclr.evaluation.draws import Int64
from fastclr.evaluation.layers import H
from fastclr.evaluation.scoring import top1
from fastclr.files import write_durably, write_json
from fastclr.subject import Options, Subject, labelled

JSON = dict[str, Any]
SHEET = "scores.md"
_SMALL = 64  # pixels; up to here the authors' settings for CIFAR


class Outcome(NamedTuple):
    """What a protocol found.

    Attributes:
        scores: Numbers by name, 0..1; the first is the one of the table.
        details: What was chosen.
        answer_X: int64 answers to the test images, for comparisons; None if not known.
        label_X: Their labels.
    """

    scores: dict[str, float]
    details: JSON
    answer_X: Int64 | None = None
    label_X: Int64 | None = None


def _nothing(subject: Subject) -> None:
    """What all ranks take together where one works alone."""


class Protocol(NamedTuple):
    """A protocol.

    Attributes:
        settings: Its exact settings, known before it runs.
        run: How it is run, on rank 0.
        take: What all ranks take together before, and the subject keeps.
    """

    settings: Callable[[Subject], JSON]
    run: Callable[[Subject], Outcome]
    take: Callable[[Subject], object] = _nothing


def _quick(subject: Subject) -> Outcome:
    found = subject.quick["scores"]["trained"]
    return Outcome(
        {name: found[name] for name in ("linear_top1", "knn_top1")}, {"l2": found["linear_l2"]}
    )


def _ridge(subject: Subject) -> Outcome:
    probe = ridge.ridge_probe(*subject.features, seed=subject.options.seed)
    return Outcome({"top1": probe.top1}, {"l2": probe.l2})


def _knn(subject: Subject) -> Outcome:
    impl = subject.options.neighbours_by
    return Outcome({"top1": knn.knn_accuracy(*subject.features, impl=impl)}, {})


def _linear_lbfgs(subject: Subject) -> Outcome:
    train, test = subject.features
    subject.say(f"{len(linear_lbfgs.L2_GRID)} fits on {train.h_XF.shape[1]} features")
    probe = linear_lbfgs.lbfgs_probe(train, test, seed=subject.options.seed, device=subject.device)
    return Outcome({"top1": probe.score}, {"l2": probe.l2}, probe.answer_X, test.label_X)


def _layers(subject: Subject) -> Outcome:
    table = subject.layer_scores
    h, z = (next(s for s in table if s.layer == name) for name in (H, table[-1].layer))
    scores = {f"{s.layer}, ridge": s.ridge_top1 for s in (h, z)}
    scores |= {f"{s.layer}, kNN": s.knn_top1 for s in (h, z)}
    return Outcome(scores, {"table": [s._asdict() for s in table]})


def _forgetting(subject: Subject) -> Outcome:
    table = subject.forgotten
    scores = {f"{task}, {name}": v for task, _, top1 in table for name, v in top1.items()}
    return Outcome(scores, {"table": [row._asdict() for row in table]})


def _linear_joint(subject: Subject) -> Outcome:
    test = subject.features[1]
    answer_X = linear_joint.saved_answers(_joint_probe(subject), test)
    return Outcome({"top1": top1(answer_X, test.label_X)}, {}, answer_X, test.label_X)


def _joint_probe(subject: Subject) -> dict[str, torch.Tensor]:
    """Return the classifier that was trained beside the encoder."""
    found = checkpointing.load_probe(subject.checkpoint)
    if found is None:
        raise ConfigError(
            f"{subject.checkpoint} has no probe: only a run with --evaluation.joint-probe trains "
            "one beside its encoder. Leave linear-joint out, or train such a run."
        )
    return found


def _pictures(subject: Subject) -> Outcome:
    made = pictures.make(subject)
    numbers = {name: layer.numbers for name, layer in made.layers.items()}
    return Outcome({"linear_top1": made.facts["linear_top1"]}, {"numbers": numbers})


def _sgd_settings(subject: Subject) -> linear_sgd.SGDSettings:
    is_small = subject.config.views.size <= _SMALL
    found = asdict(linear_sgd.SMALL_IMAGES if is_small else linear_sgd.LARGE_IMAGES)
    return linear_sgd.SGDSettings(**{**found, "seed": subject.options.seed})


def _linear_sgd(subject: Subject) -> Outcome:
    settings, images = _sgd_settings(subject), subject.images(subject.train)
    encoder, num_images = subject.model.encoder, len(subject.train)
    test = subject.features[1]
    if subject.options.cached_views:
        batches = linear_sgd.cached_views(subject.crops, settings)
    else:
        batches = linear_sgd.encoded(encoder, images.views, num_images, settings, subject.device)
    subject.say(f"{settings.epochs} epochs of a linear classifier")
    probe = linear_sgd.sgd_probe(batches, images.label_X, test, settings, device=subject.device)
    details = {"first_loss": probe.losses[0], "last_loss": probe.losses[-1]}
    return Outcome({"top1": probe.score}, details, probe.answer_X, test.label_X)


def _tuning_settings(subject: Subject, fraction: float) -> finetune.FinetuneSettings:
    num_images, epochs = len(_subset(subject, fraction)), subject.options.finetune_epochs
    found = semi_supervised.settings_for(fraction, num_images, seed=subject.options.seed)
    return replace(found, epochs=epochs) if fraction == 1 and epochs else found


def _subset(subject: Subject, fraction: float) -> Int64:
    """Return the images with labels, from the list in the run's folder once there is one."""
    label_X, seed = subject.train.label_N, subject.options.seed
    if fraction == 1:
        return np.arange(len(label_X))
    file = subject.run_dir / "subsets" / f"{subject.train.digest[:12]}-{fraction:g}-{seed}.json"
    if file.exists():
        return semi_supervised.load_subset(file, label_X)
    rows = semi_supervised.balanced_subset(label_X, fraction, seed)
    file.parent.mkdir(exist_ok=True)
    semi_supervised.save_subset(file, rows, label_X, fraction=fraction, seed=seed)
    return rows


def _tuned(subject: Subject, fraction: float) -> Outcome:
    """Fine-tune on a share of the labels, from the trained and from untrained weights."""
    rows, settings = _subset(subject, fraction), _tuning_settings(subject, fraction)
    train, test = subject.images(subject.train), subject.images(subject.test)
    known_C = np.unique(train.label_X[rows])
    scores: dict[str, float] = {}
    answers: dict[str, Int64] = {}
    for name in ("trained", "untrained"):
        subject.say(f"{name}: {settings.epochs} epochs of fine-tuning on {len(rows)} images")
        model = finetune.Classifier(*subject.network(trained=name == "trained"), len(known_C))
        finetune.finetune(model, train, rows, known_C, settings, subject.device)
        every = np.arange(len(test.label_X))
        answers[name] = finetune.answers(model, test, every, known_C, subject.device)
        scores["top1" if name == "trained" else "untrained_top1"] = top1(
            answers[name], test.label_X
        )
    return Outcome(scores, {"num_images": len(rows)}, answers["trained"], test.label_X)


def _tuning(fraction: float) -> Protocol:
    """Return the protocol of a share of the labels."""

    def settings(subject: Subject) -> JSON:
        return {
            "text": finetune.PROTOCOL,
            "fraction": fraction,
            "head_layers": subject.options.head_layers,
            **asdict(_tuning_settings(subject, fraction)),
        }

    return Protocol(settings, lambda subject: _tuned(subject, fraction))


def _features(subject: Subject) -> object:
    """Let all ranks take the representations."""
    return subject.features


# In the order that `all` takes them; `transfer` becomes an entry for each row of each set.
PROTOCOLS: dict[str, Protocol] = {
    "quick": Protocol(
        lambda s: {"text": f"{linear.PROTOCOL} {knn.PROTOCOL}"}, _quick, lambda s: s.quick
    ),
    "ridge": Protocol(
        lambda s: {"text": ridge.PROTOCOL, "seed": s.options.seed}, _ridge, _features
    ),
    "knn": Protocol(
        lambda s: {"text": knn.PROTOCOL, "neighbours_by": s.options.neighbours_by}, _knn, _features
    ),
    "linear-lbfgs": Protocol(
        lambda s: {"text": linear_lbfgs.PROTOCOL, "seed": s.options.seed}, _linear_lbfgs, _features
    ),
    "linear-sgd": Protocol(
        lambda s: {
            "text": linear_sgd.PROTOCOL,
            "cached_views": s.options.cached_views,
            **asdict(_sgd_settings(s)),
        },
        _linear_sgd,
        lambda s: (s.features, s.crops),
    ),
    "linear-joint": Protocol(lambda s: {"text": linear_joint.PROTOCOL}, _linear_joint, _features),
    "semi-1": _tuning(0.01),
    "semi-10": _tuning(0.1),
    "layers": Protocol(lambda s: {"text": layers.PROTOCOL}, _layers, lambda s: s.layer_scores),
    "forgetting": Protocol(
        lambda s: {"text": forgetting.PROTOCOL, "most_images": evaluations.FORGETTING_IMAGES},
        _forgetting,
        lambda s: s.forgotten,
    ),
    "pictures": Protocol(
        lambda s: {
            "text": pictures.PROTOCOL,
            "neighbours_by": s.options.neighbours_by,
            **asdict(pictures.settings_of(s)),
        },
        _pictures,
        lambda s: (s.features, s.layer_features(pictures.chosen_layers(s))),
    ),
    "finetune": _tuning(1.0),
}
NAMES = (*PROTOCOLS, "transfer", "all")


def _transfer_protocols(options: Options) -> dict[str, Protocol]:
    """Return a protocol for each row of each set."""
    found: dict[str, Protocol] = {}
    for text in options.transfer:
        path, _, metric = text.rpartition(":")
        if not path or "/" in metric:  # no metric, perhaps a URL
            path, metric = text, "top1"
        name = Path(path).name
        if f"transfer/{name}/linear" in found:
            raise ConfigError(f"two transfer sets are called {name!r}: rename a folder.")
        for row in transfer.ROWS:
            found[f"transfer/{name}/{row}"] = _transfer_row(name, path, metric, row)
    return found


def _transfer_row(name: str, path: str, metric: str, row: str) -> Protocol:
    texts = (f"{path}/train", f"{path}/test")

    def settings(subject: Subject) -> JSON:
        sets = labelled(texts, subject.config)
        return {
            "text": transfer.PROTOCOL,
            "metric": metric,
            "steps": subject.options.transfer_steps * (2 if row == "random_init" else 1),
            "seed": subject.options.seed,
            "data": [s.digest for s in sets],
        }

    def run(subject: Subject) -> Outcome:
        train, test = (subject.images(s) for s in labelled(texts, subject.config))
        width = subject.network(trained=False)[1]
        networks = [
            transfer.Network(lambda t=t: subject.network(trained=t)[0], width)
            for t in (True, False)
        ]
        found = transfer.transfer_row(
            row,
            transfer.TransferSet(name, metric, train, test),
            *networks,
            steps=settings(subject)["steps"] or None,
            seed=subject.options.seed,
            device=subject.device,
            say=subject.say,
        )
        return Outcome({metric: found.score}, found.chosen, found.answer_X, test.label_X)

    return Protocol(settings, run)


def chosen_protocols(names: Sequence[str], options: Options) -> dict[str, Protocol]:
    """Return the named protocols in the order they are run.

    Raises:
        ConfigError: If one is unknown, or transfer has no set.
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise ConfigError(f"protocol {unknown[0]!r} is unknown: choose from {', '.join(NAMES)}.")
    found = {name: p for name, p in PROTOCOLS.items() if name in names or "all" in names}
    if "transfer" in names and not options.transfer:
        raise ConfigError(
            "protocol transfer has no data set: name folders with the shard sets train and test "
            "behind --transfer."
        )
    if "transfer" in names or "all" in names:
        found |= _transfer_protocols(options)
    return found


def score(subject: Subject, names: Sequence[str], *, again: bool = False) -> dict[str, JSON]:
    """Run protocols that have not been run on this checkpoint and data with these settings.

    Each is merged into ``scores.json`` as soon as it is done, under ``protocols``, and its answers
    are kept in ``answers/``; a call that was interrupted is repeated, and goes on.

    Args:
        subject: The run and the images.
        names: Of :data:`NAMES`.
        again: Also run those that have been.

    Returns:
        The entries of ``scores.json`` that were asked for.

    Raises:
        ConfigError: If a protocol cannot be run; those before it are kept.
        FloatingPointError: If a feature or a loss is not finite.
        ShardError: If data is damaged.
    """
    chosen = chosen_protocols(names, subject.options)
    has_probe = checkpointing.load_probe(subject.checkpoint) is not None
    if "linear-joint" in chosen and "linear-joint" not in names and not has_probe:
        subject.say("linear-joint: left out, no probe was trained beside this encoder")
        del chosen["linear-joint"]
    with collectives.together():
        if collectives.rank() == 0:
            _read_entries(subject.run_dir)  # a damaged file is told before hours of work
    for name, protocol in chosen.items():
        started, settings = time.perf_counter(), None
        with collectives.together():
            if collectives.rank() == 0:
                settings = _settings_to_do(subject, name, protocol, again)
        settings = collectives.from_first(settings)
        if settings is None:
            continue
        with collectives.together(), evaluations.sharing_cores():
            protocol.take(subject)
        with collectives.together():
            if collectives.rank() == 0:
                found = protocol.run(subject)
                _keep(subject, name, found, settings, (time.perf_counter() - started) / 60)
    entries = _read_entries(subject.run_dir)
    return {name: entries[name] for name in chosen}


def _of(subject: Subject) -> JSON:
    """Say what scores are of."""
    return {
        "checkpoint": subject.checkpoint.name,
        "train": subject.train.digest,
        "test": subject.test.digest,
    }


def _settings_to_do(subject: Subject, name: str, protocol: Protocol, again: bool) -> JSON | None:
    """Return a protocol's settings; None if it has been run with them."""
    # As JSON gives it back, so that it can be compared.
    settings = json.loads(json.dumps(protocol.settings(subject)))
    before = _read_entries(subject.run_dir).get(name, {})
    same = before.get("settings") == settings and before.get("of") == _of(subject)
    if (
        same
        and not again
        and (name != "pictures" or (subject.run_dir / picture_file.FILE).exists())
    ):
        subject.say(f"{name}: done before")
        return None
    subject.say(f"{name}: begins")
    return settings


def _keep(subject: Subject, name: str, found: Outcome, settings: JSON, minutes: float) -> None:
    """Keep what a protocol found: answers, scores, and the table of all scores."""
    of = _of(subject)
    if found.answer_X is not None and found.label_X is not None:
        metric = next(iter(found.scores))
        keep_answers(subject.run_dir, name, found.answer_X, found.label_X, of["test"], metric)
    entry = {
        "scores": found.scores,
        "chosen": found.details,
        "minutes": minutes,
        "settings": settings,
        "of": of,
    }
    _merge(subject.run_dir, name, entry)
    sheet = score_sheet.markdown(_read_entries(subject.run_dir))
    write_durably(subject.run_dir / SHEET, sheet)


def _read_entries(run_dir: Path) -> dict[str, JSON]:
    """Return what ``scores.json`` has of each protocol."""
    file = run_dir / "scores.json"
    found = runs.read_json(file).get("protocols", {}) if file.exists() else {}
    if not isinstance(found, dict) or not all(isinstance(e, dict) for e in found.values()):
        raise ConfigError(f"{file} is damaged: delete it, and all is scored anew.")
    return found


def _merge(run_dir: Path, name: str, entry: JSON) -> None:
    """Put an entry into ``scores.json``; the file is whole whenever the process stops."""
    file = run_dir / "scores.json"
    before = runs.read_json(file) if file.exists() else {}
    write_json(file, {**before, "protocols": {**before.get("protocols", {}), name: entry}})
