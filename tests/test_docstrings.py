"""All public names are documented, and the pages of the API have all public modules."""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fastclr
import pipelines

ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api"
FILES = [f for package in ("fastclr", "pipelines") for f in sorted((ROOT / package).rglob("*.py"))]
NAMES = [(package, name) for package in (fastclr, pipelines) for name in package.__all__]

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def undocumented(node: ast.AST, place: str, told: str = "") -> Iterator[str]:
    """Yield public classes, functions, methods and properties without a docstring.

    A protocol's attributes may be told by its class, under ``Attributes:``.
    """
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Documented) or child.name.startswith("_"):
            continue
        name = f"{place}.{child.name}"
        doc = ast.get_docstring(child) or ""
        is_told = re.search(rf"^    {child.name}: ", told, re.MULTILINE)
        if not doc and not is_told and child.name != "forward":
            yield name
        if isinstance(child, ast.ClassDef):
            yield from undocumented(child, name, doc)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_public_names_have_a_docstring(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert not list(undocumented(tree, module_of(file)))


def test_what_is_undocumented_is_found() -> None:
    source = 'class A:\n  """Of a."""\n  def b(self): ...\n  def _c(self): ...\ndef d(): ...'
    assert list(undocumented(ast.parse(source), "m")) == ["m.A.b", "m.d"]


def parts(found: Any) -> Iterator[Any]:
    """Yield an exported object, or the public ones defined in an exported module."""
    if not isinstance(found, ModuleType):
        yield found
        return
    for name, value in vars(found).items():
        if name[0] != "_" and getattr(value, "__module__", "") == found.__name__:
            yield value


@pytest.mark.parametrize(("package", "name"), NAMES, ids=[f"{p.__name__}.{n}" for p, n in NAMES])
def test_parameters_of_exported_names_are_told(package: ModuleType, name: str) -> None:
    for found in parts(getattr(package, name)):
        if inspect.isclass(found) and issubclass(found, Exception):
            continue
        bases = found.__mro__ if inspect.isclass(found) else (found,)
        doc = "\n".join(inspect.getdoc(base) or "" for base in bases)
        told = set(re.findall(r"^ +\*{0,2}(\w+)(?: \(.*\))?:", doc, re.MULTILINE))
        given = set(inspect.signature(found).parameters) - {"self", "args", "kwargs"}
        in_words = {p for p in given if re.search(rf"``[^`]*\b{p}\b[^`]*``", doc)}
        assert not given - told - in_words, f"{found} does not tell of {given - told - in_words}"


def directives() -> list[tuple[str, bool]]:
    """Return what the pages of the API document, and whether with the modules inside."""
    found = []
    for page in sorted(API.glob("*.md")):
        for name, options in re.findall(r"^::: (\S+)\n((?: +.*\n)*)", page.read_text(), re.M):
            found.append((name, "show_submodules: true" in options))
    return found


def test_the_api_has_all_public_modules_once() -> None:
    listed = directives()
    modules = [module_of(f) for f in FILES if not f.stem.startswith("_") or f.stem == "__init__"]
    counts = Counter(
        {
            module: sum(
                name == module or (deep and module.startswith(f"{name}.")) for name, deep in listed
            )
            for module in modules
        }
    )
    assert {m for m, count in counts.items() if count != 1} == {"fastclr", "pipelines"}
    assert {name for name, _ in listed} <= set(modules)


def test_the_first_page_of_the_api_has_all_exported_names() -> None:
    text = (API / "index.md").read_text(encoding="utf-8")
    for _, name in NAMES:
        assert f"`{name}`" in text
