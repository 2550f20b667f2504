"""All results on one page: ``REPORT.md``, and ``REPORT.html`` which needs nothing beside it.

python benchmarks/report.py [--results benchmarks/results]

Renders the rows that lie in the folder; what is missing is said. The pictures of ``REPORT.md`` go
into ``report/`` beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import tyro
from report_parts import growth, kernels, sections
from report_parts.rows import Row, devices, read_rows
from report_parts.section import PICTURES, STYLE, Section, html, markdown

from fastclr.files import write_durably
from fastclr.report import template
from fastclr.report.curves import standalone
from fastclr.report.template import Markup

RESULTS = Path(__file__).with_name("results")
TITLE = "Benchmarks"
SECTIONS: tuple[Callable[[Mapping[str, Sequence[Row]]], Section], ...] = (
    sections.throughput,
    growth.scaling,
    sections.beside_others,
    growth.costs,
    sections.trainer,
    kernels.loss,
    kernels.optimizer,
    kernels.roofline,
)


def read_all(folder: Path) -> dict[str, list[Row]]:
    """Return the rows of every file by its name; known files that are missing have none."""
    names = [*sections.FILES, *sorted(file.name for file in folder.glob("*.jsonl"))]
    return {name: read_rows(folder / name) for name in dict.fromkeys(names)}


def read_pages(folder: Path) -> dict[str, str]:
    """Return the first heading of every other page in the folder, by its name."""
    pages = sorted(set(folder.glob("*.md")) - {folder / "REPORT.md"})
    first = {page.name: page.read_text(encoding="utf-8").partition("\n")[0] for page in pages}
    return {name: line.lstrip("# ") for name, line in first.items()}


def lead(files: Mapping[str, Sequence[Row]]) -> str:
    """Return what the page is, in two sentences."""
    gpus = [d for rows in files.values() for d in devices(rows) if d != "cpu"]
    ran = f"GPUs: {', '.join(dict.fromkeys(gpus))}." if gpus else "Nothing here has run on a GPU."
    return f"Made by `python benchmarks/report.py` from the rows beside it. {ran}"


def write(folder: Path) -> list[Path]:
    """Write both pages and the pictures of the first; return what was written."""
    files = read_all(folder)
    made = [sections.overview(files, read_pages(folder)), *(make(files) for make in SECTIONS)]
    pictures = folder / PICTURES
    pictures.mkdir(exist_ok=True)
    written = []
    for picture in (picture for section in made for picture in section.pictures):
        written.append(pictures / f"{picture.name}.svg")
        write_durably(written[-1], standalone(picture.svg) + "\n")
    for stale in set(pictures.glob("*.svg")) - set(written):
        stale.unlink()
    text = "\n".join([f"# {TITLE}\n\n{lead(files)}\n", *map(markdown, made)])
    write_durably(folder / "REPORT.md", text)
    header = Markup(
        f'<p class="kicker">fastclr</p><h1>{TITLE}</h1>'
        f'<p class="summary">{lead(files).replace("`", "")}</p>'
    )
    write_durably(folder / "REPORT.html", template.page(TITLE, [STYLE, header, *map(html, made)]))
    return [folder / "REPORT.md", folder / "REPORT.html", *written]


def main(results: Path = RESULTS) -> None:
    """Write the pages.

    Args:
        results: Folder of the rows; the pages go there.
    """
    for path in write(results):
        print(path)


if __name__ == "__main__":
    tyro.cli(main)
