"""The report of the benchmarks: what is there is shown, what is missing is said."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"

Import = Callable[[str], ModuleType]


def row(name: str, variant: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "variant": variant, "sizes": {"batch": 64}, "dtype": "float32",
        "p20_seconds": seconds / 2, "p50_seconds": seconds, "p80_seconds": 2 * seconds,
        "repeats": 3, "warm_ups": 1, "images_per_second": 64 / seconds, "peak_bytes": None,
        "measured": "2026-01-02T03:04:05+00:00", "threads": 2, "versions": {"torch": "2"},
        "hardware": {"device": "cpu", "processor": "Abacus", "cores": 2}, "driver": None,
        "commit": "abc", "dirty": False, "command": "python benchmarks/x.py", **more,
    }  # fmt: skip


def world(ranks: int, images: int, seconds: float, **more: Any) -> dict[str, Any]:
    """Return a row of scaling.py."""
    own = {key: more.pop(key) for key in ("stage", "worlds") if key in more}
    sizes = {"ranks": ranks, "images": images, "stage": 0, "exchange": "gather", "worlds": 1} | own
    more["images_per_second"] = ranks * images / seconds
    return row("scaling", f"{ranks} x {images}", seconds, sizes=sizes, **more)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


def planted(folder: Path) -> None:
    """Write rows of every kind, and the checked-in ones of loss and optimizer."""
    optimizer = ("lars.jsonl", "lars_cuda.jsonl")
    for name in ("nt_xent_cpu.jsonl", *optimizer, "trainer.jsonl", "data_plane.jsonl"):
        shutil.copy(FOLDER / "results" / name, folder / name)
    exposed = {"work_seconds": 0.004, "exposed_seconds": 0.001, "alone_images_per_second": 31_234.0}
    trial = {"name": "trial", "variant": "batch 99999", "sizes": {}, "problem": "out of memory"}
    write_rows(folder / "throughput.jsonl", [
        row("stage", "decode", 0.004, **exposed),
        row("stage", "encoder <forward>", 0.04, **exposed | {"alone_images_per_second": 1500.0}),
        row("tuned", "after", 0.03), trial,
    ])  # fmt: skip
    exposed = {"exposed_seconds": {"loss": {"transfer": 0.0625}}, "efficiency": 0.875}
    forecast = {"name": "forecast, not measured", "variant": "8 a node", "images_per_second": 9e5}
    write_rows(folder / "scaling.jsonl", [
        world(1, 64, 0.1), world(2, 64, 0.11, model_seconds=0.12, **exposed), world(2, 32, 0.06),
        world(2, 64, 0.2, stage=3), world(1, 64, 0.15, worlds=2),
        *(forecast | {"sizes": {"ranks": ranks}} for ranks in (8, 16)),
        *(row("collective", "all_reduce", 1e-9 * n, sizes={"num_bytes": n}, images_per_second=None)
          for n in (8, 800)),
    ])  # fmt: skip
    write_rows(folder / "curves.jsonl", [
        row(name, "fastclr", 0.1 * size, sizes={key: size}, peak_bytes=size * 10**6)
        for name, key in (("step", "batch"), ("read", "shards"), ("start-up", "samples"))
        for size in (100, 1000)
    ])  # fmt: skip
    peer = {"ratio": 1.0, "configuration": "as it comes"}
    sizes = {"side": 32, "batch": 64}
    write_rows(folder / "peers.jsonl", [
        row("peers step", "fastclr", 0.1, sizes=sizes, **peer),
        row("peers step", "lightly", 0.234, sizes=sizes, **peer | {"ratio": 2.34}),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def results(imported: Import, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of every kind, with both pages, and a picture of an older page."""
    folder = tmp_path_factory.mktemp("results")
    planted(folder)
    (folder / "other.md").write_text("# Another page\n\nof numbers\n")
    (folder / "report").mkdir()
    (folder / "report" / "of-yesterday.svg").write_text("<svg/>")
    imported("report").write(folder)
    return folder


def test_every_kind_of_rows_is_shown(results: Path) -> None:
    page, html = ((results / name).read_text() for name in ("REPORT.md", "REPORT.html"))
    for text in (page, html):
        assert "31,234" in text and "out of memory" in text and "0.875" in text
        assert "exposed seconds" not in text  # nested: on a page of its own
        assert "2.34" in text and "as it comes" in text and "4,726.9" in text
    assert "A step of LARS on cpu" in page and "A step of LARS on cuda" in page
    assert "| encoder <forward> | 40 (20 to 80) | 1,600 | 4 | 1 | 1,500 |" in page
    assert "encoder &lt;forward&gt;" in html and "<forward>" not in html
    assert "| [other.md](other.md) | Another page |" in page
    assert '<a href="other.md">other.md</a>' in html
    # Two machines measured the loss and LARS: their roofs are not drawn together.
    assert "Roofline of 2 cores of AMD EPYC" in page and "Roofline of 2 cores of Intel" in page


def test_every_kind_of_rows_is_drawn(results: Path) -> None:
    page, html = ((results / name).read_text() for name in ("REPORT.md", "REPORT.html"))
    names = {path.stem for path in (results / "report").iterdir()}
    assert names >= {
        "stages", "stage-times", "scaling-images-s", "forecast-not-measured-images-s",
        "collective-seconds", "peers-32", "step-seconds", "read-seconds", "start-up-seconds",
        "start-up-peak-bytes",
        "loss-cpu-median-ms", "loss-cpu-extra-mib", "roofline-0", "roofline-1",
    }  # fmt: skip
    assert "of-yesterday" not in names
    for name in names:
        assert f"(report/{name}.svg)" in page and f'id="{name}"' in html
        picture = (results / "report" / f"{name}.svg").read_text()
        assert ET.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme: dark" in picture


def test_the_html_needs_nothing_beside_it(results: Path) -> None:
    html = (results / "REPORT.html").read_text()
    assert not re.search(r"""(?:src|href)="(?:https?:|//|report/)""", html)
    assert "prefers-color-scheme: dark" in html and "var(--first)" in html


def test_what_is_missing_is_said(imported: Import, tmp_path: Path) -> None:
    imported("report").write(tmp_path)
    page = (tmp_path / "REPORT.md").read_text()
    assert "Nothing here has run on a GPU." in page
    for name, file in imported("report_parts.sections").FILES.items():
        line = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        assert "**not measured yet** | not run on a GPU" in line and file.command in line
    assert not list((tmp_path / "report").iterdir())


def test_a_gpu_is_named(imported: Import, tmp_path: Path) -> None:
    hardware = {"device": "Abacus 9000", "processor": "Abacus", "cores": 2}
    write_rows(tmp_path / "curves.jsonl", [row("step", "fastclr", 1.0, hardware=hardware)])
    imported("report").write(tmp_path)
    page = (tmp_path / "REPORT.md").read_text()
    assert "GPUs: Abacus 9000." in page and "Nothing here has run on a GPU" not in page
    line = next(line for line in page.splitlines() if line.startswith("| [curves.jsonl]"))
    assert "| Abacus 9000 |" in line and "not run on a GPU" not in line


def test_files_that_nobody_knows_are_listed(imported: Import, tmp_path: Path) -> None:
    write_rows(tmp_path / "other.jsonl", [row("step", "fastclr", 1.0)])
    imported("report").write(tmp_path)
    assert "| [other.jsonl](other.jsonl) |" in (tmp_path / "REPORT.md").read_text()


def test_a_damaged_line_is_named(imported: Import, tmp_path: Path) -> None:
    (tmp_path / "curves.jsonl").write_text('{"name": "step"}\n{"name": \n')
    with pytest.raises(ValueError, match=r"curves\.jsonl, line 2"):
        imported("report").write(tmp_path)


def test_weak_and_strong_scaling_are_told_apart(imported: Import) -> None:
    """Other stages, exchanges and worlds beside each other are neither."""
    rows = [
        world(1, 64, 0.1), world(2, 64, 0.125, model_seconds=0.128), world(2, 32, 0.0625),
        world(2, 64, 0.5, stage=3), world(1, 64, 0.15, worlds=2),
    ]  # fmt: skip
    found = imported("report_parts.growth").weak_and_strong(rows)
    speeds: dict[str, list[tuple[int, float]]] = {}
    for one in found:
        speed = (one["sizes"]["ranks"], one["images_per_second"])
        speeds.setdefault(one["variant"], []).append(speed)
    assert speeds == {
        "weak": [(1, 640), (2, 1024)], "weak, model": [(2, 1000)],
        "strong": [(1, 640), (2, 1024)],
    }  # fmt: skip


def test_the_size_that_varies(imported: Import) -> None:
    rows = imported("report_parts.rows")
    sizes = [
        {"ranks": r, "batch": b, "encoder": e}
        for r, b, e in ((1, 8, "a"), (2, 8, "b"), (4, 9, "c"))
    ]
    assert rows.size_that_varies([{"sizes": s} for s in sizes]) == "ranks"
    assert rows.size_that_varies([{"sizes": sizes[0]}]) is None
    assert rows.size_that_varies([]) is None


def test_the_roofline_is_that_of_the_rows(imported: Import) -> None:
    hardware = {"hardware": {"device": "cpu", "processor": "Abacus", "cores": 2}}
    lars = [
        {"name": "optimizer step", "variant": variant, "p50_seconds": seconds,
         "sizes": {"model": "m", "parameters": 1000}, **hardware}
        for variant, seconds in (("fastclr", 2.0), ("floor: memory, by a triad", 1.0))
    ]  # fmt: skip
    loss = {
        "implementation": "blocked", "num_images": 10, "dim": 4, "products_ms": 2.0,
        "median_ms": 4.0, **hardware,
    }  # fmt: skip
    files = {"lars.jsonl": lars, "nt_xent_cpu.jsonl": [loss], "nt_xent_cuda.jsonl": []}
    kernels, bandwidths, peaks = imported("report_parts.kernels")._points(files)
    (machine,) = kernels
    assert bandwidths[machine] == 28_000 and peaks[machine] == 16 * 100 * 4 / 0.002
    assert kernels[machine]["LARS, m"].speed == 14_000 * 13 / 28
    assert kernels[machine]["NT-Xent blocked, N = 10, D = 4"].speed == peaks[machine] / 2
