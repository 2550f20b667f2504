"""Export of a run: files, card, and the proof that the library computes our features."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fastclr import checkpointing, runs
from fastclr.config import Config, ConfigError, EncoderConfig
from fastclr.encoders import Encoder
from fastclr.export import card
from fastclr.export.formats import FORMATS, Features, Subject, new_encoder, read_weights
from fastclr.facts import now, versions
from fastclr.files import sync
from fastclr.foreign_weights import INPUT_UNIT
from fastclr.simclr import SimCLR

TOLERANCE = 1e-5
CARD, FACTS = "README.md", "encoder.json"


def export_run(run_dir: Path, to: str, out: Path, data_license: str = "") -> Path:
    """Write the newest checkpoint's encoder in another format, with a card beside it.

    The files are read back by the library they are for, and its features compared with ours, before
    the folder gets its name.

    Args:
        run_dir: Folder of a training run.
        to: Key of :data:`FORMATS`.
        out: Folder that is made.
        data_license: Licence of the images it was trained on, as it shall stand in the card.

    Returns:
        ``out``.

    Raises:
        ConfigError: If the format is unknown or cannot hold the encoder, the run has no checkpoint,
            the folder exists, or the features read back differ by more than 1e-5 times the largest
            feature (or 1, if that is smaller).
    """
    if to not in FORMATS:
        raise ConfigError(f"format {to!r} is unknown: choose from {', '.join(FORMATS)}.")
    if out.exists():
        raise ConfigError(f"{out} exists: nothing is written over. Give a new --out.")
    config = runs.load_run(run_dir)
    checkpoint = checkpointing.latest(run_dir / "checkpoints")
    if checkpoint is None:
        raise ConfigError(f"{run_dir} has no checkpoint yet: train it first.")
    subject = _subject(config, checkpoint)
    _refuse_unfit(subject, to)
    facts = _facts(run_dir, config, checkpoint, subject, to, data_license)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        chosen = FORMATS[to]
        chosen.write(subject, partial)
        (partial / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        text = card.markdown(facts, chosen.lines(subject))
        (partial / CARD).write_text(text, encoding="utf-8")
        _compare(subject, chosen.read(subject, partial), to)
        for path in (*partial.rglob("*"), partial):
            sync(path)
        partial.replace(out)
        sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def load(folder: Path | str) -> Encoder:
    """Load an export of the format ``safetensors``, ready for inference.

    Args:
        folder: Has ``encoder.safetensors`` and ``encoder.json``.

    Raises:
        ConfigError: If it is no such folder.
    """
    try:
        facts = json.loads((Path(folder) / FACTS).read_text(encoding="utf-8"))
        architecture = facts["architecture"]
        names = ("name", "width", "stem")
        config = EncoderConfig(**{name: architecture[name] for name in names})
        encoder = new_encoder(config, architecture["batch_norm"] == "none")
        return read_weights(encoder, Path(folder))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"{folder} is no export of the format safetensors ({error}): make one with "
            "`fastclr export RUN --to safetensors`."
        ) from error


def _subject(config: Config, checkpoint: Path) -> Subject:
    """Load the encoder of a checkpoint."""
    architecture = replace(config.encoder, activation_checkpointing=False)
    encoder = SimCLR.from_config(replace(config, encoder=architecture)).encoder
    assert isinstance(encoder, Encoder)
    encoder.load_state_dict(checkpointing.load_weights(checkpoint, "encoder."))
    is_group_norm = config.batch_norm == "none"
    return Subject(encoder.float().eval(), architecture, is_group_norm, config.views.size)


def _refuse_unfit(subject: Subject, to: str) -> None:
    """Raise ConfigError if the format cannot hold the encoder; say which can."""
    if reason := FORMATS[to].unfit(subject):
        fitting = [name for name, f in FORMATS.items() if not f.unfit(subject)]
        raise ConfigError(f"no export to {to}: {reason}. Formats that fit: {', '.join(fitting)}.")


def _facts(
    run_dir: Path, config: Config, checkpoint: Path, subject: Subject, to: str, data_license: str
) -> dict[str, Any]:
    """Gather what the card says."""
    saved = _read_json(run_dir / "config.json")
    scores, because = _scores(run_dir, checkpoint)
    return {
        "format": to,
        "architecture": {
            "name": config.encoder.name,
            "width": config.encoder.width,
            "stem": config.encoder.stem,
            "batch_norm": config.batch_norm,
            "input_size": config.views.size,
            "sides_vary": subject.sides_vary,
        },
        "feature_dim": subject.encoder.feature_dim,
        "input": {"range": [0.0, 1.0], "mean": [0.0] * 3, "std": [1.0] * 3, "is": INPUT_UNIT},
        "config": _recipe(config),
        "checkpoint": checkpoint.name,
        "data": _without_folders(saved.get("data", {}).get("train", {})),
        "data_license": data_license or "not stated",
        "scores": scores,
        "no_scores_because": because,
        "versions": versions(),
        "trained_with": saved.get("versions", {}),
        "exported": now(),
    }


def _scores(run_dir: Path, checkpoint: Path) -> tuple[Mapping[str, Any] | None, str]:
    """Return the run's scores if they are of this checkpoint, or why not."""
    file = run_dir / "scores.json"
    if not file.exists():
        return None, "This encoder has not been scored (fastclr evaluate)."
    scores = _read_json(file)
    if scores.get("checkpoint") != checkpoint.name:
        return None, (
            f"The run's scores are of {scores.get('checkpoint')}, this is {checkpoint.name}."
        )
    return _without_folders(scores), ""


def _recipe(config: Config) -> dict[str, Any]:
    """Return what the encoder is a function of; not where things lay, for a card is published."""
    settings: dict[str, Any] = asdict(config)
    for name in runs.VOLATILE:
        *holders, key = name.split(".")
        holder = settings
        for part in holders:
            holder = holder[part]
        del holder[key]
    settings["initial_weights"] = Path(config.initial_weights or config.start_from).name
    return {key: value for key, value in settings.items() if value != {}}


def _without_folders(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Shorten paths and URLs, which may hold names and keys, to their last part."""
    cut = {k: Path(str(facts[k]).partition("?")[0]).name for k in ("path", "test") if k in facts}
    return {**facts, **cut}


def _read_json(file: Path) -> dict[str, Any]:
    """Read one of the run's own files."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}): the card would not be true. Write it again."
        ) from error


@torch.inference_mode()
def _compare(subject: Subject, theirs: Features, to: str) -> None:
    """Raise ConfigError unless the features read back are ours."""
    for images_NCHW in batches(subject):
        expected_NF = subject.encoder(images_NCHW)
        found_NF = theirs(images_NCHW)
        scale = max(1.0, float(expected_NF.abs().max()))
        same_shape = found_NF.shape == expected_NF.shape
        error = float((found_NF - expected_NF).abs().max()) if same_shape else float("nan")
        if not error <= TOLERANCE * scale:  # NaN is refused too
            raise ConfigError(
                f"the export to {to} read back gives {tuple(found_NF.shape)} features that differ "
                f"by {error:.1e} from ours {tuple(expected_NF.shape)} of at most {scale:.1e}: it "
                "is not kept. Export to another format, and report this."
            )


def batches(subject: Subject) -> list[torch.Tensor]:
    """Return fixed images: three, one, and two of unequal sides if those may vary."""
    generator = torch.Generator().manual_seed(0)
    size = subject.size
    shapes = [(3, size, size), (1, size, size)]
    if subject.sides_vary:
        shapes.append((2, size + 24, size))
    return [torch.rand(n, 3, h, w, generator=generator) for n, h, w in shapes]
