"""A: going on from a checkpoint. Killed anywhere, with damage of every kind, from any step."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import safetensors.torch
import torch
from drill import Cells, Drill
from forks import Ranks, outcome, train
from kill_resume import killed_runs
from mangling import a_bit_flipped
from rotting import keeps_one_whole

from fastclr import checkpointing
from fastclr.checkpointing import list_checkpoints

NO_TENSOR = AssertionError("a tensor of a checkpoint that does not verify was read")


def killed_at_random(cells: Cells) -> None:
    """A1: SIGKILL to all ranks at random instants; every end is that of the run nobody killed."""
    for ranks, stage, kills_wanted in (
        (1, 0, 1000 if cells.is_long else 20),
        (2, 1, 50 if cells.is_long else 3),
    ):
        where = Counter[str]()
        for number, (kills, wrong) in enumerate(
            killed_runs(cells.folder, ranks, stage, cells.seed)
        ):
            where.update(kill.split()[0] for kill in kills)
            cells.check(
                f"{ranks} ranks, run {number}, killed {'; '.join(kills)}: {wrong}", not wrong
            )
            if sum(where.values()) >= kills_wanted:
                break
        moments = ", ".join(f"{n} {name}" for name, n in sorted(where.items()))
        cells.notes.append(f"{ranks} ranks, stage {stage}: {sum(where.values())} kills ({moments})")


def odd_pointers(cells: Cells) -> None:
    """A5: whatever the pointer is, the newest whole checkpoint is gone on from, with a warning."""
    good, expected = _trained(cells)
    newest, before = list_checkpoints(good / "checkpoints")[::-1][:2]

    def folder_in_the_way(pointer: Path) -> None:
        pointer.unlink()
        pointer.mkdir()
        (pointer / "notes.txt").write_text("somebody's")

    def link(pointer: Path) -> None:
        pointer.unlink()
        pointer.symlink_to("nowhere")

    odd: dict[str, Callable[[Path], object]] = {
        "empty": lambda p: p.write_bytes(b""),
        "NUL": lambda p: p.write_bytes(bytes(20)),
        "missing": lambda p: p.unlink(),
        "a missing checkpoint": lambda p: p.write_text('"step-0000099"'),
        "an older one": lambda p: p.write_text(f'"{before.name}"'),
        "CRLF": lambda p: p.write_bytes(f'"{newest.name}"\r\n'.encode()),
        "1 MB": lambda p: p.write_bytes(b"x" * 10**6),
        "1 MB of brackets": lambda p: p.write_bytes(b"[" * 10**6),
        "another run's": lambda p: p.write_text('"../../other/checkpoints/step-0000004"'),
        "a folder": folder_in_the_way,
        "a link to nowhere": link,
    }
    for name, change in odd.items():
        with cells.cell(name):
            run_dir = _copy(good, cells.folder / "odd")
            change(run_dir / "checkpoints/latest")
            run = Ranks(cells.folder, 1, partial(train, cells.folder, run_dir))
            assert run.wait() and run.codes == [0], run.said()
            assert f"checkpoints/{newest.name}, step" in run.said(), run.said()
            said = run.said().count(f"{run_dir / 'checkpoints/latest'} says")
            assert said == (name != "CRLF"), run.said()
            assert outcome(run_dir) == expected


def flipped_bits(cells: Cells) -> None:
    """A6: one bit in any file: refused before a tensor is read, the one before it taken."""
    good, _ = _trained(cells)
    newest, before = list_checkpoints(good / "checkpoints")[::-1][:2]
    files = [p for p in sorted(newest.iterdir()) if p.is_file()]
    per_file = Counter[str]()
    refuse = mock.Mock(side_effect=NO_TENSOR)
    with (
        mock.patch.object(torch, "load", refuse),
        mock.patch.object(checkpointing, "load_file", refuse),
        mock.patch.object(safetensors.torch, "load_file", refuse),
    ):
        for number in range(1000 if cells.is_long else 200):
            file = files[number % len(files)]
            per_file[file.name] += 1
            with a_bit_flipped(cells, file):
                with mock.patch.object(checkpointing.logger, "warning") as warning:
                    assert checkpointing.latest(newest.parent) == before
                said = " ".join(str(call.args) for call in warning.call_args_list)
                assert newest.name in said, said
                assert file.name == "fastclr.json" or file.name in said, said
    assert checkpointing.latest(newest.parent) == newest
    cells.notes.append(f"{len(files)} files")


def foreign_files(cells: Cells) -> None:
    """A7: a file that is gone, another rank's, step's or run's; found and expected are named."""
    folder, good = cells.folder, cells.folder / "two"
    other = cells.folder / "other"
    for run_dir in (good, other):
        run = Ranks(
            folder, 2, partial(train, folder, run_dir, 1, seed=7 * (run_dir == other), epochs=1)
        )
        assert run.wait() and not any(run.codes), run.said()
    newest, before = list_checkpoints(good / "checkpoints")[::-1][:2]
    names = sorted(p.name for p in newest.glob("*optim_states.pt"))
    assert len(names) == 2, names

    def half_nul(c: Path) -> None:
        data = (c / names[0]).read_bytes()
        (c / names[0]).write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))

    def whole_of(other_checkpoint: Path) -> Callable[[Path], None]:
        def put(c: Path) -> None:
            shutil.rmtree(c)
            shutil.copytree(other_checkpoint, c)

        return put

    facts = "fastclr.json"
    cells_of: dict[str, Callable[[Path], object]] = {
        "removed": lambda c: (c / names[1]).unlink(),
        "a copy of rank 0's": lambda c: shutil.copy(c / names[0], c / names[1]),
        "another step's": lambda c: shutil.copy(c.parent / before.name / names[0], c / names[0]),
        "another run's": lambda c: shutil.copy(
            other / "checkpoints" / newest.name / names[0], c / names[0]
        ),
        "renamed": lambda c: (c / names[0]).rename(c / f"x{names[0]}"),
        "last half NUL": half_nul,
        "0 bytes": lambda c: (c / names[1]).write_bytes(b""),
        "one more": lambda c: shutil.copy(c / names[0], c / "mp_rank_01_model_states.pt"),
        "a whole other step": whole_of(before),
        "a whole other run's": whole_of(other / "checkpoints" / newest.name),
        "the list of another run": lambda c: shutil.copy(
            other / "checkpoints" / newest.name / facts, c
        ),
        "a list without files": lambda c: _edit(c / facts, lambda d: d.update(sha256={})),
        "a list that says another step": lambda c: _edit(c / facts, lambda d: d.update(images=1)),
        "a link": lambda c: ((c / names[0]).unlink(), (c / names[0]).symlink_to(before / names[0])),
        "a pipe": lambda c: ((c / names[0]).unlink(), os.mkfifo(c / names[0])),
    }
    own = json.loads((good / "writer.json").read_text())["run"]
    for name, damage in cells_of.items():
        with cells.cell(name):
            run_dir = _copy(good, folder / "damaged")
            damage(run_dir / "checkpoints" / newest.name)
            with mock.patch.object(checkpointing.logger, "warning") as warning:
                found = checkpointing.latest(run_dir / "checkpoints", own)
            said = " ".join(str(call.args) for call in warning.call_args_list)
            assert found is not None and found.name == before.name, (found, said)
            assert newest.name in said, said
            assert name in ("a link", "a pipe", "a list without files") or "step" in said
    with cells.cell("gone on with the one before it"):
        run_dir = _copy(good, folder / "damaged")
        cells_of["a copy of rank 0's"](run_dir / "checkpoints" / newest.name)
        run = Ranks(folder, 2, partial(train, folder, run_dir, 1, epochs=1))
        assert run.wait() and run.codes == [0, 0], run.said()
        assert f"{names[1]} does not have the sha256" in run.said(), run.said()
        assert outcome(run_dir) == outcome(good)


def _edit(file: Path, change: Callable[[dict], object]) -> None:
    facts = json.loads(file.read_text())
    change(facts)
    file.write_text(json.dumps(facts, indent=1))


def from_any_step(cells: Cells) -> None:
    """A11: gone on from the first step, the last of an epoch, the middle, before the first."""
    folder, whole = cells.folder, cells.folder / "each"
    run = Ranks(folder, 1, partial(train, folder, whole, checkpoint_every=1, keep_every=1))
    assert run.wait() and not any(run.codes), run.said()
    expected = outcome(whole)
    for step in (0, 1, 4, 5, 6, 9, 10, 11, 14, 15):
        with cells.cell(f"step {step}"):
            run_dir = _copy(whole, folder / "from")
            for checkpoint in list_checkpoints(run_dir / "checkpoints"):
                if int(checkpoint.name.split("-")[1]) > step:
                    shutil.rmtree(checkpoint)
            if step == 0:
                shutil.rmtree(run_dir / "checkpoints")
            run = Ranks(
                folder, 1, partial(train, folder, run_dir, checkpoint_every=1, keep_every=1)
            )
            assert run.wait() and run.codes == [0], run.said()
            assert outcome(run_dir) == expected


def other_ranks(cells: Cells) -> None:
    """A12: gone on by other ranks and ZeRO stages, from whole layers."""
    cells.tests(
        "tests/end_to_end/test_resume.py::test_other_ranks_and_stages_go_on_from_whole_layers"
    )


def _trained(cells: Cells) -> tuple[Path, dict]:
    """Return a run whose last step is not saved, and how it ends."""
    folder, good = cells.folder, cells.folder / "good"
    run = Ranks(folder, 1, partial(train, folder, good, keep_checkpoints=9))
    assert run.wait() and not any(run.codes), run.said()
    expected = outcome(good)
    shutil.rmtree(good / "checkpoints/step-0000015")
    (good / "checkpoints/latest").write_text('"step-0000014"')
    return good, expected


def _copy(start: Path, run_dir: Path) -> Path:
    shutil.rmtree(run_dir, ignore_errors=True)
    return shutil.copytree(start, run_dir, symlinks=True)


DRILLS = {
    "A1": Drill(
        "killed at random instants: each run ends equal bit for bit, its ledger too",
        killed_at_random,
        150,
        3600,
    ),
    "A5": Drill(
        "an odd pointer: the newest whole checkpoint is taken, one warning", odd_pointers, 90
    ),
    "A6": Drill(
        "one bit flipped in any file: refused, named, the checkpoint before it taken",
        flipped_bits,
        60,
        120,
    ),
    "A7": Drill(
        "files gone, swapped, of another rank, step or run: refused, named", foreign_files, 90
    ),
    "A10": Drill(
        "saves, failures, crashes, rot, NaN in any order: a whole finite checkpoint stands",
        keeps_one_whole,
        120,
        900,
    ),
    "A11": Drill("gone on from any step of an epoch: the same end", from_any_step, 90),
    "A12": Drill(
        "gone on by other ranks and ZeRO stages: rounding apart, the same",
        other_ranks,
        300,
        is_long_only=True,  # the suite runs it already
    ),
}
