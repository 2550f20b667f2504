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
