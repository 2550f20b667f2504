"""The report in headless Chromium: no console error, charts visible, no sideways scrolling."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastclr.evaluation import picture_file
from fastclr.report import write_report

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs chromium and chromedriver on the PATH"
)
# A driver on this machine is never behind a proxy.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Browser:
    """A WebDriver session over plain HTTP."""

    def __init__(self, port: int, profile: Path) -> None:
        self.url = f"http://127.0.0.1:{port}/session"
        flags = ["headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-sync"]
        flags += ["disable-background-networking", "disable-component-update"]
        options = {
            "binary": BROWSER,
            "args": [f"--{flag}" for flag in flags] + [f"--user-data-dir={profile}"],
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.post("", {"capabilities": {"alwaysMatch": wanted}})
        self.url += "/" + session["sessionId"]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send a command and return its value."""
        request = urllib.request.Request(self.url + path, json.dumps(body).encode())
        with OPENER.open(request, timeout=60) as response:
            return json.load(response)["value"]

    def console_errors(self, page: Path) -> list[str]:
        """Open a page and return what the console reports as errors."""
        self.post("/url", {"url": page.as_uri()})
        entries = self.post("/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def run(self, script: str) -> Any:
        """Run the body of a function in the open page and return its value."""
        return self.post("/execute/sync", {"script": script, "args": []})

    def resize(self, width: int) -> None:
        """Give pages a viewport of this width in pixels, as on a phone."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": True}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics}
        self.post("/goog/cdp/execute", command)

    def close(self) -> None:
        """End the session and its browser."""
        request = urllib.request.Request(self.url, method="DELETE")
        OPENER.open(request, timeout=60).close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            line = next(line for line in driver.stdout if "started successfully" in line)
            port = int(line.rstrip(". \n").rsplit(" ", 1)[1])
            session = Browser(port, tmp_path_factory.mktemp("profile"))
            yield session
            session.close()
        finally:
            driver.terminate()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """Return the page of a small evaluated run with hostile class names."""
    run_dir = tmp_path_factory.mktemp("run")
    config = {"encoder": {"name": "resnet10"}, "loss": {"temperature": 0.2}}
    write(
        run_dir / "config.json",
        config=config | {"global_batch_size": 64},
        ds_config={"train_batch_size": 64},
        command="deepspeed train.py --note '</script><script>undefined_name()</script>' "
        + 30 * "x",
        versions={"torch": "2"},
        hardware={"device": "cpu", "processor": "Example CPU", "cores": 2},
        data={"train": {"path": "shards/train", "num_samples": 640}},
        started="2026-01-01T12:00:00",
    )
    means = {"images_per_second": 100.0, "data_wait_fraction": 0.1}
    times = {"training_seconds": 60.0, "num_ranks": 1, "ended": "2026-01-01T12:01:00"}
    write(run_dir / "summary.json", images=12800, epochs=20.0, **means, **times)
    rows = [
        {"step": i, "loss": 5 - i / 99, "contrastive_accuracy": i / 200, "training_seconds": i}
        for i in range(1, 201)
    ]
    (run_dir / "metrics.jsonl").write_text("\n".join(json.dumps(row | means) for row in rows))
    score = {"linear_top1": 0.5, "knn_top1": 0.4}
    online = [{"epoch": k, "h_effective_rank": 5 + k, **score} for k in range(1, 9)]
    (run_dir / "evaluations.jsonl").write_text("\n".join(map(json.dumps, online)))
    write(
        run_dir / "scores.json",
        protocol={"linear": "text", "knn": "text"},
        scores=dict.fromkeys(("trained", "untrained", "pixels"), score),
        num_test=40,
        num_classes=2,
        class_names=["<script>undefined_name()</script>", "$x$"],
    )
    (run_dir / "features").mkdir()
    rng = np.random.default_rng(0)
    np.save(run_dir / "features" / "h_test.npy", rng.normal(size=(40, 8)).astype(np.float32))
    np.save(run_dir / "features" / "label_test.npy", np.arange(40) % 2)
    images = rng.integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)
    return write_report(run_dir, view_pairs=[tuple(images[:3])], thumbnails=images)


@pytest.fixture(scope="module")
def with_pictures(report, pictures, tmp_path_factory) -> Path:
    """Return the page of the same run with pictures and scores of all protocols."""
    run_dir = tmp_path_factory.mktemp("pictured") / "run"
    shutil.copytree(report.parent, run_dir)
    picture_file.save(run_dir, pictures)
    scores = json.loads((run_dir / "scores.json").read_text())
    entry = {"scores": {"original or noise, projection_head.fc2": 0.5}, "minutes": 1.5}
    names = ("ridge", "knn", "transfer/demo/random_init")
    write(run_dir / "scores.json", **scores, protocols=dict.fromkeys(names, entry))
    return write_report(run_dir)


def write(path: Path, **document: object) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(document))


def test_console_has_no_error(browser, report):
    assert browser.console_errors(report) == []


@pytest.mark.parametrize(
    "markup",
    ["<script>undefined_name()</script>", '<img src="missing.png">'],
    ids=["script", "missing image"],
)
def test_console_errors_are_detected(browser, tmp_path, markup):
    page = tmp_path / "broken.html"
    page.write_text(f"<!doctype html><title>broken</title>{markup}")
    assert len(browser.console_errors(page)) == 1


def test_charts_and_pictures_are_visible(browser, report):
    browser.console_errors(report)
    sizes = browser.run(
        "return Array.from(document.querySelectorAll('svg.chart, img'), element => {"
        "  const box = element.getBoundingClientRect();"
        "  return [element.id || element.className, box.width, box.height]; })"
    )
    names = [name for name, *_ in sizes]
    charts = ["scores", "loss", "accuracy", "online", "rank", "speed", "wait", "tsne"]
    assert sorted(names) == sorted([*charts, *3 * ["pixelated"], "mosaic"])
    assert all(width > 50 and height > 50 for _, width, height in sizes)
    assert browser.run("return Array.from(document.images).every(i => i.naturalWidth > 0)")


def test_phone_needs_no_sideways_scrolling(browser, report):
    browser.resize(380)
    browser.console_errors(report)
    opened = "document.querySelectorAll('details').forEach(d => d.open = true);"
    assert browser.run(opened + "return document.documentElement.scrollWidth") <= 380


def test_copy_button_answers(browser, report):
    browser.console_errors(report)
    browser.run("document.querySelector('.command button').click()")
    wait = "return new Promise(done => setTimeout(done, 300)).then(() =>"
    label = browser.run(wait + " document.querySelector('.command button').textContent)")
    assert label in ("Copied", "Press Ctrl+C")


def test_page_of_the_benchmarks(browser, tmp_path):
    """Of the rows that are checked in: no error, charts visible, no sideways scrolling."""
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    for rows in (benchmarks / "results").glob("*.jsonl"):
        shutil.copy(rows, tmp_path)
    command = [sys.executable, benchmarks / "report.py", "--results", tmp_path]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    for width in (1200, 380):
        browser.resize(width)
        assert browser.console_errors(tmp_path / "REPORT.html") == []
        assert browser.run("return document.documentElement.scrollWidth") <= width
    sizes = browser.run(
        "return Array.from(document.querySelectorAll('svg.chart'), element => {"
        "  const box = element.getBoundingClientRect(); return [box.width, box.height]; })"
    )
    assert len(sizes) >= 4
    assert all(width > 200 and height > 60 for width, height in sizes)


@pytest.fixture
def wide(browser) -> Iterator[None]:
    """Give pages a viewport of a desk's width, and the other tests theirs back."""
    browser.resize(1200)
    yield
    browser.post("/goog/cdp/execute", {"cmd": "Emulation.clearDeviceMetricsOverride", "params": {}})


@pytest.mark.usefixtures("wide")
def test_pictures_are_visible(browser, with_pictures):
    assert browser.console_errors(with_pictures) == []
    sizes = browser.run(
        "return Array.from(document.querySelectorAll('svg, img:not(.atlas)'), element => {"
        "  const box = element.getBoundingClientRect();"
        "  return [element.id || element.className, box.width, box.height]; })"
    )
    names = [name if isinstance(name, str) else "" for name, *_ in sizes]
    maps = [f"map-{k}-{method}" for k in (0, 1) for method in ("opentsne", "umap")]
    assert {*maps, "confusion", "spectra", "weights", "mosaic"} <= set(names)
    assert all(width > 25 and height > 25 for _, width, height in sizes)
    assert browser.run("return Array.from(document.images).every(i => i.naturalWidth > 0)")


POINT = """
const map = document.getElementById(arguments_id), box = map.getBoundingClientRect();
const dot = map.querySelector(`[data-i="${number}"]`).getBoundingClientRect();
const at = {clientX: dot.left + dot.width / 2, clientY: dot.top + dot.height / 2, bubbles: true};
map.dispatchEvent(new PointerEvent("pointermove", at));
"""


def pointed(browser, chart: str, number: int, script: str):
    """Point at an image's dot and run the body of a function."""
    before = f'const arguments_id = "{chart}", number = {number};'
    return browser.run(before + POINT + script)


@pytest.mark.usefixtures("wide")
def test_pointing_at_a_dot_shows_its_image_in_all_maps(browser, with_pictures, pictures):
    browser.console_errors(with_pictures)
    shown = """
    const peek = document.querySelector(".peek"), canvas = peek.querySelector("canvas");
    const data = canvas.getContext("2d").getImageData(0, 0, 96, 96).data;
    return [peek.hidden, peek.querySelector("span").textContent, Array.from(data),
      Array.from(document.querySelectorAll(".dots .lit"), dot => dot.dataset.i),
      peek.getBoundingClientRect().width];
    """
    at_N2 = pictures.layers["h"].points["umap"]
    gap_NN = np.linalg.norm(at_N2[:, None] - at_N2[None], axis=2) + 99 * np.eye(len(at_N2))
    for number in np.argsort(-gap_NN.min(1))[:3].tolist():  # dots that no other one covers
        hidden, text, data, lit, width = pointed(browser, "map-0-umap", number, shown)
        assert not hidden and width > 96 and lit == 4 * [str(number)]
        assert text == pictures.facts["class_names"][pictures.label_N[number]]
        drawn = np.array(data).reshape(16, 6, 16, 6, 4)[..., :3].mean((1, 3))
        found = [
            np.abs(drawn.mean((0, 1)) - image.mean((0, 1))).max() for image in pictures.image_NHWC
        ]
        assert found[number] < 4  # a JPEG
        whole = [np.abs(drawn - image).mean() for image in pictures.image_NHWC]
        assert int(np.argmin(whole)) == number
    left = "document.getElementById('map-0-umap').dispatchEvent(new PointerEvent('pointerleave'));"
    after = (
        "const lit = document.querySelectorAll('.lit').length;"
        "return [document.querySelector('.peek').hidden, lit]"
    )
    assert browser.run(left + after) == [True, 0]


@pytest.mark.usefixtures("wide")
def test_pointing_at_a_class_shows_it_alone(browser, with_pictures):
    browser.console_errors(with_pictures)
    script = """
    const item = document.querySelector(`.legend li[data-class="2"]`);
    item.dispatchEvent(new PointerEvent("pointerenter"));
    const groups = () => Array.from(document.querySelectorAll(".dots g:not(.dim)"));
    const bright = () => groups().map(group => group.dataset.class);
    const during = bright();
    item.dispatchEvent(new PointerEvent("pointerleave"));
    return [during, bright().length];
    """
    assert browser.run(script) == [4 * ["2"], 16]


def test_pictures_fit_a_phone(browser, with_pictures):
    browser.resize(380)
    browser.console_errors(with_pictures)
    assert browser.run("return document.documentElement.scrollWidth") <= 380


def test_scores_are_whole_and_on_one_line(browser, wide, with_pictures):
    browser.console_errors(with_pictures)
    table = "[...document.querySelectorAll('.scroll')].find(t => t.innerText.startsWith('proto'))"
    hidden, lines = browser.run(
        f"const table = {table}, range = document.createRange();"
        "const cells = [...table.querySelectorAll('td:nth-child(n + 3)')];"
        "return [table.scrollWidth - table.clientWidth,"
        "  cells.map(c => { range.selectNodeContents(c); return range.getClientRects().length; })]"
    )
    assert hidden == 0 and lines == [1] * 6
