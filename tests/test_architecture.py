"""The shape of the house: cheap imports, short files, names that shadow nothing."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("fastclr", "pipelines", "tools", "benchmarks")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
HEAVY = ("torch", "deepspeed", "triton", "numba", "nvidia.dali", "kornia", "timm", "sklearn")


def run_python(code: str) -> str:
    """Run code in a fresh interpreter, return what it prints."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", ["fastclr", "pipelines"])
def test_importing_a_package_is_instant_and_light(package):
    seconds, modules = json.loads(
        run_python(
            "import json, sys, time; before = time.perf_counter()\n"
            f"import {package}\n"
            "print(json.dumps([time.perf_counter() - before, list(sys.modules)]))"
        )
    )
    assert seconds < 3
    assert package in modules
    assert not set(HEAVY) & set(modules)


def test_public_names_resolve():
    names = run_python(
        "import fastclr, pipelines\n"
        "for package in fastclr, pipelines:\n"
        "    assert package.__all__\n"
        "    for name in package.__all__:\n"
        "        assert getattr(package, name) is not None and name in dir(package)\n"
        "        print(name)\n"
        "assert callable(fastclr.nt_xent) and callable(fastclr.encoders.create)\n"
        "assert not hasattr(fastclr, 'nothing_of_this_name')"
    )
    assert {"Trainer", "SimCLR", "NTXent", "LARS", "ShardSet", "make_loader", "pretrain"} <= set(
        names.split()
    )


def test_files_are_found():
    assert {"trainer.py", "loader.py", "make_shards.py"} <= {file.name for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_is_short_and_says_what_it_is(file):
    source = file.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 500
    assert ast.get_docstring(ast.parse(source)), "no module docstring"


def test_no_module_shadows_an_installed_one():
    # `deepspeed fastclr/train.py` puts fastclr/ first on sys.path.
    folders = [ROOT / "fastclr", ROOT / "pipelines"]
    ours = {file.stem for folder in folders for file in folder.glob("[!_]*.py")}
    ours |= {file.parent.name for folder in folders for file in folder.glob("*/__init__.py")}
    assert {"train", "optim", "loader"} <= ours
    installed = {
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if set(owners) != {"fastclr"}
    }
    assert {"torch", "timm"} <= installed
    assert not ours & (installed | set(sys.stdlib_module_names))
