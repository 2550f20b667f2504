"""The command that verifies: table, JSON, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastclr.verify
from fastclr.commands import main
from fastclr.verify import Row

ROOT = Path(__file__).parents[2]
FLAGS = ("--json", "rows.json", "--ds-config", "ds.json")


@pytest.mark.slow
def test_it_passes_here(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{}")
    gone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in gone}
    done = subprocess.run(
        [sys.executable, ROOT / "tools/verify.py", "--local_rank=0", *FLAGS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**kept, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "trust ratio of each layer" in done.stdout and "FAIL" not in done.stdout
    last = done.stdout.splitlines()[-1]
    assert "ranks: 1" in last and "ZeRO stage 0, float32" in last and "deepspeed " in last
    told = json.loads((tmp_path / "rows.json").read_text())
    assert told["counts"] == {
        "pass": len(told["rows"]),
        "FAIL": 0,
        "not applicable": 0,
        "not run": 0,
    }
    assert (told["backend"], told["num_ranks"], told["zero_stage"]) == ("gloo", 1, 0)
    assert list((tmp_path / "runs").iterdir()) == []
    assert "step 2/2" not in done.stderr, "the trainer's progress is in the way"


def run(monkeypatch: pytest.MonkeyPatch, *flags: str | Path) -> int:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return main(["verify", *map(str, flags)])


@pytest.mark.parametrize(("status", "code"), [("FAIL", 1), ("not run", 1), ("not applicable", 0)])
def test_one_row_decides(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: str,
    code: int,
) -> None:
    rows = [
        Row("loss", "value", "pass", 0.5, 1.0, "[hidden]"),
        Row("LARS", "ratio", status, note="[why]"),
    ]
    monkeypatch.setattr(fastclr.verify, "verify", lambda *_, **__: rows)
    monkeypatch.setattr(
        fastclr.verify,
        "summary",
        lambda *_: (
            dict.fromkeys(
                ["device", "num_ranks", "backend", "zero_stage", "precision", "accumulation"], "x"
            )
            | {
                "versions": dict.fromkeys(["fastclr", "torch", "deepspeed"], "1"),
                "counts": {status: 1},
            }
        ),
    )
    assert run(monkeypatch) == code
    printed = capsys.readouterr().out
    assert "[why]" in printed and "[hidden]" not in printed and f"1 {status}" in printed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"fp16": {"enabled": true}}', "fp16 at ZeRO stage 0 is refused"),
        ('{"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3}', "make them equal"),
        ("no json", "is no JSON"),
    ],
)
def test_a_json_that_a_run_would_refuse_is_78(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    text: str,
    words: str,
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(text)
    assert run(monkeypatch, "--ds-config", file, "--scratch", tmp_path / "runs") == 78
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and words in printed.err
    assert not (tmp_path / "runs").exists()
