"""Train: ``deepspeed fastclr/train.py --ds-config FILE [--recipe NAME] [@FILE] [flags]``."""

from __future__ import annotations

import sys
from pathlib import Path

# The launcher puts this folder on the path, where `optim` or `metrics` would shadow somebody's
# package; the repository's root belongs there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
import shlex

import tyro

from fastclr.cli import guard
from fastclr.config import Config
from fastclr.interruption import EXIT_PEER_LOST, EXIT_PREEMPTED, Interruption
from fastclr.launchers import watch
from fastclr.recipes import RECIPES


def main() -> int:
    """Parse the flags, run, return the exit code."""
    watch()
    parser = argparse.ArgumentParser(add_help=False, fromfile_prefix_chars="@")
    # A file of flags, "@tuned.flags", as benchmarks/throughput.py writes it; those after it win.
    parser.convert_arg_line_to_args = lambda arg_line: shlex.split(arg_line, comments=True)
    parser.add_argument("--ds-config", default="")
    parser.add_argument("--recipe", default="simclr-v1-paper", choices=sorted(RECIPES))
    parser.add_argument("--local_rank", "--local-rank", type=int)  # the launcher's; World reads it
    first, rest = parser.parse_known_args()
    recipe = RECIPES[first.recipe]()
    config = tyro.cli(
        Config,
        default=recipe,
        args=rest,
        prog="deepspeed fastclr/train.py --ds-config FILE [--recipe NAME] [@FILE of flags]",
        description=f"Train SimCLR. Recipes: {', '.join(RECIPES)}; the defaults below are those "
        f"of {first.recipe}. What the DeepSpeed JSON sets is not set here.",
    )

    typed = [word for word in sys.argv if not word.startswith("--local_rank=")]

    def command() -> None:
        from fastclr.runs import train  # takes seconds, in which a signal is noted already

        train(config, first.ds_config, ["deepspeed", *typed], interruption)

    with Interruption() as interruption:
        code = guard(command)
    if code in (EXIT_PREEMPTED, EXIT_PEER_LOST, 130):
        sys.stdout.flush()
        os._exit(code)  # without waiting for threads and ranks that may be what hangs
    return code


if __name__ == "__main__":
    sys.exit(main())
