"""The pages of docs/: their blocks run, what they name is there, their links lead somewhere."""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

from fastclr import commands, ds_config, recipes, train
from fastclr.cli import EXIT_CODES
from fastclr.config import Config, OptimizerConfig
from fastclr.export import FORMATS
from fastclr.protocols import NAMES
from fastclr.studies import STUDIES
from fastclr.studies.scales import SCALES
from fastclr.world import World
from pipelines.backends import BACKENDS
from pipelines.photos import write_photo_tiles
from pipelines.writer import write_shards
from tests.fenced import blocks, without_blocks
from tests.fenced import commands as commands_of

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {str(file.relative_to(DOCS)): file for file in sorted(DOCS.rglob("*.md"))}
RUN = [name for name, file in PAGES.items() if blocks(file.read_text(encoding="utf-8"))]
RESULTS = ROOT / "benchmarks" / "results"

# What needs more than this machine has, or has a test of its own: its flags are parsed here.
PARSED = {
    "s3://": "tests/pipelines/test_remote_sets.py",
    "https://": "tests/pipelines/test_remote_sets.py",
    "deepspeed ": "tests/end_to_end/test_module.py",
    "torchrun ": "tests/drills/two_hosts.py",
    "exec fastclr": "tests/test_world.py",  # a task of SLURM
    "make ": "tests/test_readme.py",
    "fastclr pretrain": "tests/commands/test_pretrain.py",
    "fastclr.pretrain": "tests/commands/test_pretrain.py",
    "fastclr fetch": "tests/commands/test_fetch.py",
    "fastclr bench": "tests/throughput/test_throughput.py",
    "tuned.flags": "tests/throughput/test_throughput.py",
    "fastclr verify --ds-config": "tests/verify/test_verify.py",
    "fastclr study": "tests/commands/test_study.py",
    "linear-sgd": "tests/commands/test_evaluate.py",
    "--protocol finetune": "tests/commands/test_evaluate.py",
    "--protocol transfer": "tests/commands/test_evaluate.py",
    "data/images/cifar10/": "tests/pipelines/test_cifar10.py",
    "data/cifar10/": "tests/test_readme.py",
}
SHELL = ("export ", "code=", "if ", "  scontrol ", "fi", "exit ", "srun ")  # of a batch script
TOY = shlex.split(
    "--minutes None --epochs 1 --global-batch-size 16 --encoder.name resnet8 --encoder.width 0.125 "
    "--encoder.stem small_stride2 --views.size 32 --head.output-dim 8 --optimizer.warmup-epochs 0 "
    "--log-every 1"
)
# Flags of other programs, and of the launchers.
OTHERS = {
    "--help", "--hostfile", "--max-restarts", "--module", "--no_ssh", "--num_accelerators",
    "--tyro-print-completion",
}  # fmt: skip


@functools.cache
def text_of(name: str) -> str:
    return PAGES[name].read_text(encoding="utf-8")


def why_parsed(text: str) -> str | None:
    """Return the test that runs a command or code; None if it is run here."""
    return next((test for sign, test in PARSED.items() if sign in text), None)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make images, packed sets and a trained run, to be copied."""
    folder = tmp_path_factory.mktemp("built")
    write_photo_tiles(folder / "images", train_per_photo=6, test_per_photo=2)
    for split in ("train", "test"):
        write_shards(folder / "images" / split, folder / split, num_workers=1)
    words = ["--ds-config", "fp32", "--recipe", "cifar10-cpu", "--data.train"]
    assert train.main([*words, f"{folder}/train", "--run-dir", f"{folder}/run", *TOY]) == 0
    return folder


@pytest.fixture(scope="module")
def sandboxes(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder that a page's blocks run in, one after the other."""

    @functools.cache
    def sandbox(page: str) -> Path:
        folder = tmp_path_factory.mktemp("page")
        (folder / "path/to").mkdir(parents=True)
        (folder / "path/to/images").symlink_to(built / "images")
        (folder / "runs/throughput").mkdir(parents=True)
        (folder / "runs/throughput/tuned.flags").write_text("--no-compile\n--data.prefetch 8\n")
        found = blocks(text_of(page), "json")
        ds = json.loads(found[0].text) if found else {}
        if found:
            ds |= {"train_batch_size": 16, "gradient_accumulation_steps": 2}
        (folder / "ds.json").write_text(json.dumps(ds))
        return folder

    return sandbox


@pytest.fixture
def provide(built: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, list[str]], None]:
    """Return what goes to a page's folder, and puts there what words name and nothing made."""

    def enter(folder: Path, words: list[str]) -> None:
        monkeypatch.chdir(folder)
        for flag, word in zip(["", *words], words, strict=False):
            place = Path(word)
            if flag in ("--out", "--run-dir") or place.exists():
                continue
            if word.startswith("runs/"):
                shutil.copytree(built / "run", place)
            elif word.startswith("data/"):
                kind = "images/" * word.startswith("data/photos") + place.name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(built / kind)

    return enter


def parse(words: list[str]) -> None:
    """Parse the flags of a part of the command as it does; a wrong one ends the test."""
    name, *flags = words
    part = commands.PARTS[name]
    if name == "train":
        train.parse(flags)
    elif name == "bench":
        from fastclr.throughput.command import Options

        _, rest = tyro.cli(Options, args=flags, return_unknown_args=True)
        tyro.cli(Config, default=recipes.RECIPES["demo"](), args=rest)
    else:
        module = __import__(part.home, fromlist=[part.function])
        function = getattr(module, part.function)
        given = tyro.cli(functools.wraps(function)(lambda *args, **kwargs: kwargs), args=flags)
        if name == "study":
            assert given["name"] in {*STUDIES, "all"} and given["scale"] in SCALES
        if name == "export":
            assert given["to"] in FORMATS


def after_launcher(words: list[str]) -> list[str]:
    """Parse a launcher's own flags; return the words behind ``fastclr``."""
    if words[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        found = parse_args(words[1:])
        assert found.module and found.user_script == "fastclr"
        return found.user_args
    if words[0] == "torchrun":
        from torch.distributed.run import parse_args

        found = parse_args(words[1:])
        assert found.module and found.training_script == "fastclr"
        return found.training_script_args
    assert words[0] == "fastclr", f"what is {words[0]}?"
    return words[1:]


def check_command(line: str, folder: Path, enter: Callable[[Path, list[str]], None]) -> None:
    """Run a command, training at a toy's size; or parse it, if something else runs it."""
    if line.startswith("make "):
        assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    enter(folder, [])
    words = after_launcher(shlex.split(line.removeprefix("exec ")))
    parse(words)
    if why_parsed(line):
        return
    enter(folder, words)
    toy = TOY if words[0] == "train" else []
    assert commands.main([*words, *toy]) == 0, line


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
def test_blocks_run(
    page: str,
    sandboxes: Callable[[str], Path],
    provide: Callable[[Path, list[str]], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder, namespace = sandboxes(page), {}
    for block in blocks(text_of(page)):
        if block.language == "json":
            check_json(block.text)
        elif block.language == "python":
            code = compile(block.text, f"{page}, python", "exec")
            if not why_parsed(block.text):
                provide(folder, re.findall(r'"(data/[^"]+)"', block.text))
                exec(code, namespace)
        else:
            assert block.language == "bash", f"{page}: nothing runs {block.language!r}"
            subprocess.run(["bash", "-n", "-c", block.text], check=True)
            for line in commands_of(block.text):
                if not line.startswith(SHELL):
                    check_command(line, folder, provide)


def test_what_is_only_parsed_is_run_elsewhere() -> None:
    everything = "\n".join(block.text for name in RUN for block in blocks(text_of(name)))
    for sign, test in PARSED.items():
        assert sign in everything, f"{sign!r} stands on no page any more"
        assert (ROOT / test).exists()


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
