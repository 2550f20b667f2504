"""The tables of all protocols, of all layers, and of what the head forgets."""

from __future__ import annotations

from typing import Any

from fastclr.evaluation import forgetting, layers, score_sheet
from fastclr.report import picture_templates as templates
from fastclr.report import template
from fastclr.report.template import Markup, fill


def section(entries: dict[str, Any]) -> Markup:
    """Return the section of what ``scores.json`` has under ``protocols``.

    Raises:
        ConfigError: If an entry is none of a protocol.
    """
    table = template.table(("protocol", "score", "%", "min"), score_sheet.lines(entries))
    minutes = sum(entry["minutes"] for entry in entries.values())
    return fill(
        templates.PROTOCOLS,
        table=table,
        total=f"{minutes:.1f}",
        others=Markup(f'<div class="stack">{_layers(entries)}{_forgetting(entries)}</div>'),
    )


def _layers(entries: dict[str, Any]) -> Markup:
    """Return the scores of all layers, or nothing."""
    rows = [
        (
            s.layer,
            s.width,
            "" if s.num_discarded is None else s.num_discarded,
            f"{s.ridge_top1:.1%}",
            f"{s.knn_top1:.1%}",
        )
        for s in score_sheet.layer_table(entries)
    ]
    names = ("layer", "width", "head modules discarded", "ridge", "kNN")
    return _panel("Every layer", names, rows, layers.PROTOCOL)


def _forgetting(entries: dict[str, Any]) -> Markup:
    """Return what can be told from h and z, or nothing."""
    table = score_sheet.forgetting_table(entries)
    rows = [
        (row.task, f"{row.chance:.1%}", *(f"{value:.1%}" for value in row.top1.values()))
        for row in table
    ]
    names = ("what changed", "chance", *(table[0].top1 if table else ()))
    return _panel("What can be told of an image", names, rows, forgetting.PROTOCOL)


def _panel(name: str, names: tuple[str, ...], rows: list[Any], note: str) -> Markup:
    """Return a table under its name; nothing without rows."""
    if not rows:
        return Markup()
    return fill(templates.TABLE, name=name, table=template.table(names, rows), note=note)
