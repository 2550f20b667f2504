"""Train: ``deepspeed fastclr/train.py --ds-config FILE [--recipe NAME] [flags]``."""

from __future__ import annotations

import sys
from pathlib import Path

# The launcher puts this folder on the path, where `optim` or `metrics` would shadow somebody's
# package; the repository's root belongs there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

import tyro

from fastclr.cli import guard
from fastclr.config import Config
from fastclr.recipes import RECIPES


def main() -> int:
    """Parse the flags, run, return the exit code."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--ds-config", default="")
    parser.add_argument("--recipe", default="simclr-v1-paper", choices=sorted(RECIPES))
    parser.add_argument("--local_rank", "--local-rank", type=int)  # the launcher's; World reads it
    first, rest = parser.parse_known_args()
    recipe = RECIPES[first.recipe]()
    config = tyro.cli(
        Config,
        default=recipe,
        args=rest,
        prog="deepspeed fastclr/train.py --ds-config FILE [--recipe NAME]",
        description=f"Train SimCLR. Recipes: {', '.join(RECIPES)}; the defaults below are those "
        f"of {first.recipe}. What the DeepSpeed JSON sets is not set here.",
    )

    from fastclr.runs import train

    typed = [word for word in sys.argv if not word.startswith("--local_rank=")]
    return guard(lambda: train(config, first.ds_config, command=["deepspeed", *typed]))


if __name__ == "__main__":
    sys.exit(main())
