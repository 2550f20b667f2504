"""The command ``fastclr``: its parts by name, each imported when it is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastclr import __version__


class Part(NamedTuple):
    """A part of the command.

    Attributes:
        home: Module it is in.
        function: The function or dataclass that its flags are made of; empty for none. A module
            that has a ``main(words)`` reads them itself.
        says: What it does, in a line.
    """

    home: str
    function: str
    says: str


PARTS: dict[str, Part] = {
    "pretrain": Part(
        "fastclr.commands.pretrain",
        "pretrain",
        "Folder of images in, scored encoder out: all of it",
    ),
    "shards": Part("fastclr.commands.shards", "make_shards", "Pack images into shards"),
    "views": Part("fastclr.commands.views", "show_views", "Draw what training will see"),
    "check": Part("fastclr.commands.check", "check", "Check a data set, repair its indexes"),
    "verify": Part(
        "fastclr.commands.verify", "verify", "Compare this machine with one process, before a run"
    ),
    "bench": Part("fastclr.throughput.command", "Options", "Where a run's time goes; tune it"),
    "train": Part("fastclr.train", "", "Train, or go on with a run"),
    "evaluate": Part("fastclr.commands.evaluate", "evaluate", "Score a run's encoder"),
    "report": Part("fastclr.commands.report", "report", "Make a run's page"),
    "export": Part("fastclr.commands.export", "export", "Write an encoder for other libraries"),
    "replay": Part("fastclr.commands.replay", "replay", "Take a step again, to the bit"),
    "study": Part("fastclr.commands.study", "study", "Do an experiment of the literature"),
    "fetch": Part("fastclr.commands.fetch", "fetch", "Make photo tiles or CIFAR-10 on disk"),
}
COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")

HELP = f"""\
usage: fastclr COMMAND [flags]

SimCLR: unlabelled images in, a measured visual encoder out.

{{parts}}

fastclr COMMAND --help tells the flags. On several GPUs, by a launcher:
  deepspeed --module fastclr train ...
  torchrun --nproc-per-node 8 -m fastclr train ...
Completion in bash: source <(fastclr {COMPLETION[0]} bash)
"""


def run(name: str, words: Sequence[str]) -> Any:
    """Parse the flags of a part that is a function, and call it; errors are the caller's.

    Args:
        name: Key of :data:`PARTS`.
        words: Its flags.

    Returns:
        What the function returns.

    Raises:
        SystemExit: At ``--help`` (0) and at a wrong flag (2).
    """
    import tyro

    from fastclr.cli import joined

    part = PARTS[name]
    function = getattr(importlib.import_module(part.home), part.function)
    return tyro.cli(joined(function), args=words, prog=f"fastclr {name}")


def main(words: Sequence[str] | None = None) -> int:
    """Run a part of the command; see :mod:`fastclr.cli` for exit codes.

    Args:
        words: Name of the part and its flags; None takes the process's own.

    Returns:
        Exit code; 1 where the function says that something is not as it should be.
    """
    # Launchers put --local_rank=N before all other words; World reads the environment.
    words = [w for w in (sys.argv[1:] if words is None else words) if w[:13] != "--local_rank="]
    name, *rest = words or ["--help"]
    if name in ("--help", "-h", "--version"):
        parts = "\n".join(f"  {name:<9} {part.says}" for name, part in PARTS.items())
        print(f"fastclr {__version__}" if name == "--version" else HELP.format(parts=parts))
        return 0
    if name in COMPLETION:
        from fastclr.commands.completion import complete

        return complete(words)
    if name not in PARTS:
        print(
            f"fastclr has no command {name!r}: choose from {', '.join(PARTS)}; fastclr --help "
            "tells what they do.",
            file=sys.stderr,
        )
        return 2
    module = importlib.import_module(PARTS[name].home)
    if hasattr(module, "main"):
        return module.main(rest)
    from fastclr.cli import guard

    found: list[Any] = []
    code = guard(lambda: found.append(run(name, rest)))
    return code or int(found[0] is False)
