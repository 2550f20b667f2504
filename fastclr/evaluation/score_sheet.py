"""The table of all protocols: scores and minutes; for the terminal, Markdown and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastclr.config import ConfigError
from fastclr.evaluation.forgetting import Forgotten, forgetting_markdown
from fastclr.evaluation.layers import LayerScore, layers_markdown

Entries = Mapping[str, Mapping[str, Any]]  # what scores.json has under "protocols"


class Line(NamedTuple):
    """A line of the table.

    Attributes:
        protocol: Its name; empty for a further score of the one above.
        metric: Name of the score.
        percent: The score, such as "61.23".
        minutes: Minutes it took, features included, such as "1.5"; empty with ``protocol``.
    """

    protocol: str
    metric: str
    percent: str
    minutes: str


def lines(entries: Entries) -> list[Line]:
    """Return the table, a line a score, in the order in which the protocols were run.

    Raises:
        ConfigError: If an entry is none of a protocol.
    """
    found = []
    for name, entry in entries.items():
        try:
            minutes = f"{entry['minutes']:.1f}"
            for number, (metric, value) in enumerate(entry["scores"].items()):
                first = (name, minutes) if number == 0 else ("", "")
                found.append(Line(first[0], metric, f"{100 * value:.2f}", first[1]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"scores.json has no scores of protocol {name!r} ({error!r}): delete the entry, or "
                "the file, and score again."
            ) from error
    return found


def layer_table(entries: Entries) -> list[LayerScore]:
    """Return the scores of all layers; none if they were not scored."""
    return [LayerScore(**row) for row in _table(entries, "layers")]


def forgetting_table(entries: Entries) -> list[Forgotten]:
    """Return what can be told from h and z; nothing if it was not asked."""
    return [Forgotten(**row) for row in _table(entries, "forgetting")]


def _table(entries: Entries, name: str) -> list[dict[str, Any]]:
    return entries.get(name, {}).get("chosen", {}).get("table", [])


def markdown(entries: Entries) -> str:
    """Return all tables in Markdown."""
    rows = ["| protocol | score | % | minutes |", "|---|---|--:|--:|"]
    rows += [f"| {' | '.join(line)} |" for line in lines(entries)]
    total = sum(entry["minutes"] for entry in entries.values())
    rows += [f"| all | | | {total:.1f} |", ""]
    if layer_rows := layer_table(entries):
        rows += ["Every layer:", "", layers_markdown(layer_rows), ""]
    if forgotten := forgetting_table(entries):
        rows += ["What can be told of an image:", "", forgetting_markdown(forgotten), ""]
    return "\n".join(rows)
