"""A piece of the report, and how it is written as Markdown and as HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from string import Template
from typing import NamedTuple

from fastclr.report import template
from fastclr.report.template import Markup

_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]\d+)?%?( \([\d., to]+\))?")
PICTURES = "report"  # folder of the pictures, beside the page


class Table(NamedTuple):
    """Text in rows and columns; the first column names the rows.

    Attributes:
        header: Names of the columns.
        rows: Cells.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Picture(NamedTuple):
    """A chart.

    Attributes:
        name: Of its file, unique.
        svg: An `<svg>` element in the colours of the page.
        caption: What it shows.
    """

    name: str
    svg: Markup
    caption: str


class Section(NamedTuple):
    """A heading, text, then pictures and tables.

    Attributes:
        title: Heading.
        text: Paragraphs; `code` in backticks.
        pictures: Charts.
        tables: By their heading, which may be empty.
    """

    title: str
    text: Sequence[str]
    pictures: Sequence[Picture] = ()
    tables: Sequence[tuple[str, Table]] = ()


def markdown(section: Section) -> str:
    """Return a section as Markdown; pictures are linked as files."""
    parts = [f"## {section.title}", *section.text]
    for picture in section.pictures:
        parts += [f"![{picture.caption}]({PICTURES}/{picture.name}.svg)", picture.caption]
    for heading, table in section.tables:
        parts += [f"### {heading}"] if heading else []
        parts.append(_markdown_table(table))
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in table.rows]
    sides = ["--:" if right else "---" for right in _is_right(table)]
    lines = [table.header, sides, *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _is_right(table: Table) -> list[bool]:
    """Tell which columns hold numbers, or nothing."""
    columns = list(zip(*table.rows, strict=True)) or [()] * len(table.header)
    return [
        i > 0 and any(column) and all(not cell or _NUMBER.fullmatch(cell) for cell in column)
        for i, column in enumerate(columns)
    ]


_SECTION = Template("<section><h2>$title</h2>$text$pictures$tables</section>")
_PICTURES = Template('<div class="pair">$figures</div>')
_FIGURE = Template('<figure class="panel">$svg<figcaption>$caption</figcaption></figure>')
_TABLE = Template('$heading<div class="panel scroll">$table</div>')
# What the sections need beside the style of all pages.
STYLE = Markup("""<style>
.scroll { padding: 6px 18px; margin-top: 16px; overflow-x: auto; }
.scroll th, .scroll td { overflow-wrap: normal; }
.pair + h3, .scroll + h3 { margin-top: 26px; }
code { font-family: var(--mono); font-size: .9em; overflow-wrap: anywhere; }
a { color: var(--first); }
</style>""")


def html(section: Section) -> Markup:
    """Return a section as HTML, its pictures inside."""
    figures = [
        template.fill(_FIGURE, svg=picture.svg, caption=_inline(picture.caption))
        for picture in section.pictures
    ]
    if len(figures) % 2:  # keeps the last chart as wide as the others
        figures.append(template.NO_RANK)
    pictures = template.fill(_PICTURES, figures=Markup("".join(figures))) if figures else Markup()
    return template.fill(
        _SECTION,
        title=section.title,
        text=Markup("".join(f"<p>{_inline(text)}</p>" for text in section.text)),
        pictures=pictures,
        tables=Markup("".join(_html_table(*pair) for pair in section.tables)),
    )


def _html_table(heading: str, table: Table) -> Markup:
    """Return a table that scrolls on its own where the page is narrow."""
    rows = [[_inline(cell) for cell in row] for row in table.rows]
    return template.fill(
        _TABLE,
        heading=Markup(f"<h3>{escape(heading)}</h3>" if heading else ""),
        table=template.table(table.header, rows),
    )


def _inline(text: str) -> Markup:
    """Escape text; `code`, **bold** and [links](target) become elements."""
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    safe = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", safe)
    return Markup(re.sub(r"\[([^]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', safe))
