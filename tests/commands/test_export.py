"""The command that exports: one line on success, one clear message otherwise."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "export_encoder.py"


def call(monkeypatch: pytest.MonkeyPatch, *flags: object) -> object:
    """Run the tool of the repository as a script; return its exit code."""
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOL), run_name="__main__")
    return stop.value.code


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run of the export's own tests."""
    spec = importlib.util.spec_from_file_location("runs_made", ROOT / "tests" / "test_export.py")
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made.make_run(tmp_path / "run", made.TINY, size=16)


def test_it_exports(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "exports" / "tiny"
    flags = ("--to", "safetensors", "--out", out, "--data-license", "CC0")
    assert not call(monkeypatch, run, *flags)
    assert capsys.readouterr().out.strip() == str(out / "README.md")
    assert "Licence of the data: CC0" in (out / "README.md").read_text()


def test_it_refuses_with_one_message(run, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, run, "--to", "timm", "--out", tmp_path / "out") == 78
    said = capsys.readouterr().err
    assert said.startswith("error: no export to timm") and said.count("error") == 1
    assert not (tmp_path / "out").exists()


def test_a_format_is_needed(run, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, run, "--out", tmp_path / "out") == 2
    assert "--to" in capsys.readouterr().err
