"""Assemble `report.json` and `report.html` of a finished run from the files it left behind."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from scipy.stats import binomtest

from fastclr.evaluation import linear_joint, picture_file, ridge
from fastclr.files import write_durably, write_json
from fastclr.report import (
    charts,
    picture_sections,
    quick_map,
    reading,
    score_sections,
    template,
)
from fastclr.report.template import Markup, fill

ViewPair: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]

_CRISP_PIXELS, _VIEW_PIXELS = 64, 224


def write_report(
    run_dir: Path,
    *,
    view_pairs: Sequence[ViewPair] = (),
    thumbnails: Sequence[np.ndarray] = (),
    note: str = "",
) -> Path:
    """Write `report.json` (schema version 1) and `report.html` into a finished run directory.

    The page is one file that needs no network. Without `scores.json` it says how to make it.

    Args:
        run_dir: Folder with `config.json`, `metrics.jsonl` and `summary.json`; `scores.json` and
            `features/{h,label}_test.npy` where the run was evaluated; `pictures.npz` where pictures
            were made; `evaluations.jsonl` where it was evaluated while training.
        view_pairs: (source, view 0, view 1), each uint8 (H, W, 3) of any size, for the sheet of
            augmented views; without them there is no sheet.
        thumbnails: uint8 (H, W, 3); thumbnail i shows row i of `h_test.npy`. With fewer of them
            than rows, t-SNE uses the first rows only. `pictures.npz` has thumbnails of its own.
        note: What the reader has to know before the numbers, shown above them.

    Returns:
        Path of `report.html`.

    Raises:
        ConfigError: If a file is missing or malformed; names the file, the line and the remedy.
    """
    run_dir = Path(run_dir)
    record = reading.read_object(run_dir / "config.json")
    summary = reading.read_object(run_dir / "summary.json")
    metrics = reading.read_metrics(run_dir / "metrics.jsonl")
    evaluations = reading.read_evaluations(run_dir / "evaluations.jsonl")
    has_scores = reading.has_scores(run_dir / "scores.json")
    scores = reading.read_object(run_dir / "scores.json") if has_scores else None
    protocols = reading.read_protocols(run_dir / "scores.json")
    pictures = picture_file.load(run_dir)
    report = _report(record, summary, scores, protocols)
    body = [
        _header(run_dir, record, summary, scores),
        fill(template.NOTE, note=note) if note else Markup(),
        _scores(scores) if scores else fill(template.NO_SCORES, run=shlex.quote(str(run_dir))),
        score_sections.section(protocols) if protocols else Markup(),
        _learning(record["config"], metrics),
        _evaluations(evaluations) if evaluations else Markup(),
        _throughput(summary, metrics),
        _views(view_pairs) if view_pairs else Markup(),
        *(
            picture_sections.sections(pictures)
            if pictures
            else [quick_map.section(run_dir / "features", scores, thumbnails)]
        ),
        _provenance(record, summary),
    ]
    html = template.page(run_dir.resolve().name, body)
    write_json(run_dir / "report.json", report)
    write_durably(run_dir / "report.html", html)
    return run_dir / "report.html"


def _report(
    record: Mapping, summary: Mapping, scores: Mapping | None, protocols: Mapping
) -> dict[str, Any]:
    """Return the content of `report.json`; `scores` is null for a run without evaluation."""
    kept = ("config", "ds_config", "versions", "hardware", "command", "started")
    return {
        "schema_version": 1,
        "scores": scores and scores["scores"],
        "protocols": {
            name: {key: entry[key] for key in ("scores", "minutes")}
            for name, entry in protocols.items()
        },
        "images_per_second": summary["images_per_second"],
        "data_wait_fraction": summary["data_wait_fraction"],
        "minutes": summary["training_seconds"] / 60,
        **{key: record[key] for key in kept},
        "ended": summary["ended"],
    }


def _header(run_dir: Path, record: Mapping, summary: Mapping, scores: Mapping | None) -> Markup:
    """Return the title, the run in one line, and the key numbers."""
    data, hardware = record["data"]["train"], record["hardware"]
    minutes = f"{summary['training_seconds'] / 60:,.1f}"
    device = hardware["processor"] if hardware["device"] == "cpu" else hardware["device"]
    ranks = "1 rank" if summary["num_ranks"] == 1 else f"{summary['num_ranks']} ranks"
    line = (
        f"{record['config']['encoder']['name']} on {'/'.join(Path(data['path']).parts[-2:])} "
        f"({data['num_samples']:,} images) · {summary['images']:,} images seen in {minutes} minutes"
        f" · {ranks} on {device} ({hardware['cores']} CPU cores)"
    )
    if damaged := summary.get("damaged_samples"):  # older runs did not count them
        line += f" · {damaged:,} damaged images replaced by others"
    numbers = [
        ("images/s", f"{summary['images_per_second']:,.0f}", "source images, two views each"),
        ("data wait", f"{summary['data_wait_fraction']:.1%}", "of the time spent in training"),
        ("minutes of training", minutes, f"{summary['epochs']:,.1f} epochs"),
    ]
    if scores:
        numbers = _score_numbers(scores["scores"]) + numbers
    cards = [
        {"label": label, "value": value, "detail": detail, "kind": "lead" if "top" in label else ""}
        for label, value, detail in numbers
    ]
    cards_markup = template.fill_each(template.CARD, cards)
    name = run_dir.resolve().name
    return fill(template.HEADER, name=name, summary=line, cards=cards_markup)


def _score_numbers(scores: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str, str]]:
    """Return label, value and gain over the baselines of both scores."""
    numbers = []
    for label, key in (("linear top-1", "linear_top1"), ("kNN top-1", "knn_top1")):
        value = scores["trained"][key]
        gains = [100 * (value - scores[baseline][key]) for baseline in ("untrained", "pixels")]
        detail = f"{gains[0]:+.1f} points over untrained, {gains[1]:+.1f} over pixels"
        numbers.append((label, f"{value:.1%}", detail))
    return numbers


def _scores(scores: Mapping) -> Markup:
    """Return the score table, the bar chart and the protocol."""

    def cell(value: float) -> str:
        hits = binomtest(round(value * scores["num_test"]), scores["num_test"])
        low, high = hits.proportion_ci(0.95, method="wilson")
        return f"{value:.1%} ({100 * low:.1f} to {100 * high:.1f})"

    rows = [
        (encoder, cell(value["linear_top1"]), cell(value["knn_top1"]))
        for encoder in charts.ENCODERS
        for value in [scores["scores"][encoder]]
    ]
    chance = 1 / scores["num_classes"]
    return fill(
        template.SCORES,
        table=template.table(("encoder", "linear top-1", "kNN top-1"), rows),
        chart=charts.score_chart("scores", scores["scores"], chance=chance),
        chance=f"{chance:.1%}",
        num_test=f"{scores['num_test']:,}",
        num_classes=scores["num_classes"],
        linear=scores["protocol"]["linear"],
        knn=scores["protocol"]["knn"],
    )


def _learning(config: Mapping, metrics: Mapping[str, np.ndarray]) -> Markup:
    """Return the curves of loss and contrastive accuracy."""
    batch = config["global_batch_size"]
    chance_loss = math.log(2 * batch - 1)
    return fill(
        template.LEARNING,
        loss=charts.line_chart(
            "loss",
            metrics["step"],
            metrics["loss"],
            x_label="step",
            y_label="NT-Xent loss (nats)",
            reference=chance_loss,
        ),
        accuracy=charts.line_chart(
            "accuracy",
            metrics["step"],
            metrics["contrastive_accuracy"],
            x_label="step",
            y_label="contrastive accuracy",
            percent=True,
            reference=1 / batch,
        ),
        temperature=config["loss"]["temperature"],
        batch=batch,
        chance=f"{1 / batch:.2%}",
        chance_loss=f"{chance_loss:.2f}",
    )


def _evaluations(evaluations: Mapping[str, np.ndarray]) -> Markup:
    """Return the curves of the scores and of the effective rank while training."""
    epoch_N, rank = evaluations["epoch"], template.NO_RANK
    scores = {"linear top-1": evaluations["linear_top1"], "kNN top-1": evaluations["knn_top1"]}
    if reading.JOINT in evaluations:
        scores["joint top-1"] = evaluations[reading.JOINT]
    if reading.RANK in evaluations:
        chart = charts.line_chart(
            "rank",
            epoch_N,
            evaluations[reading.RANK],
            x_label="epoch",
            y_label="effective rank of h",
            from_zero=True,
        )
        rank = fill(template.RANK, chart=chart, last=f"{evaluations[reading.RANK][-1]:.1f}")
    return fill(
        template.EVALUATIONS,
        chart=charts.series_chart(
            "online", epoch_N, scores, x_label="epoch", y_label="top-1 accuracy"
        ),
        rank=rank,
        last=", ".join(f"{name} {value_N[-1]:.1%}" for name, value_N in scores.items()),
        protocol=ridge.PROTOCOL,
        joint=f" Joint: {linear_joint.PROTOCOL}" if reading.JOINT in evaluations else "",
    )


def _throughput(summary: Mapping, metrics: Mapping[str, np.ndarray]) -> Markup:
    """Return the curves of images/s and data wait over the minutes of training."""
    minutes_N = metrics["training_seconds"] / 60
    return fill(
        template.THROUGHPUT,
        speed=charts.line_chart(
            "speed",
            minutes_N,
            metrics["images_per_second"],
            x_label="minutes of training",
            y_label="images/s",
            from_zero=True,
        ),
        wait=charts.line_chart(
            "wait",
            minutes_N,
            metrics["data_wait_fraction"],
            x_label="minutes of training",
            y_label="data wait",
            percent=True,
        ),
        mean_speed=f"{summary['images_per_second']:,.0f}",
    )


def _views(view_pairs: Sequence[ViewPair]) -> Markup:
    """Return the contact sheet: every source followed by its two views."""
    groups = []
    for pair in view_pairs:
        images = zip(("source", "view_0", "view_1"), pair, strict=True)
        groups.append({key: _view(key.replace("_", " "), image) for key, image in images})
    return fill(template.VIEWS, groups=template.fill_each(template.VIEW_GROUP, groups))


def _view(name: str, image: np.ndarray) -> Markup:
    """Return one picture of the contact sheet; small ones keep crisp pixels when scaled up."""
    kind = "pixelated" if max(image.shape[:2]) <= _CRISP_PIXELS else "smooth"
    uri = charts.png_data_uri(image, max_side=_VIEW_PIXELS)
    return fill(template.VIEW, uri=uri, name=name, kind=kind)


def _provenance(record: Mapping, summary: Mapping) -> Markup:
    """Return command, resolved configuration, DeepSpeed JSON, versions, hardware and times."""
    config = record["config"]
    groups = {"run": {k: v for k, v in config.items() if not isinstance(v, dict)}}
    groups |= {k: v for k, v in config.items() if isinstance(v, dict)}
    times = {
        "started": record["started"],
        "ended": summary["ended"],
        "ranks": summary["num_ranks"],
        "training data": record["data"]["train"],
    }
    return fill(
        template.PROVENANCE,
        command=record["command"],
        config=template.fill_each(
            template.GROUP,
            ({"name": name, "table": _settings(values)} for name, values in groups.items()),
        ),
        ds_config=json.dumps(record["ds_config"], indent=2, ensure_ascii=False),
        versions=_settings(record["versions"]),
        hardware=_settings(record["hardware"] | times),
    )


def _settings(values: Mapping[str, Any]) -> Markup:
    """Return a table of names and values, nested ones as dotted names."""
    flat: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            flat += [(f"{key}.{name}", _plain(inner)) for name, inner in value.items()]
        else:
            flat.append((key, _plain(value)))
    return template.table((), flat)


def _plain(value: Any) -> str:
    """Return a value as its owner would type it: strings bare, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
