"""Train: ``deepspeed fastclr/train.py --ds-config FILE [--recipe NAME] [@FILE] [flags]``.

Where the repository is not there: ``fastclr train ...``, and on several ranks ``deepspeed --module
fastclr train ...``.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The launcher puts this folder on the path, where `optim` or `metrics` would shadow somebody's
# package; the repository's root belongs there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import io
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields

import tyro

from fastclr.cli import guard, joined
from fastclr.config import Config
from fastclr.facts import typed
from fastclr.interruption import EXIT_PEER_LOST, EXIT_PREEMPTED, Interruption
from fastclr.launchers import watch
from fastclr.recipes import RECIPES
from fastclr.world import World


def parse(words: Sequence[str], program: str = "fastclr train") -> tuple[Config, str]:
    """Return the configuration that flags mean, and the path or name of the DeepSpeed JSON.

    Args:
        words: Flags; ``@FILE`` stands for the flags in a file, and words behind ``--help`` for
            groups of flags.
        program: How the command is called in its help.

    Raises:
        SystemExit: At ``--help`` (0) and at a wrong flag (2).
    """
    parser = argparse.ArgumentParser(prog=program, add_help=False, fromfile_prefix_chars="@")
    # A file of flags, "@tuned.flags", as `fastclr bench` writes it; those after it win.
    parser.convert_arg_line_to_args = lambda arg_line: shlex.split(arg_line, comments=True)
    parser.add_argument("--ds-config", default="")
    parser.add_argument("--recipe", default="simclr-v1-paper", choices=sorted(RECIPES))
    parser.add_argument("--local_rank", "--local-rank", type=int)  # the launcher's; World reads it
    first, rest = parser.parse_known_args(words)

    def read(flags: Sequence[str]) -> Config:
        return tyro.cli(
            joined(Config),
            default=RECIPES[first.recipe](),
            args=flags,
            prog=f"{program} --ds-config FILE [--recipe NAME] [@FILE of flags]",
            description=f"Train SimCLR. Recipes: {', '.join(RECIPES)}; the defaults below are "
            f"those of {first.recipe}. What the DeepSpeed JSON sets is not set here.",
        )

    if {"-h", "--help"} & {*rest}:
        print(_chosen(_said(lambda: read(["--help"])), rest))
        raise SystemExit(0)
    return read(rest), first.ds_config


def _said(tell: Callable[[], object]) -> str:
    """Return what is printed by what then exits."""
    raw = io.BytesIO()
    # tyro draws frames where the encoding has this very name.
    with contextlib.redirect_stdout(io.TextIOWrapper(raw, encoding="utf-8")) as text:
        with contextlib.suppress(SystemExit):
            tell()
        text.flush()
        return raw.getvalue().decode()


def _chosen(text: str, words: Sequence[str]) -> str:
    """Return the help on groups of flags that are named; of none, on those that have no group."""
    head, *frames = re.split(r"(?m)^(?=╭)", text)
    by_name = {frame.split()[1]: frame.rstrip() for frame in frames}
    if "all" in words:
        return text.rstrip()
    if named := [by_name[word] for word in words if word in by_name]:
        return "\n".join(named)
    kinds = {f.name: f.default_factory for f in fields(Config) if f.default_factory is not MISSING}
    told = {name: re.split("[;(.]", joined(kind).__doc__)[0] for name, kind in kinds.items()}
    more = [f"  --help {name:<11} {text}" for name, text in {**told, "all": "All flags"}.items()]
    return "\n".join([head + by_name["options"], "Groups of flags:", *more])


def main(words: Sequence[str] | None = None) -> int:
    """Parse the flags, run, return the exit code.

    Args:
        words: Flags of ``fastclr train``; None takes the process's own.
    """
    watch()
    is_script = words is None
    program = "deepspeed fastclr/train.py" if is_script else "fastclr train"
    config, ds_config = parse(sys.argv[1:] if words is None else words, program)

    def command() -> None:
        from fastclr.runs import train  # takes seconds, in which a signal is noted already

        program, *rest = typed()
        launcher = ["deepspeed", "--module"] if World.detect().num_ranks > 1 else []
        told = ["deepspeed", *rest] if is_script else [*launcher, program, *rest]
        train(config, ds_config, told, interruption)

    with Interruption() as interruption:
        code = guard(command)
    if code in (EXIT_PREEMPTED, EXIT_PEER_LOST, 130):
        sys.stdout.flush()
        os._exit(code)  # without waiting for threads and ranks that may be what hangs
    return code


if __name__ == "__main__":
    sys.exit(main())
