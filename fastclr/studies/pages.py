"""``RESULTS.md`` and ``studies.html``: all studies that are there, from their ``study.json``."""

from __future__ import annotations

import json
import math
from operator import itemgetter
from pathlib import Path
from typing import Any

from fastclr.config import ConfigError
from fastclr.files import write_durably, write_json
from fastclr.report import charts, template
from fastclr.report.template import Markup
from fastclr.studies import STUDIES
from fastclr.studies.figures import caption, figure
from fastclr.studies.verdicts import RULE

JSON = dict[str, Any]

INTRODUCTION = (
    "Experiments of the literature, made again with this trainer, as obtained, including what does "
    "not come out. Pilots are small: they can show whether an effect is there, not how large it is "
    "at the size of the source. Numbers beside them are the sources' own, of other data, encoders "
    "and lengths."
)


def write_study(folder: Path, study: JSON) -> None:
    """Write ``study.json`` and ``figure.svg`` of a study into its folder."""
    write_json(folder / "study.json", study)
    if chart := figure(study):
        write_durably(folder / "figure.svg", charts.standalone(chart))


def read_studies(results: Path) -> list[JSON]:
    """Read all studies: pilots first, each scale in the order of ``STUDIES``.

    Raises:
        ConfigError: If a file is damaged.
    """
    studies = []
    for file in sorted(results.glob("*/*/study.json")):
        try:
            study = json.loads(file.read_text(encoding="utf-8"))
            itemgetter("seconds", "verdicts")(study)  # older ones lack the first
            studies.append(study)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file} is damaged, or of another version ({error!r}): delete it and start its "
                "study again, which makes it from the rows."
            ) from error
    scales, names = ("pilot", "small", "cifar10", "paper", "toy"), list(STUDIES)
    known = [study for study in studies if study["name"] in names]
    return sorted(known, key=lambda s: (scales.index(s["scale"]), names.index(s["name"])))


def write_pages(out: Path) -> None:
    """Write both pages into ``out`` from the studies in ``out/results``."""
    studies = read_studies(out / "results")
    write_durably(out / "RESULTS.md", markdown(studies))
    write_durably(out / "studies.html", html(studies))


def markdown(studies: list[JSON]) -> str:
    """Return all studies as Markdown; figures are linked by their place under ``results``."""
    parts = ["# Studies", INTRODUCTION, RULE]
    for study in studies:
        place = f"results/{study['name']}/{study['scale']}"
        parts += [f"## {study['title']} ({study['scale']})", f"{study['question']}"]
        parts.append(_table_markdown(_header(study), _rows(study)))
        if study["done"]:
            parts.append(f"![{study['title']}]({place}/figure.svg)")
        parts.append(_table_markdown(_CLAIMS, _claims(study)))
        parts.append(f"{_provenance(study)} `{study['command']}`")
    return "\n\n".join(parts) + "\n"


def html(studies: list[JSON]) -> str:
    """Return all studies as one page."""
    shared = {digest: s for study in studies for digest, s in study["seconds"].items()}
    what = f"{len(studies)} studies, {len(shared)} runs, {_hours(shared):.1f} hours."
    sections = [
        template.fill(
            template.STUDIES_HEADER,
            title="The experiments of the literature",
            summary=f"{INTRODUCTION} {what}",
            rule=RULE,
        )
    ]
    sections += [
        template.fill(
            template.STUDY,
            title=f"{study['title']} ({study['scale']})",
            question=study["question"],
            table=template.table(_header(study), _rows(study)),
            chart=figure(study),
            caption=caption(study),
            claims=template.table(_CLAIMS, _claims(study)) if study["verdicts"] else Markup(),
            provenance=f"{_provenance(study)} {study['command']}",
        )
        for study in studies
    ]
    return template.page("Studies", sections)


_CLAIMS = ("claim", "difference", "seeds", "verdict")


def _header(study: JSON) -> list[str]:
    published = ["published"] if any(arm["published"] for arm in study["arms"]) else []
    return ["", *study["headings"], "seeds", *published]


def _rows(study: JSON) -> list[list[str]]:
    """Return the lines of a study's table."""
    has_published = len(_header(study)) == len(study["headings"]) + 3
    lines = []
    for arm in study["arms"]:
        seeds = max(cell[2] for cell in arm["values"].values())
        cells = [_cell(arm["values"][h], h in study["plain"]) for h in study["headings"]]
        line = [arm["name"], *cells, str(seeds)]
        lines.append([*line, arm["published"]] if has_published else line)
    return lines


def _cell(cell: list[float | None], is_plain: bool) -> str:
    """Say a mean and its standard error: fractions in per cent."""
    mean, error, _ = cell
    if mean is None:
        return ""
    return _number(mean, error, is_plain)


def _number(mean: float, error: float | None, is_plain: bool, sign: str = "") -> str:
    """Say a number and its standard error; small ones that are no fractions with two digits."""
    factor, digits = (1, 2) if is_plain else (100, 1)
    if is_plain and 1e-6 < abs(mean) < 0.1:
        digits = 1 - math.floor(math.log10(abs(mean)))
    text = f"{factor * mean:{sign}.{digits}f}"
    return text if error is None else f"{text} ± {factor * error:.{digits}f}"


def _claims(study: JSON) -> list[list[str]]:
    """Return the lines of the table of claims."""
    lines = []
    for found in study["verdicts"]:
        difference = ""
        if found["difference"] is not None:
            is_plain = not found["is_percent"]
            difference = _number(found["difference"], found["error"], is_plain, "+")
        lines.append([found["claim"], difference, str(found["seeds"]), found["verdict"]])
    return lines


def _hours(seconds: JSON) -> float:
    """Return the hours of runs; one that several studies share is done once."""
    return sum(seconds.values()) / 3600


def _provenance(study: JSON) -> str:
    """Say where a study's numbers are from."""
    images = study["images"]
    return (
        f"Source: {study['source']} {study['done']} of {study['runs']} runs, "
        f"{_hours(study['seconds']):.1f} hours on {'; '.join(study['hardware']) or 'nothing yet'}, "
        f"{' and '.join(study['measured'])}; {images['num_train']} training and "
        f"{images['num_test']} test images of {images['name']}; accuracies in per cent. "
        f"{study['protocol']}"
    ).strip()


def _table_markdown(header: list[str] | tuple[str, ...], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
