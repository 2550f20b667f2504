"""The notebooks run, with toy sizes, cell by cell in one namespace as a kernel would run them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"
# Constants of the first cells, by notebook.
TOY = {
    "own_folder": {"FOLDER": "images", "MINUTES": 0.02},
    "head_forgets": {"PER_PHOTO": 8, "EPOCHS": 1, "MOST": 32},
}


def load(name: str) -> dict[str, Any]:
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))


def run(name: str, constants: dict[str, Any]) -> dict[str, Any]:
    """Run the code cells; return what is defined at the end."""
    codes = ["".join(c["source"]) for c in load(name)["cells"] if c["cell_type"] == "code"]
    for key, value in constants.items():
        codes[0], count = re.subn(rf"(?m)^{key} = \S+", f"{key} = {value!r}", codes[0])
        assert count == 1, key
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, code in enumerate(codes):
        exec(compile(code, f"{name}, cell {number}", "exec"), namespace)
    return namespace


@pytest.fixture
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Work in an empty folder; pictures are drawn and not shown."""
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)


def test_every_notebook_is_run() -> None:
    assert TOY.keys() == {file.stem for file in NOTEBOOKS.glob("*.ipynb")}


@pytest.mark.parametrize("name", TOY)
def test_a_notebook_is_whole_and_without_outputs(name: str) -> None:
    found = load(name)
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in found["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in found["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.usefixtures("_quiet")
def test_own_folder() -> None:
    from pipelines.photos import write_photo_tiles

    write_photo_tiles(Path("images"), train_per_photo=8, test_per_photo=3)
    found = run("own_folder", TOY["own_folder"])
    assert found["result"].report.exists() and found["result"].encoder.is_dir()
    assert set(found["found"]["scores"]) == {"trained", "untrained", "pixels"}
    assert len(found["features"]) == 16 * 8
    assert (found["nearest"][:, 0] == range(4)).all(), "an image is its own nearest"


@pytest.mark.usefixtures("_quiet")
def test_head_forgets() -> None:
    found = run("head_forgets", TOY["head_forgets"])
    assert len(found["table"]) == 4 and found["h"] == "h"
    for row in found["table"]:
        assert all(0 <= value <= 1 for value in row.top1.values())
