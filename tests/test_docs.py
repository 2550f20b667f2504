"""The pages of docs/: their blocks run, what they name is there, their links lead somewhere."""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from fastclr import commands, ds_config, recipes
from fastclr.cli import EXIT_CODES
from fastclr.config import Config, OptimizerConfig
from fastclr.export import FORMATS
from fastclr.protocols import NAMES
from fastclr.studies import STUDIES
from fastclr.studies.scales import SCALES
from fastclr.world import World
from pipelines.backends import BACKENDS
from tests.fenced import blocks, without_blocks
from tests.fenced import commands as commands_of
from tests.nodes import launch, run_batch
from tests.toys import (
    SHORT,
    make_toys,
    shortened,
    small_data_sets,
    stores,
    with_toy_flags,
)

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {str(file.relative_to(DOCS)): file for file in sorted(DOCS.rglob("*.md"))}
RUN = [name for name, file in PAGES.items() if blocks(file.read_text(encoding="utf-8"))]
RESULTS = ROOT / "benchmarks" / "results"

# Flags of other programs, and of the launchers.
OTHERS = {
    "--help", "--hostfile", "--max-restarts", "--module", "--no_ssh", "--num_accelerators",
    "--tyro-print-completion",
}  # fmt: skip


@functools.cache
def text_of(name: str) -> str:
    return PAGES[name].read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make images, packed sets and a trained run, to be copied."""
    folder = tmp_path_factory.mktemp("toys")
    make_toys(folder)
    return folder


@pytest.fixture
def sandbox(page: str, toys: Path, tmp_path: Path) -> Iterator[Path]:
    """Enter the folder that a page's blocks run in, one after the other."""
    with pytest.MonkeyPatch.context() as patch, small_data_sets():
        patch.chdir(tmp_path)
        (tmp_path / "path/to").mkdir(parents=True)
        (tmp_path / "path/to/images").symlink_to(toys / "images")
        found = blocks(text_of(page), "json")
        ds = json.loads(found[0].text) if found else {}
        if found:
            ds |= {"train_batch_size": 16, "gradient_accumulation_steps": 2}
        (tmp_path / "ds.json").write_text(json.dumps(ds))
        # What an earlier call found: the toy's has little time to tune.
        (tmp_path / "runs/throughput").mkdir(parents=True)
        (tmp_path / "runs/throughput/tuned.json").write_text("{}")
        (tmp_path / "runs/throughput/tuned.flags").write_text("--data.prefetch 8\n")
        yield tmp_path


def provide(toys: Path, text: str) -> None:
    """Put into the folder what a command or code reads there and nothing made."""
    made = re.findall(r"--(?:out|run-dir) (\S+)", text)
    for place in map(Path, re.findall(r"(?<![\w/])data/[\w/.]+|(?<= )runs/[\w/.]+", text)):
        if place.exists() or str(place) in made or place.suffix:
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.parts[0] == "runs":
            shutil.copytree(toys / "run", place)
        else:
            place.symlink_to(toys / place.name if place.name in ("train", "test") else toys)


def check_command(line: str, toys: Path) -> None:
    """Run a command, at a toy's size."""
    if line.startswith("make "):  # tests/test_readme.py runs them
        assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    provide(toys, line)
    launcher, _, rest = line.rpartition(" fastclr ")
    words = shlex.split(rest if launcher else line.removeprefix("fastclr "))
    flags = SHORT.get(words[0], [])
    if launcher and words[0] == "train":
        check_launch(line, words, flags)
    elif launcher:
        launch(line, Path.cwd(), flags)
    else:
        assert line.startswith("fastclr "), f"what is {line}?"
        assert commands.main([*words, *flags]) == 0, line


def check_launch(line: str, words: list[str], flags: list[str]) -> None:
    """Train by a launcher; a run that is there goes on from its last checkpoint but one."""
    run_dir = Path(words[words.index("--run-dir") + 1])
    for newest in sorted(run_dir.glob("checkpoints/step-*"))[-1:]:
        shutil.rmtree(newest)
    before = len([*run_dir.glob("ledger/start-*-rank-00000.jsonl")])
    num_ranks = launch(line, Path.cwd(), [*flags, "--checkpoint-every", "3"])
    of_ranks = [file.read_text() for file in run_dir.glob(f"ledger/start-{before:04d}-rank-*")]
    steps = [text.count('"ids"') for text in of_ranks]
    assert steps == [3 if before else 6] * num_ranks, line


def check_json(text: str) -> None:
    """Merge a DeepSpeed JSON with settings that leave it all it may own."""
    ds = json.loads(text)
    schedule = "none" if "scheduler" in ds else "cosine"
    config = Config(
        run_dir="runs/x", epochs=1, optimizer=OptimizerConfig(schedule=schedule),
        global_batch_size=ds.get("train_batch_size", 4096),
    )  # fmt: skip
    config = Config(**{**vars(config), "data": type(config.data)(train="data/x")})
    resolved, merged = ds_config.resolve(config, ds, World(0, 8))
    assert merged["train_batch_size"] == resolved.global_batch_size
    assert resolved.optimizer.name == ds.get("optimizer", {}).get("type", "LARS")


@pytest.mark.parametrize("page", RUN)
def test_blocks_run(page: str, toys: Path, sandbox: Path) -> None:
    namespace: dict[str, Any] = {}
    with stores(toys) if "https://host" in text_of(page) else nullcontext("") as host:
        for block in blocks(text_of(page)):
            text = shortened(block.text, host)
            if block.language == "json":
                check_json(text)
            elif block.language == "python":
                provide(toys, text)
                exec(compile(text, f"{page}, python", "exec"), namespace)
            elif "SLURM_PROCID" in text:
                assert "`rank.sh`" in text_of(page)
                (sandbox / "rank.sh").write_text(with_toy_flags(text))
                provide(toys, text)
            elif "#SBATCH" in text:
                run_batch(text, sandbox)
            else:
                assert block.language == "bash", f"{page}: nothing runs {block.language!r}"
                for line in commands_of(text):
                    check_command(line, toys)


def test_a_batch_script_gives_a_preempted_job_back_to_the_queue(tmp_path: Path) -> None:
    (script,) = [b.text for b in blocks(text_of("ranks.md"), "bash") if "#SBATCH" in b.text]
    for code, requeued in ((75, True), (76, True), (1, False)):
        (tmp_path / "rank.sh").write_text(f"[ $SLURM_PROCID = 1 ] && exit {code}; exit 0")
        run_batch(shortened(script), tmp_path, code)
        queue = tmp_path / "scontrol.txt"
        assert queue.exists() == requeued
        if requeued:
            assert queue.read_text() == "requeue 7\n"
            queue.unlink()


def links() -> Iterator[tuple[str, str, str]]:
    """Yield page, target and anchor of each link."""
    for name, file in {**PAGES, "../README.md": ROOT / "README.md"}.items():
        prose = without_blocks(file.read_text(encoding="utf-8"))
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]+)?\)", prose):
            yield name, target, anchor


def test_links_lead_somewhere() -> None:
    for name, target, anchor in links():
        file = (DOCS / name).parent / target if target else DOCS / name
        assert file.exists(), f"{name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", without_blocks(file.read_text()), re.MULTILINE)
            slugs = [re.sub(r"\W+", "-", heading).strip("-").lower() for heading in headings]
            assert anchor[1:] in slugs, f"{name}: {target}{anchor}"


def test_pages_are_in_the_navigation_and_linked() -> None:
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    first = text_of("index.md") + text_of("api/index.md")
    for name in PAGES:
        assert re.search(rf"[:-] {name}$", listed, re.MULTILINE), f"{name} is in no menu"
        assert name.endswith("index.md") or f"({Path(name).name})" in first
    for notebook in (DOCS / "notebooks").glob("*.ipynb"):
        assert f"(notebooks/{notebook.name})" in first


def inline(name: str) -> list[str]:
    """Return what stands between backticks in a page's prose."""
    return re.findall(r"`([^`]+)`", " ".join(without_blocks(text_of(name)).split()))


def extras() -> set[str]:
    """Return the names of the project's extras."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE))


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Return the flags of all parts of the command, out of its completion."""
    file = tmp_path_factory.mktemp("completion") / "fastclr.bash"
    with pytest.raises(SystemExit):
        commands.main(["--tyro-write-completion", "bash", str(file)])
    return set(re.findall(r"--[A-Za-z][\w.-]*", file.read_text()))


@pytest.mark.parametrize("name", PAGES)
def test_flags_and_files_in_prose_exist(name: str, flags: set[str]) -> None:
    for code in inline(name):
        named = set(re.findall(r"(?<!\S)--[a-z][\w.-]*", code))
        assert named <= flags | OTHERS, f"{name}: {named - flags - OTHERS}"
        if re.fullmatch(r"(fastclr|pipelines|tests|benchmarks|tools)/[\w/.]+", code):
            assert (ROOT / code).exists(), f"{name}: {code}"
        if found := re.fullmatch(r"(fastclr|pipelines)(\.\w+)+", code):
            path = ROOT / found[0].replace(".", "/")
            known = path.is_dir() or path.with_suffix(".py").exists() or path.parent.is_dir()
            assert known or path.parent.with_suffix(".py").exists(), f"{name}: {code}"
    for given in re.findall(r"pip install '[^'\[]*\[([^\]]+)\]'", text_of(name)):
        assert set(given.split(",")) <= extras()


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("backends.md", BACKENDS),
        ("evaluation.md", NAMES),
        ("export.md", FORMATS),
        ("index.md", commands.PARTS),
        ("papers.md", (*recipes.RECIPES, *STUDIES, *SCALES)),
        ("reliability.md", ("FASTCLR_TRUST_FOLDER=1", "FASTCLR_ALLOW_INTERNAL=1")),
    ],
)
def test_pages_tell_of_everything_of_their_kind(page: str, names: Any) -> None:
    assert not set(names) - set(inline(page))


def test_all_exit_codes_are_told() -> None:
    for code in EXIT_CODES.values():
        assert f"\n| {code} | " in text_of("reliability.md")


def test_extras_are_told() -> None:
    assert {"dali", "dev"} <= extras() <= set(inline("index.md"))


@pytest.mark.parametrize(
    ("page", "results"),
    [("backends.md", ["data_plane.md"]), ("deepspeed.md", ["REPORT.md"])],
)
def test_measured_tables_are_those_of_the_results(page: str, results: list[str]) -> None:
    """Numbers are copied from results: those that were measured anew are copied anew."""
    measured = "".join((RESULTS / name).read_text(encoding="utf-8") for name in results)
    rows = re.findall(r"^\|.*\d\.?\d*,?\d+ \|$", text_of(page).partition("Measured")[2], re.M)
    assert len(rows) >= 4
    for row in rows:
        for number in re.findall(r"(?<=\| )\d[\d.,]+(?= \|)", row):
            assert f" {number} |" in measured, f"{page}: {number} in {row}"
