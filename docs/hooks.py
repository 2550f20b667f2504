"""What the site has besides docs/: pages of the repository that docs/ links to, and their links.

As plain Markdown a link of docs/ to the repository begins with ``../``; in the site, whose root is
docs/, the same files lie below it.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = (
    "README.md",
    "SECURITY.md",
    "CONTRIBUTING.md",
    "benchmarks/results/**/*",
    "fastclr/studies/RESULTS.md",
    "fastclr/studies/results/**/*.svg",
)
KINDS = (".md", ".svg", ".jsonl")
RENAMED = {"README.md": "the_readme.md"}  # mkdocs would take it for the site's first page
_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")
_ROLE = re.compile(r":(?:class|func|mod|data|meth|attr|exc):<code>(~?)([^<]+)</code>")


@functools.cache
def published() -> dict[str, str]:
    """Return the repository's files that are part of the site: path in it -> path here."""
    found = {path for pattern in PUBLISHED for path in ROOT.glob(pattern)}
    paths = sorted(str(p.relative_to(ROOT)) for p in found if p.is_file() and p.suffix in KINDS)
    return {RENAMED.get(path, path): path for path in paths}


def on_files(files: Files, config: Any) -> Files:
    """Add them."""
    for there, here in published().items():
        files.append(File.generated(config, there, abs_src_path=str(ROOT / here)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Point links at where their files lie in the site; a link to code becomes its text."""
    source = page.file.src_uri
    if source not in published():
        markdown = markdown.replace("](../", "](") if "/" not in source else markdown
        return functools.reduce(
            lambda text, names: text.replace(f"]({names[0]}", f"]({names[1]}"),
            RENAMED.items(),
            markdown,
        )
    folder = Path(published()[source]).parent

    def kept(found: re.Match[str]) -> str:
        target = Path(folder, found[2]).as_posix()
        return found[0] if files.get_file_from_path(target) is not None else found[1]

    return _LINK.sub(kept, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Make names of the docstrings' roles links, where the site has what they name."""

    def link(found: re.Match[str]) -> str:
        name = found[2]
        shown = name.rpartition(".")[2] if found[1] else name
        return f'<autoref identifier="{name}" optional><code>{shown}</code></autoref>'

    return _ROLE.sub(link, html)
