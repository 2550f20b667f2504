"""The guard of ratios: a loss of 26 % fails, one of 24 % passes, a day's noise is asked again."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script(imported) -> ModuleType:
    return imported("check")


def peer(part: str, variant: str, ratio: float, **sizes: int) -> dict[str, Any]:
    return {"name": f"peers {part}", "variant": variant, "ratio": ratio, "sizes": sizes}


def timed(name: str, variant: str, seconds: list[float], **sizes: str) -> dict[str, Any]:
    return {
        "name": name,
        "variant": variant,
        "p50_seconds": 1.0,
        "seconds": seconds,
        "sizes": sizes,
    }


def planted(folder: Path) -> Path:
    """Write results: 4 times lightly's step, trainer and LARS at 0.9 of what is possible."""
    files = {
        "peers.jsonl": [
            peer("step", "fastclr", 1.0, side=32, batch=256),
            peer("step", "lightly", 4.0, side=32, batch=256),
            peer("loss", "lightly", 2.0, batch=2048, dim=64),
            peer("memory", "lightly", 9.0, side=32, batch=4096),
        ],
        "trainer.jsonl": [
            timed("ten steps", "trainer", [10.0, 20.0, 10.0]),
            timed("ten steps", "bare loop", [9.0, 18.0, 1.0]),
        ],
        "lars.jsonl": [
            timed("optimizer step", what, [factor * s for s in seconds], model=model)
            for model, factor in (("resnet50", 1.0), ("other", 5.0))
            for what, seconds in (
                ("fastclr", [1.0, 2.0, 4.0]), ("floor: memory, by a triad", [0.9, 1.8, 9.0]),
                ("lightly", [2.0, 2.0, 2.0]),
            )
        ],
    }  # fmt: skip
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_ratios_that_lie_there(script: ModuleType, tmp_path: Path) -> None:
    assert script.checked_in(planted(tmp_path)) == pytest.approx({
        "lightly / fastclr, step, 32 px": 4.0,
        "lightly / fastclr, loss, N = 2,048": 2.0,
        "lightly / fastclr, memory, 32 px": 9.0,
        script.TRAINER: 0.9,
        script.LARS: 0.9,
    })  # fmt: skip
    assert script.checked_in(tmp_path / "nothing") == {}


@pytest.mark.parametrize(("left", "fails"), [(0.74, True), (0.76, False), (1.5, False)])
@pytest.mark.parametrize("which", ["step", "trainer"])
def test_a_loss_of_over_a_quarter_fails(
    script: ModuleType, monkeypatch, capsys, tmp_path: Path, which: str, left: float, fails: bool
) -> None:
    step = "lightly / fastclr, step, 32 px"
    fresh = {step: 4.0, script.TRAINER: 0.9, "new, nowhere checked in": 0.01}
    fresh[step if which == "step" else script.TRAINER] *= left
    calls: list[Path] = []

    def guard(folder: Path) -> dict[str, float]:
        calls.append(folder)
        return dict(fresh)

    monkeypatch.setattr(script, "GUARDS", {"planted": guard})
    planted(tmp_path)
    if fails:
        with pytest.raises(SystemExit, match="1 of 2 lost over 25%") as error:
            script.main(results=tmp_path)
        assert error.value.code != 0
    else:
        script.main(results=tmp_path)
    said = capsys.readouterr().out
    assert said.count("LOST") == fails and "-26%" in said if fails else "LOST" not in said
    assert len(calls) == (2 if fails else 1)


def test_a_second_look_can_acquit(script: ModuleType, monkeypatch, tmp_path: Path) -> None:
    ratios = iter([0.2, 0.85])
    monkeypatch.setattr(script, "GUARDS", {"planted": lambda _: {script.TRAINER: next(ratios)}})
    script.main(results=planted(tmp_path))
    assert next(ratios, None) is None


def test_there_is_no_second_look_without_time(
    script: ModuleType, monkeypatch, tmp_path: Path
) -> None:
    ratios = iter([0.2, 0.9])
    monkeypatch.setattr(script, "GUARDS", {"planted": lambda _: {script.TRAINER: next(ratios)}})
    with pytest.raises(SystemExit):
        script.main(minutes=0, results=planted(tmp_path))
    assert next(ratios) == 0.9


def test_nothing_to_compare_with_is_an_error(script: ModuleType, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(script, "GUARDS", {"planted": lambda _: {script.TRAINER: 0.9}})
    with pytest.raises(SystemExit, match="no ratio to compare with"):
        script.main(results=tmp_path)


def test_the_guards_name_what_the_long_runs_name(script: ModuleType) -> None:
    """Results checked in are found by the names of a short run; LARS is the quickest to run."""
    found = script.run_lars(Path("unused"))
    assert found.keys() <= script.checked_in(FOLDER / "results").keys()
    assert 0.05 < found[script.LARS] < 5


def test_one_part_alone(script: ModuleType, monkeypatch, capsys, tmp_path: Path) -> None:
    guards = {"that": lambda _: {script.TRAINER: 0.9}, "never": lambda _: 1 / 0}
    monkeypatch.setattr(script, "GUARDS", guards)
    script.main(only=("that",), results=planted(tmp_path))
    assert script.TRAINER in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"no part \['other'\]: give of \['that', 'never'\]"):
        script.main(only=("other",), results=tmp_path)
