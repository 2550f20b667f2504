"""The report page and report.json from synthetic run directories."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fastclr.config import ConfigError
from fastclr.evaluation import picture_file
from fastclr.report import write_report

METRICS = "step loss contrastive_accuracy images_per_second data_wait_fraction training_seconds"
HOSTILE = "<script>alert(1)</script>"
COMMAND = """deepspeed train.py --name "a'b" --note '</script><img src=x onerror=alert(1)>' $HOME"""


def make_run(folder: Path, *, evaluated: bool = True) -> Path:
    """Write a finished run of 200 logged steps, with hostile names, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "step": step,
            "epoch": step / 40,
            "images": step * 256,
            "loss": 6.24 - 2 * (1 - np.exp(-step / 400)) + 0.08 * np.sin(step * 1.7),
            "contrastive_accuracy": 0.7 * (1 - np.exp(-step / 500)),
            "learning_rate": 0.1,
            "images_per_second": 410.0 + 25 * np.sin(step),
            "data_wait_fraction": 0.02 + 0.01 * np.cos(step),
            "step_seconds": 0.6,
            "memory_gib": None,
            "eta_seconds": 600 - step * 0.6,
            "training_seconds": step * 0.6,
        }
        for step in range(5, 1005, 5)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(folder / "config.json", record())
    write_json(
        folder / "summary.json",
        {
            "steps": 1000,
            "images": 256000,
            "epochs": 25.0,
            "training_seconds": 600.0,
            "program_seconds": 640.0,
            "images_per_second": 412.3,
            "data_wait_fraction": 0.021,
            "num_ranks": 1,
            "finished": True,
            "ended": "2026-01-01T12:11:00+00:00",
        },
    )
    if evaluated:
        write_evaluation(folder)
    return folder


def record() -> dict:
    """Return the content of config.json."""
    return {
        "config": {
            "data": {"train": "shards/train", "backend": "kornia", "num_threads": 1},
            "views": {"size": 32, "color_strength": 0.5, "crop_scale": [0.08, 1.0]},
            "encoder": {"name": "resnet10", "width": 0.5, "stem": "small"},
            "head": {"kind": "mlp", "depth": 2, "output_dim": 128},
            "loss": {"name": "nt_xent", "temperature": 0.2},
            "optimizer": {"name": "LARS", "learning_rate": None, "base_learning_rate": 0.3},
            "epochs": None,
            "minutes": 10.0,
            "global_batch_size": 256,
            "seed": 0,
        },
        "ds_config": {"train_batch_size": 256, "zero_optimization": {"stage": 1}, "x": HOSTILE},
        "command": COMMAND,
        "versions": {"fastclr": "0.1.0", "python": "3.11.7", "torch": "2.9.0"},
        "hardware": {"device": "cpu", "processor": "Example CPU <2 GHz>", "cores": 2},
        "data": {
            "train": {
                "path": "shards/train",
                "num_samples": 50000,
                "num_classes": 10,
                "digest": "9f" * 32,
            }
        },
        "started": "2026-01-01T12:00:00+00:00",
    }


def write_evaluation(folder: Path) -> None:
    """Write scores and 240 test features in ten clusters."""
    names = ["airplane", "automobile\udcff", "bird", "cat", "deer", "dog", "frog", "horse", "ship"]
    pairs = {"trained": (0.642, 0.588), "untrained": (0.391, 0.334), "pixels": (0.372, 0.318)}
    write_json(
        folder / "scores.json",
        {
            "protocol": {
                "linear": "Multinomial logistic regression on standardised h; L2 by a held-out 10 %"
                " of the training set.",
                "knn": "Weighted kNN by cosine similarity, k = 200, temperature 0.1.",
            },
            "scores": {k: {"linear_top1": a, "knn_top1": b} for k, (a, b) in pairs.items()},
            "num_train": 50000,
            "num_test": 10000,
            "num_classes": 10,
            "class_names": [*names, HOSTILE],
            "seconds": 31.0,
        },
    )
    rng = np.random.default_rng(0)
    label_X = np.arange(240) % 10
    features_XF = rng.normal(size=(240, 64)) + 1.1 * rng.normal(size=(10, 64))[label_X]
    (folder / "features").mkdir(exist_ok=True)
    np.save(folder / "features" / "h_test.npy", features_XF.astype(np.float32))
    np.save(folder / "features" / "label_test.npy", label_X)


def write_json(path: Path, document: dict) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(document))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Return an evaluated run directory with its report."""
    run_dir = make_run(tmp_path_factory.mktemp("runs") / "cifar10 <b>bold")
    images = np.random.default_rng(0).integers(0, 255, (240, 32, 32, 3), dtype=np.uint8)
    pair = (np.zeros((300, 400, 3), np.uint8), images[0], images[1])
    assert write_report(run_dir, view_pairs=[pair], thumbnails=images) == run_dir / "report.html"
    return run_dir


def test_report_json_has_the_schema(finished):
    report = json.loads((finished / "report.json").read_text())
    assert report["schema_version"] == 1
    assert report["scores"]["trained"] == {"linear_top1": 0.642, "knn_top1": 0.588}
    assert set(report["scores"]) == {"trained", "untrained", "pixels"}
    assert report["minutes"] == 10.0
    assert report["images_per_second"] == 412.3
    assert report["data_wait_fraction"] == 0.021
    assert report["ended"] > report["started"]
    for key in ("config", "ds_config", "versions", "hardware", "command"):
        assert report[key] == record()[key]


def test_page_is_self_contained(finished):
    html = (finished / "report.html").read_text()
    assert not re.search(r"https?://|@import", html)
    sources = re.findall(r"""(?:src|href)=["']?([^"'> ]*)""", html)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources if source != "x")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_outside_strings_are_escaped(finished):
    html = (finished / "report.html").read_text()
    assert "<b>bold" not in html
    assert "<img src=x" not in html
    assert "alert(1)</script>" not in html
    assert html.count("<script") == html.count("</script>") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;</li>" in html
    assert "&quot;a&#x27;b&quot;" in html
    assert "automobile?</li>" in html


def test_ids_are_unique_and_references_resolve(finished):
    html = (finished / "report.html").read_text()
    ids = re.findall(r'\sid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', html)) <= set(ids)


def test_page_shows_the_numbers(finished):
    html = (finished / "report.html").read_text()
    for text in (
        "64.2%",
        "+25.1 points over untrained, +27.0 over pixels",
        "k = 200",
        "2.1%",
        "6.24",
    ):
        assert text in html
    assert "crop_scale" in html
    assert html.count('class="pixelated"') == 2
    assert html.count('class="smooth"') == 1


def test_few_test_images_leave_a_wide_interval(tmp_path):
    run_dir = make_run(tmp_path / "run")
    scores = json.loads((run_dir / "scores.json").read_text())
    scores["num_test"] = 3
    scores["scores"]["trained"]["linear_top1"] = 1.0
    (run_dir / "scores.json").write_text(json.dumps(scores))
    # Wilson (1927): with z = 1.96, three of three reach down to 3 / (3 + z²).
    assert "100.0% (43.9 to 100.0)" in write_report(run_dir).read_text()


@pytest.mark.parametrize("damaged", [None, 0, 1234])
def test_replaced_images_are_told(tmp_path, damaged):
    run_dir = make_run(tmp_path / "run", evaluated=False)
    summary = json.loads((run_dir / "summary.json").read_text())
    if damaged is not None:  # older runs did not count them
        write_json(run_dir / "summary.json", {**summary, "damaged_samples": damaged})
    html = write_report(run_dir).read_text()
    assert ("1,234 damaged images replaced by others" in html) == (damaged == 1234)
    assert "damaged" not in html or damaged


def test_report_is_the_same_twice(finished, tmp_path):
    first, second = (make_run(tmp_path / name / "run", evaluated=False) for name in "ab")
    pages = [
        write_report(run_dir).read_text().replace("/b/run", "/a/run") for run_dir in (first, second)
    ]
    assert pages[0] == pages[1]


def test_missing_scores_say_how_to_make_them(tmp_path):
    run_dir = make_run(tmp_path / "run", evaluated=False)
    html = write_report(run_dir).read_text()
    assert f"fastclr evaluate --run {run_dir} ..." in html
    assert json.loads((run_dir / "report.json").read_text())["scores"] is None


def test_scores_of_other_protocols_alone(tmp_path):
    run_dir = make_run(tmp_path / "run", evaluated=False)
    entry = {"scores": {"top1": 0.5}, "minutes": 0.25, "settings": {}}
    write_json(run_dir / "scores.json", {"protocols": {"ridge": entry}})
    html = write_report(run_dir).read_text()
    assert "All protocols" in html and "<td>50.00</td>" in html and "fastclr evaluate" in html
    report = json.loads((run_dir / "report.json").read_text())
    assert report["protocols"] == {"ridge": {"scores": {"top1": 0.5}, "minutes": 0.25}}
    assert report["scores"] is None
    for damaged in ({"ridge": {"scores": 3}}, [1]):
        write_json(run_dir / "scores.json", {"protocols": damaged})
        with pytest.raises(ConfigError, match=r"scores\.json"):
            write_report(run_dir)


def test_pictures_take_the_place_of_the_quick_map(tmp_path, pictures):
    run_dir = make_run(tmp_path / "run")
    assert 'id="tsne"' in write_report(run_dir).read_text()
    picture_file.save(run_dir, pictures)
    html = write_report(run_dir).read_text()
    assert 'id="tsne"' not in html and 'id="map-1-umap"' in html
    assert html.count("<script") == html.count("</script>") == 1
    assert not re.search(r"https?://|@import", html)
    ids = re.findall(r'\sid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    (run_dir / picture_file.FILE).write_bytes(b"no")
    with pytest.raises(ConfigError, match=r"pictures\.npz cannot be drawn"):
        write_report(run_dir)


def test_three_test_images_have_no_map(tmp_path):
    run_dir = make_run(tmp_path / "run")
    for name in ("h_test.npy", "label_test.npy"):
        np.save(run_dir / "features" / name, np.load(run_dir / "features" / name)[:3])
    html = write_report(run_dir).read_text()
    assert "there are 3" in html and 'id="tsne"' not in html


def write_online(folder: Path, num_rows: int, monitored: bool = True) -> list[dict]:
    """Write scores taken while training."""
    rows = [
        {
            "step": 40 * k,
            "epoch": k / 2,
            "images": 256 * 40 * k,
            "knn_top1": 0.1 + k / 100,
            "linear_top1": 0.2 + k / 50,
            **({"h_effective_rank": 9.0 + k, "alignment": 0.4} if monitored else {}),
            "seconds": 2.5,
        }
        for k in range(1, num_rows + 1)
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def charts_of(run_dir: Path) -> list[str]:
    """Return the names of the charts on the page."""
    return re.findall(r'<svg class="chart" id="([a-z]+)"', write_report(run_dir).read_text())


def test_online_evaluation_has_a_chart_of_scores_and_one_of_the_rank(tmp_path):
    run_dir = make_run(tmp_path / "run", evaluated=False)
    write_online(run_dir, 6)
    assert charts_of(run_dir) == ["loss", "accuracy", "online", "rank", "speed", "wait"]
    html = (run_dir / "report.html").read_text()
    assert "linear top-1 32.0%, kNN top-1 16.0%" in html
    assert "at the end 15.0." in html
    assert "Ridge regression of one-hot labels" in html
    online = html.split('id="online"')[1].split("</svg>")[0]
    assert "linear top-1<" in online
    assert "kNN top-1<" in online
    assert "var(--first)" in online
    assert "var(--second)" in online
    ids = re.findall(r'\sid="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_a_joint_probe_has_a_curve_too(tmp_path):
    run_dir = make_run(tmp_path / "run", evaluated=False)
    rows = write_online(run_dir, 5)
    assert "joint top-1" not in write_report(run_dir).read_text()
    rows = [{**row, "joint_top1": 0.15 + k / 30} for k, row in enumerate(rows)]
    (run_dir / "evaluations.jsonl").write_text("\n".join(map(json.dumps, rows)))
    html = write_report(run_dir).read_text()
    online = html.split('id="online"')[1].split("</svg>")[0]
    assert "joint top-1<" in online and "var(--third)" in online
    assert "joint top-1 28.3%" in html and "gradient stopped before the encoder" in html


def test_online_evaluation_without_monitors_has_no_rank(tmp_path):
    run_dir = make_run(tmp_path / "run", evaluated=False)
    write_online(run_dir, 6, monitored=False)
    assert charts_of(run_dir) == ["loss", "accuracy", "online", "speed", "wait"]


def test_a_run_without_online_evaluation_has_no_section_of_it(tmp_path):
    run_dir = make_run(tmp_path / "run", evaluated=False)
    assert charts_of(run_dir) == ["loss", "accuracy", "speed", "wait"]
    (run_dir / "evaluations.jsonl").touch()
    assert charts_of(run_dir) == ["loss", "accuracy", "speed", "wait"]
    assert "Online evaluation" not in (run_dir / "report.html").read_text()


def points(chart: str, color: str) -> list[tuple[float, float]]:
    """Return where a chart places the dots of a series; that of the legend comes last."""
    uses = re.findall(r'<use [^>]*?x="([\d.]+)" y="([\d.]+)" style="fill: var\(--(\w+)', chart)
    return [(float(x), float(y)) for x, y, name in uses if name == color]


@pytest.mark.parametrize("scores", [[0.5], [0.0, 0.0], [0.1, 0.3, 0.9]])
def test_every_score_is_a_dot_inside_its_chart(tmp_path, scores):
    run_dir = make_run(tmp_path / "run", evaluated=False)
    rows = write_online(run_dir, len(scores))
    for row, score in zip(rows, scores, strict=True):
        row["linear_top1"], row["knn_top1"] = score, score / 2
    (run_dir / "evaluations.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chart = write_report(run_dir).read_text().split('id="online"')[1].split("</svg>")[0]
    clip = re.search(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', chart)
    left, top, width, height = map(float, clip.groups())
    linear, knn = (points(chart, name)[: len(scores)] for name in ("first", "second"))
    assert len(linear) == len(knn) == len(scores)
    for (x, y), (x_knn, y_knn), score in zip(linear, knn, scores, strict=True):
        assert x == x_knn
        assert left < x < left + width
        assert y > top + 2  # not cut off
        assert top + height - y == pytest.approx(2 * (top + height - y_knn), abs=0.1)
        assert top + height - y == pytest.approx(
            height * score / (1.08 * max(scores) or 1), abs=0.1
        )


@pytest.mark.parametrize("line", ["{broken", '{"epoch": 1, "knn_top1": 0.1}', "[]"])
def test_broken_line_of_online_evaluation_is_named(tmp_path, line):
    run_dir = make_run(tmp_path / "run", evaluated=False)
    write_online(run_dir, 2)
    with (run_dir / "evaluations.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(ConfigError, match=r"evaluations\.jsonl, line 3 .*Delete"):
        write_report(run_dir)


def test_one_logged_row_is_enough(tmp_path):
    run_dir = make_run(tmp_path / "run", evaluated=False)
    row = (run_dir / "metrics.jsonl").read_text().splitlines()[0]
    (run_dir / "metrics.jsonl").write_text(row)
    assert write_report(run_dir).exists()


NAN_ROW = json.dumps(dict.fromkeys(METRICS.split(), float("nan")))
BROKEN = ["{broken", "[]", "{}", '"loss"', "", "\xff", "9" * 400, '{"step": "x"}', NAN_ROW]


@pytest.mark.parametrize("line", BROKEN)
def test_broken_metrics_line_is_named(tmp_path, line):
    run_dir = make_run(tmp_path / "run", evaluated=False)
    rows = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows[2] = line
    (run_dir / "metrics.jsonl").write_text("\n".join(rows), encoding="latin-1")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 3 .*Delete"):
        write_report(run_dir)
    assert not list(run_dir.glob("*report*"))


@pytest.mark.parametrize("name", ["config.json", "summary.json", "metrics.jsonl"])
def test_missing_file_is_named(tmp_path, name):
    run_dir = make_run(tmp_path / "run", evaluated=False)
    (run_dir / name).unlink()
    with pytest.raises(ConfigError, match=re.escape(name) + " is missing"):
        write_report(run_dir)


def test_wrong_field_is_named(tmp_path):
    run_dir = make_run(tmp_path / "run", evaluated=False)
    (run_dir / "summary.json").write_text('{"images": 1, "epochs": NaN}')
    with pytest.raises(ConfigError, match=r"summary\.json: epochs is None"):
        write_report(run_dir)
    (run_dir / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match=r"summary\.json is not JSON"):
        write_report(run_dir)


def test_features_must_fit_their_labels(tmp_path):
    run_dir = make_run(tmp_path / "run")
    np.save(run_dir / "features" / "label_test.npy", np.arange(3))
    with pytest.raises(ConfigError, match=r"label_test\.npy int64 \(3,\)"):
        write_report(run_dir)


def test_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    run_dir = make_run(tmp_path / "run", evaluated=False)
    (run_dir / "report.json").write_text("old")

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_report(run_dir)
    assert not (run_dir / "report.html").exists()
    assert (run_dir / "report.json").read_text() == "old"
