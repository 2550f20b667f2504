"""Completion of the command in a shell: the flags of all parts, written by tyro."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from fastclr.commands import PARTS
from fastclr.config import Config
from fastclr.recipes import RECIPES

SHELLS = ("bash", "zsh", "tcsh", "fish")


def _train(
    config: Annotated[Config, tyro.conf.arg(name="")],
    ds_config: str = "",
    recipe: Literal[tuple(RECIPES)] = "simclr-v1-paper",  # pyright: ignore[reportInvalidTypeForm]
) -> None:
    """Have the flags of ``fastclr train``, which reads them in two steps."""


def complete(words: Sequence[str]) -> int:
    """Print or write the script of a shell.

    Args:
        words: ``--tyro-print-completion SHELL`` or ``--tyro-write-completion SHELL FILE``.

    Returns:
        Exit code.
    """
    if len(words) < 2 or words[1] not in SHELLS:
        print(f"fastclr {words[0]}: name a shell: {', '.join(SHELLS)}.", file=sys.stderr)
        return 2
    tyro.extras.subcommand_cli_from_dict(functions(), prog="fastclr", args=words)
    return 0


def functions() -> dict[str, Any]:
    """Return a function with the flags of each part."""
    found = {
        name: getattr(importlib.import_module(part.home), part.function)
        for name, part in PARTS.items()
        if part.function
    }
    return {**found, "train": _train}
