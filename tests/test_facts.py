"""Facts for reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastclr import facts
from fastclr.facts import free_memory, hardware, num_cores, redacted, versions


def test_secrets_are_taken_out_at_any_depth():
    settings = {
        "comet": {"api_key": "hidden-1", "project": "mine"},
        "list": [{"Password": "hidden-2"}, 3],
        "token": {"inner": "hidden-3"},
        "train_batch_size": 256,
    }
    clean = redacted(settings)
    assert "hidden" not in json.dumps(clean)
    assert clean["comet"]["project"] == "mine" and clean["list"][1] == 3
    assert clean["train_batch_size"] == 256
    assert settings["comet"]["api_key"] == "hidden-1", "the original stays as it is"


def test_versions_and_hardware_are_told():
    assert versions()["torch"][0].isdigit()
    found = hardware("cpu")
    assert found["device"] == "cpu" and found["processor"]
    assert found["cores"] == num_cores() >= 1


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/venv/bin/fastclr", "report", "--run", "x"], "fastclr report --run x"),
        (["/site/fastclr/__main__.py", "--local_rank=1", "train"], "fastclr train"),
        (["tools/study.py", "heads"], "python tools/study.py heads"),
    ],
)
def test_a_command_is_told_as_it_is_typed(monkeypatch, argv, expected):
    monkeypatch.setattr("sys.argv", argv)
    assert " ".join(facts.typed()) == expected


def limit_memory(folder: Path, limit: str, current: int, cache: int) -> None:
    """Write what a control group of version 2 tells."""
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\nactive_file 7\n")


def test_free_memory_is_what_the_control_group_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "CONTROL_GROUP", tmp_path)
    of_machine = free_memory()  # no group
    assert of_machine > 2**20
    limit_memory(tmp_path, "max", 10, 3)
    assert free_memory() > of_machine / 2
    limit_memory(tmp_path, "1000000", 400_000, 50_000)
    assert free_memory() == 650_000
    limit_memory(tmp_path, "1000000", 1_400_000, 0)
    assert free_memory() == 0
