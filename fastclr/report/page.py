"""Assemble `report.json` and `report.html` of a finished run from the files it left behind."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fastclr.config import ConfigError
from fastclr.evaluation import ridge
from fastclr.evaluation.projection_2d import tsne
from fastclr.files import write_durably, write_json
from fastclr.report import charts, template
from fastclr.report.template import Markup, fill

ViewPair: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]

_FIELDS = {
    "config.json": {
        "config.encoder.name": str,
        "config.loss.temperature": Real,
        "config.global_batch_size": int,
        "ds_config": dict,
        "command": str,
        "versions": dict,
        "hardware.device": str,
        "hardware.processor": str,
        "hardware.cores": int,
        "data.train.path": str,
        "data.train.num_samples": int,
        "started": str,
    },
    "summary.json": {
        "images": int,
        "epochs": Real,
        "training_seconds": Real,
        "images_per_second": Real,
        "data_wait_fraction": Real,
        "num_ranks": int,
        "ended": str,
    },
    "scores.json": {
        **{f"scores.{encoder}.linear_top1": Real for encoder in charts.ENCODERS},
        **{f"scores.{encoder}.knn_top1": Real for encoder in charts.ENCODERS},
        "protocol.linear": str,
        "protocol.knn": str,
        "num_test": int,
        "num_classes": int,
        "class_names": list,
    },
}
_METRICS = (
    "step",
    "loss",
    "contrastive_accuracy",
    "images_per_second",
    "data_wait_fraction",
    "training_seconds",
)
_EVALUATIONS = ("epoch", "linear_top1", "knn_top1")
_RANK = "h_effective_rank"
_REMEDY = (
    "Restore it from a copy of the run, or run the training or evaluation that wrote it again."
)
_MAX_TSNE_POINTS = 1000
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
            `features/{h,label}_test.npy` where the run was evaluated; `evaluations.jsonl` where it
            was evaluated while training.
        view_pairs: (source, view 0, view 1), each uint8 (H, W, 3) of any size, for the sheet of
            augmented views; without them there is no sheet.
        thumbnails: uint8 (H, W, 3); thumbnail i shows row i of `h_test.npy`. With fewer of them
            than rows, t-SNE uses the first rows only.
        note: What the reader has to know before the numbers, shown above them.

    Returns:
        Path of `report.html`.

    Raises:
        ConfigError: If a file is missing or malformed; names the file, the line and the remedy.
    """
    run_dir = Path(run_dir)
    record = _read_object(run_dir / "config.json")
    summary = _read_object(run_dir / "summary.json")
    metrics = _read_metrics(run_dir / "metrics.jsonl")
    evaluations = _read_evaluations(run_dir / "evaluations.jsonl")
    has_scores = _has_scores(run_dir / "scores.json")
    scores = _read_object(run_dir / "scores.json") if has_scores else None
    report = _report(record, summary, scores)
    body = [
        _header(run_dir, record, summary, scores),
        fill(template.NOTE, note=note) if note else Markup(),
        _scores(scores) if scores else fill(template.NO_SCORES, run=shlex.quote(str(run_dir))),
        _learning(record["config"], metrics),
        _evaluations(evaluations) if evaluations else Markup(),
        _throughput(summary, metrics),
        _views(view_pairs) if view_pairs else Markup(),
        _tsne(run_dir / "features", scores, thumbnails),
        _provenance(record, summary),
    ]
    html = template.page(run_dir.resolve().name, body)
    write_json(run_dir / "report.json", report)
    write_durably(run_dir / "report.html", html)
    return run_dir / "report.html"


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object and check the fields that the page needs."""
    try:
        # NaN is no JSON: as null it fails the field check below instead of reaching report.json.
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing: the report is made from it. {_REMEDY}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}). {_REMEDY}") from error
    for field, kind in _FIELDS[path.name].items():
        value = document
        for key in field.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise ConfigError(
                f"{path}: {field} is {value!r}, the report needs a {kind.__name__}. {_REMEDY}"
            )
    return document


def _read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Read the logged rows as one finite float64 column a metric."""
    if not path.exists():
        raise ConfigError(f"{path} is missing: the curves are drawn from it. {_REMEDY}")
    lines = path.read_bytes().splitlines()
    if not lines:
        raise ConfigError(f"{path} is empty: there is no curve to draw. Train with --log-every 1.")
    return _columns(path, lines, _METRICS)


def _read_evaluations(path: Path) -> dict[str, np.ndarray]:
    """Read the scores taken while training as columns; nothing where there are none."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    # An evaluation without pairs of views has no monitors.
    monitored = all(f'"{_RANK}"'.encode() in line for line in lines)
    return _columns(path, lines, (*_EVALUATIONS, _RANK) if monitored else _EVALUATIONS)


def _columns(path: Path, lines: Sequence[bytes], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the rows in the lines as one finite float64 column a name; {} for no line."""
    rows = [_read_row(path, number, line, names) for number, line in enumerate(lines, start=1)]
    return dict(zip(names, np.array(rows).T, strict=True)) if rows else {}


def _read_row(path: Path, number: int, line: bytes, names: Sequence[str]) -> list[float]:
    """Read one logged row, in the order of the names."""
    try:
        document = json.loads(line)
        row = {key: float(document[key]) for key in names}
        if not all(map(math.isfinite, row.values())):
            raise ValueError(f"not finite: {row}")
        return list(row.values())
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ConfigError(
            f"{path}, line {number} is no row of metrics ({type(error).__name__}: {error}): "
            f"the curves would have a hole. Delete that line. It starts {line[:60]!r}."
        ) from error


def _has_scores(file: Path) -> bool:
    """Tell whether there are the quick protocol's scores, which the page shows."""
    if not file.exists():
        return False
    try:
        return set(json.loads(file.read_text(encoding="utf-8"))) != {"protocols"}
    except (OSError, ValueError, TypeError):
        return True  # damaged: reading it says so


def _report(record: Mapping, summary: Mapping, scores: Mapping | None) -> dict[str, Any]:
    """Return the content of `report.json`; `scores` is null for a run without evaluation."""
    kept = ("config", "ds_config", "versions", "hardware", "command", "started")
    return {
        "schema_version": 1,
        "scores": scores and scores["scores"],
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
        half_width = 1.96 * math.sqrt(max(0.0, value * (1 - value)) / scores["num_test"])
        return f"{value:.1%} ± {100 * half_width:.1f}"

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
    if _RANK in evaluations:
        chart = charts.line_chart(
            "rank",
            epoch_N,
            evaluations[_RANK],
            x_label="epoch",
            y_label="effective rank of h",
            from_zero=True,
        )
        rank = fill(template.RANK, chart=chart, last=f"{evaluations[_RANK][-1]:.1f}")
    return fill(
        template.EVALUATIONS,
        chart=charts.series_chart(
            "online", epoch_N, scores, x_label="epoch", y_label="top-1 accuracy"
        ),
        rank=rank,
        last=", ".join(f"{name} {value_N[-1]:.1%}" for name, value_N in scores.items()),
        protocol=ridge.PROTOCOL,
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


def _tsne(folder: Path, scores: Mapping | None, thumbnails: Sequence[np.ndarray]) -> Markup:
    """Return t-SNE of h as thumbnails and as dots in class colours."""
    if not (folder / "h_test.npy").exists():
        return fill(template.NO_TSNE)
    features_XF, label_X = _read_features(folder)
    num_rows = min(len(thumbnails) or len(label_X), len(label_X))
    # Test sets are often sorted by class: take rows from all over, not the first thousand.
    row_N = np.linspace(0, num_rows - 1, min(num_rows, _MAX_TSNE_POINTS)).round().astype(int)
    points_N2 = tsne(features_XF[row_N], max_points=_MAX_TSNE_POINTS)
    class_C, class_N = np.unique(label_X[row_N], return_inverse=True)
    palette = charts.class_colors(len(class_C))
    colors = [palette[index] for index in class_N]
    names = dict(enumerate(scores["class_names"] if scores else ()))
    legend = [
        {"color": color, "name": names.get(label, f"class {label}")}
        for color, label in zip(palette, class_C.tolist(), strict=True)
    ]
    mosaic = Markup()
    if len(thumbnails):
        picture = charts.thumbnail_mosaic(points_N2, [thumbnails[row] for row in row_N], colors)
        mosaic = fill(template.MOSAIC, uri=charts.png_data_uri(picture))
    return fill(
        template.TSNE,
        num_points=f"{len(row_N):,}",
        legend=template.fill_each(template.LEGEND_ITEM, legend),
        mosaic=mosaic,
        chart=charts.scatter_chart("tsne", points_N2, colors),
    )


def _read_features(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read h, shape (X, F), and the labels, shape (X,), of the test images."""
    paths = [folder / "h_test.npy", folder / "label_test.npy"]
    try:
        features_XF, label_X = (np.load(path, allow_pickle=False) for path in paths)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"features in {folder} cannot be read ({error}). {_REMEDY}") from error
    shapes_fit = features_XF.ndim == 2 and label_X.shape == features_XF.shape[:1]
    if not shapes_fit or label_X.dtype.kind != "i" or (label_X < 0).any():
        raise ConfigError(
            f"{paths[0]} is {features_XF.shape} and {paths[1]} {label_X.dtype} {label_X.shape}: "
            f"every row of h needs one integer label >= 0. {_REMEDY}"
        )
    return features_XF, label_X


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
