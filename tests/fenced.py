"""The fenced blocks of a page in Markdown, and the commands in them."""

from __future__ import annotations

import re
from typing import NamedTuple

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        language: The word behind the fence.
        text: What is inside.
    """

    language: str
    text: str


def blocks(page: str, language: str = "") -> list[Block]:
    """Return the fenced blocks of a page in order, of one language or of all."""
    found = [Block(*groups) for groups in _FENCE.findall(page)]
    return [block for block in found if language in ("", block.language)]


def commands(text: str) -> list[str]:
    """Return the lines of a block of bash that are commands, not comments."""
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def without_blocks(page: str) -> str:
    """Return the prose of a page."""
    return _FENCE.sub("", page)
