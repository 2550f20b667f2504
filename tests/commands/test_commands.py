"""The one command: light, complete, the same as the tools; completion in a real shell."""

from __future__ import annotations

import ast
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastclr
from fastclr import commands
from fastclr.commands import PARTS, completion, main
from fastclr.config import ConfigError

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "numpy", "tyro", "rich", "deepspeed"}


def test_help_is_instant_and_names_every_part() -> None:
    code = (
        "import json, sys, time; before = time.perf_counter()\n"
        "from fastclr.commands import main\n"
        "assert main(['--help']) == 0\n"
        "print(json.dumps([time.perf_counter() - before, list(sys.modules)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *text, last = done.stdout.splitlines()
    seconds, modules = json.loads(last)
    assert seconds < 0.5 and not HEAVY & set(modules)
    assert len(text) <= 24 and max(map(len, text)) <= 80, "does not fit a screen"
    told = [line.split()[0] for line in text if line.startswith("  ")]
    assert [*PARTS] == told[: len(PARTS)]


@pytest.mark.parametrize("name", PARTS)
def test_a_part_tells_its_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--local_rank=0", name, "--help"])  # as a launcher would put it
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: fastclr {name}" in said and PARTS[name].says


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("name", PARTS)
def test_help_fits_a_screen(
    name: str, columns: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        main([name, "--help"])
    said = capfd.readouterr().out
    framed = [line[2:].rstrip("│ ") for line in said.splitlines() if line.startswith("│")]
    assert framed and len(said.splitlines()) <= 70
    flags = [k for k, line in enumerate(framed) if line.startswith("--")]
    for first, end in itertools.pairwise([*flags, len(framed)]):
        lines = [line.strip() for line in framed[first + 1 : end]]
        text = " ".join(framed[first:end])
        assert "(default: " in text or "(required)" in text, text
        assert "``" not in text
        for line, following in itertools.pairwise(lines):
            if line.endswith(")") and ("(default" in line or "(required" in line):
                break  # what follows is of the next group
            # A line ends where the next word has no place, not where the source ended.
            ends_early = len(line) + len(following.split(" ")[0]) <= columns - 35
            assert not ends_early or line.endswith("]"), (line, following)  # the flag's own


def test_training_tells_its_flags_by_groups(capfd: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["train", *words])
        assert stop.value.code == 0
        return capfd.readouterr().out

    plain = said("--help")
    assert "--run-dir" in plain and "--loss.temperature" not in plain
    groups = re.findall(r"^  --help (\w+)", plain, re.MULTILINE)
    assert groups[-1] == "all" and {"data", "views", "loss", "optimizer"} <= {*groups}
    every = said("--recipe", "demo", "--help", "all")
    for group in groups[:-1]:
        told = said("--recipe", "demo", "--help", group)
        assert f"--{group}." in told and told.rstrip() in every
    both = said("--help", "views", "loss")
    assert "--views.size" in both and "--loss.margin" in both and "--run-dir" not in both


def test_no_flag_is_without_words() -> None:
    for name, function in completion.functions().items():
        assert function.__doc__, name


def test_words_that_are_no_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score"]) == 2
    assert "no command 'score': choose from pretrain, " in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastclr {fastclr.__version__}\n"
    assert main([]) == 0 and "usage: fastclr COMMAND" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["report", "--rum", "x"])
    assert stop.value.code == 2
    assert "--run" in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "code"), [(None, 0), (True, 0), (False, 1), (78, 78)])
def test_what_a_part_says_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, answer: object, code: int
) -> None:
    def run(*_: object) -> object:
        if answer == 78:
            raise ConfigError("it cannot be")
        return answer

    monkeypatch.setattr(commands, "run", run)
    assert main(["replay", "somewhere", "--step", "1"]) == code


def test_tools_are_parts_and_nothing_else() -> None:
    wrapped = set()
    files = [*sorted((ROOT / "tools").glob("*.py")), ROOT / "benchmarks" / "throughput.py"]
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert not [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)], file
        (call,) = (
            node for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "main"
        )  # fmt: skip
        words = call.args[0]
        assert isinstance(words, ast.List) and isinstance(words.elts[0], ast.Constant)
        wrapped.add(words.elts[0].value)
    assert wrapped == PARTS.keys() - {"pretrain", "train"}


def test_a_tool_runs_where_the_repository_is(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "tools/check_shards.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 65 and "is no shard set" in done.stderr


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write what completes in bash."""
    file = tmp_path_factory.mktemp("completion") / "fastclr.bash"
    with pytest.raises(SystemExit) as stop:
        main(["--tyro-write-completion", "bash", str(file)])
    assert not stop.value.code
    return file


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("fastclr pre", "pretrain"),
        ("fastclr evaluate --finetune-e", "--finetune-epochs"),
        ("fastclr train --data.tr", "--data.train"),
        ("fastclr train --recipe cifar10-c", "cifar10-cpu"),
        ("fastclr bench --budget", "--budget-minutes"),
        ("fastclr shards --max-r", "--max-rejected"),
    ],
)
def test_bash_completes(script: Path, typed: str, expected: str) -> None:
    words = typed.split(" ")
    code = (
        f"source {script}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
        f"COMP_LINE='{typed}'; COMP_POINT=${{#COMP_LINE}}; "
        "$(complete -p fastclr | sed 's/.*-F \\([^ ]*\\).*/\\1/') fastclr; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert expected in done.stdout.split(), done.stdout + done.stderr


def test_a_shell_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tyro-print-completion", "cmd"]) == 2
    assert "name a shell: bash" in capsys.readouterr().err
