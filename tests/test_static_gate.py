"""What ruff's rules, which `make check` runs, do not know."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("fastclr", "pipelines", "tools", "benchmarks")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))


def unsafe(source: str) -> list[str]:
    """Say which calls would unpickle objects of any class."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name.endswith("torch.load") and given.get("weights_only") != "True":
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        if name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
            found.append(f"line {node.lineno}: {name} without allow_pickle=False")
    return found


@pytest.mark.parametrize(
    "source",
    ["torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f)", "np.load(f, 'r')"],
)
def test_the_gate_is_red_on_what_is_unsafe(source):
    assert unsafe(source)


def test_the_gate_passes_what_is_safe():
    assert not unsafe("torch.load(f, weights_only=True); np.load(f, allow_pickle=False)")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_unpickles_objects_of_any_class(file):
    assert unsafe(file.read_text(encoding="utf-8")) == []


def test_what_only_a_gpu_runs_can_be_imported():
    """Pytest does not collect it here, so nobody would see a name that is gone."""
    (files,) = re.findall(r"^GPU_TESTS = (.*?)\n\n", (ROOT / "Makefile").read_text(), re.M | re.S)
    files = files.replace("\\", "").split()
    assert len(files) > 3 and all((ROOT / file).is_file() for file in files)
    gpu = [file for file in files if "/gpu/" in file]
    assert len(gpu) == len(list((ROOT / "tests/gpu").glob("*.py"))) - 1  # and its conftest
    for file in gpu:
        importlib.import_module(file.removesuffix(".py").replace("/", "."))
