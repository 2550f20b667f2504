"""Folder in, scored encoder out: ``fastclr pretrain FOLDER``, or ``fastclr.pretrain("FOLDER")``.

It stands for the other commands, which it prints and then calls.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import psutil
import tyro

from fastclr.choices import Choice, Machine, choose
from fastclr.cli import EXIT_CODES, guard
from fastclr.commands import run
from fastclr.config import ConfigError
from fastclr.facts import free_memory
from fastclr.files import write_json
from fastclr.interruption import EXIT_PEER_LOST, EXIT_PREEMPTED, Interruption
from pipelines.hold_out import Divided, divide, write_table

PLAN = "pretrain.json"
RUNNER = [sys.executable, "-m", "deepspeed.launcher.runner"]  # what deepspeed is, on any PATH
MOST_REJECTED = "0.05"  # damaged images, as a part of all


class Pretrained(NamedTuple):
    """Where the results lie.

    Attributes:
        run_dir: Folder of the run: checkpoints, log, ``summary.json``, ``scores.json``.
        report: Its page, for a browser.
        encoder: Folder of the encoder; :func:`fastclr.export.load` loads it.
        scores: ``scores.json``; None where the images have no labels.
        commands: What was done, as it can be typed.
    """

    run_dir: Path
    report: Path
    encoder: Path
    scores: dict[str, Any] | None
    commands: list[str]


def pretrain(
    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
    run_dir: str = "",
    minutes: float = 30.0,
    ranks: int = 0,
) -> Pretrained:
    """Train an encoder on a folder of images: pack, train, score, report, export.

    The plain commands it stands for are printed before they run; change them to go further. They
    are kept in RUN/pretrain.json. Start it again to go on where it stopped.

    Args:
        folder: JPEG, PNG or WebP images, or class folders of them: a tenth of each class is then
            held out, and the encoder scored on it. Folders train and test are taken as they are.
        run_dir: Folder of the results, new or begun by this command; empty for runs/NAME. Packed
            images go beside it, into shards/, and are used again while the folder is the same.
        minutes: Minutes of training; packing, scores and report take more.
        ranks: Processes; 0 for one a GPU of this machine, or one on a CPU.

    Returns:
        Where the results lie.

    Raises:
        ConfigError: If the folder has no images or fewer than a batch, or the run's folder holds
            something else.
        ShardError: If more than a twentieth of the images are damaged.
    """
    source = Path(folder).resolve()
    target = Path(run_dir or Path("runs") / source.name)
    asked = {"folder": str(source), "minutes": minutes, "ranks": ranks}
    before = _begun(target, asked)
    divided = divide(source)
    plan = before or {
        **asked,
        "digest": divided.digest,
        **_plan(divided, source.name, target, asked),
    }
    if plan["digest"] != divided.digest:
        raise ConfigError(
            f"{folder} has changed since {target} was begun, and what was learned belongs to the "
            "images of then. Choose a new --run-dir, or bring the folder back."
        )
    for name, images in (("train", divided.train), ("test", divided.test)):
        if images:
            Path(plan["cache"]).mkdir(parents=True, exist_ok=True)
            write_table(images, Path(plan["cache"]) / f"{name}.jsonl")
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / PLAN, plan)
    typed = [shlex.join([*plan["launcher"] * (c[0] == "train"), "fastclr", *c])
             for c in plan["commands"]]  # fmt: skip
    print("\n".join([*plan["says"], "This stands for:", "", *(f"  {line}" for line in typed)]))
    for number, words in enumerate(plan["commands"], 1):
        print(f"\n[{number}/{len(typed)}] {words[0]}", flush=True)
        _do(words, plan["launcher"], target)
    result = _results(target, typed)
    print(f"\nreport:  {result.report}\nencoder: {result.encoder}, see its README.md")
    if result.scores:
        print(f"scores:  {target / 'scores.json'}{_headline(result.scores)}")
    return result


def _begun(target: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Return the plan of a run that was begun; None for a new one.

    Raises:
        ConfigError: If the folder holds something else, or the run was begun otherwise.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    try:
        plan = json.loads((target / PLAN).read_text(encoding="utf-8"))
        changed = [
            f"{key} {plan[key]} then, {asked[key]} now" for key in asked if plan[key] != asked[key]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{target} holds something that fastclr pretrain has not begun: nothing of it is "
            "changed. Choose a new --run-dir."
        ) from error
    if changed:
        raise ConfigError(
            f"{target} was begun with other settings: {'; '.join(changed)}. Repeat those to go on, "
            "or choose a new --run-dir."
        )
    return plan


def _plan(divided: Divided, name: str, target: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Choose settings; return the commands, and what is said of them."""
    import torch

    on_cuda = torch.cuda.is_available()
    num_ranks = asked["ranks"] or (torch.cuda.device_count() if on_cuda else 1)
    side, num_images = divided.shorter_side(), len(divided.train) + len(divided.test)
    choice = choose(len(divided.train), side, Machine(on_cuda, num_ranks, free_memory()))
    cache = target.parent / "shards" / f"{name}-{divided.digest[:12]}"
    launcher = ["deepspeed", "--log_level", "warning", "--num_accelerators", str(num_ranks)]
    says = [
        f"{num_images} images of about {side} pixels, {divided.num_classes} classes. {divided.why}"
    ]
    if divided.left_out:
        named = ", ".join(divided.left_out[:3]) + ", ..." * (len(divided.left_out) > 3)
        says.append(
            f"Left out, no images by their names: {named} ({len(divided.left_out)} in all)."
        )
    return {
        "cache": str(cache),
        "launcher": [*launcher, "--module"] if num_ranks > 1 else [],
        "commands": _commands(divided, choice, cache, target, asked["minutes"]),
        "says": says,
    }


def _commands(
    divided: Divided, choice: Choice, cache: Path, target: Path, minutes: float
) -> list[list[str]]:
    """Return the commands, each as its words."""
    train, test, run_dir = str(cache / "train"), str(cache / "test"), str(target)
    packing = ["--allow-outside", "--max-rejected", MOST_REJECTED, "--resume"]
    if choice.shorter_side:
        packing += ["--encode", "jpeg", "--shorter-side", str(choice.shorter_side)]
    flags = {
        "--minutes": f"{minutes:g}",
        "--epochs": "None",
        "--views.size": choice.size,
        "--global-batch-size": choice.batch,
        "--optimizer.warmup-epochs": choice.warmup_epochs,
        "--checkpoint-every": choice.save_every,
    }
    training = [str(word) for flag in flags.items() for word in flag]
    found = [["shards", f"{train}.jsonl", "--out", train, *packing]]
    if divided.test:
        found.append(["shards", f"{test}.jsonl", "--out", test, *packing])
    found.append(
        ["train", "--ds-config", "fp32_clipped", "--recipe", choice.recipe, "--data.train", train,
         "--run-dir", run_dir, *training, *["--data.in-memory"] * choice.in_memory]
    )  # fmt: skip
    if divided.test:
        scored = ["--run", run_dir, "--train", train, "--test", test]
        found.append(["evaluate", *scored, "--protocol", *choice.protocols])
    encoder = ["--to", "safetensors", "--out", str(target / "encoder")]
    return [*found, ["report", "--run", run_dir], ["export", run_dir, *encoder]]


def _do(words: list[str], launcher: list[str], target: Path) -> None:
    """Call a command, unless what it makes is there."""
    name, *flags = words
    if name == "export" and (target / "encoder").exists():
        print("done before")
    elif name != "train":
        run(name, flags)
    elif (target / "summary.json").exists():  # written at a run's end
        print("done before")
    elif launcher:
        _launch([*launcher, "fastclr", *words])
    else:
        from fastclr import runs
        from fastclr.train import parse

        runs.train(*parse(flags), ["fastclr", *words])


def _launch(command: list[str]) -> None:
    """Train on several ranks; what ends them there ends this here, and a signal is passed on.

    Raises:
        Exception: That of :data:`~fastclr.cli.EXIT_CODES` which the code stands for.
    """
    told: set[int] = set()
    with Interruption() as interruption:
        # In a session of its own: a terminal's Ctrl-C would have the launcher end its ranks before
        # they have saved.
        process = subprocess.Popen([*RUNNER, *command[1:]], start_new_session=True)
        while (code := _wait(process)) is None:
            if number := interruption.requested:
                told |= _signal_ranks(process.pid, number, told)
    if code:
        kinds: dict[int, type[BaseException]] = {c: kind for kind, c in EXIT_CODES.items()}
        raise {**kinds, 130: KeyboardInterrupt}.get(code, RuntimeError)(
            f"training ended with code {code}, its own message stands above: start the same "
            "command again to go on"
        )


def _signal_ranks(launcher: int, number: int, told: set[int]) -> set[int]:
    """Signal each rank that a launcher has started and that was not told yet; return which."""
    found: set[int] = set()
    with contextlib.suppress(psutil.Error):  # one that ends meanwhile
        for child in psutil.Process(launcher).children(recursive=True):
            is_rank = any(word.startswith("--local_rank=") for word in child.cmdline())
            if is_rank and child.pid not in told:
                child.send_signal(number)
                found.add(child.pid)
    return found


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    """Return the exit code, or None where there is none for a while."""
    try:
        return process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return None


def _results(target: Path, commands: list[str]) -> Pretrained:
    """Say where everything lies."""
    file = target / "scores.json"
    scores = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    return Pretrained(target, target / "report.html", target / "encoder", scores, commands)


def _headline(scores: dict[str, Any]) -> str:
    """Return the scores of a linear classifier in words, where there are any."""
    if not (of := scores.get("scores")):
        return ""
    shares = {name: f"{of[name]['linear_top1']:.1%}" for name in of}
    return (
        f"\n         of what was held out, a linear classifier on the encoder gets "
        f"{shares['trained']} right,\n         {shares['untrained']} on the untrained encoder and "
        f"{shares['pixels']} on raw pixels"
    )


def main(words: Sequence[str]) -> int:
    """Parse the flags, run, return the exit code."""

    def command() -> None:
        try:
            run("pretrain", words)
        except KeyboardInterrupt as error:  # packing's own words are about its own command
            raise KeyboardInterrupt from error

    code = guard(command)
    if code in (EXIT_PREEMPTED, EXIT_PEER_LOST, 130):
        sys.stdout.flush()
        os._exit(code)  # as fastclr/train.py, without waiting for what may hang
    return code
