"""What all command lines share: one clear message for what the user can mend, and exit codes."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

from fastclr.config import ConfigError
from fastclr.interruption import EXIT_PEER_LOST, EXIT_PREEMPTED, PeerLost, Preempted
from fastclr.world import World
from pipelines.shards import ShardError

# 0 is done; 2 is a wrong flag.
EXIT_CODES: dict[type[Exception], int] = {
    ConfigError: 78,  # refused: settings or input that cannot work
    ShardError: 65,  # data that is missing or damaged
    FloatingPointError: 70,  # the loss is not finite
    OSError: 74,  # storage: full, read-only, gone
    Preempted: EXIT_PREEMPTED,  # stopped by a signal, all of it saved: start again to go on
    PeerLost: EXIT_PEER_LOST,  # another rank is gone, or nothing happened for too long
}


def _is_main() -> bool:
    """Whether this rank speaks for all; a broken environment may be what the error is about."""
    try:
        return World.detect().is_main
    except ConfigError:
        return True


def guard(command: Callable[[], object]) -> int:
    """Run a command; print an expected error without traceback and return the exit code.

    Every rank meets the same ConfigError, so rank 0 alone prints it; a damaged sample is met by one
    rank, which prints it.
    """
    try:
        command()
    except (*EXIT_CODES, KeyboardInterrupt) as error:
        codes = {**EXIT_CODES, KeyboardInterrupt: 130}
        code = next(code for kind, code in codes.items() if isinstance(error, kind))
        if not isinstance(error, ConfigError | Preempted) or _is_main():
            what = "" if isinstance(error, Preempted | KeyboardInterrupt) else "error: "
            text = str(error) or "interrupted; start the same command again to go on"
            print(f"{what}{text}", file=sys.stderr, flush=True)
        return code
    return 0


def joined(target: Any) -> Any:
    """Make docstrings what ``--help`` shows: an entry's lines joined, names without backticks.

    tyro breaks lines by the screen's width, but also where the source did.

    Args:
        target: Function or dataclass whose flags are told; those of the dataclasses that it has are
            joined too.

    Returns:
        The same, for a call.
    """
    lines = re.sub(r"\n {8,}(?=\S)", " ", inspect.cleandoc(target.__doc__ or ""))
    target.__doc__ = lines.replace("``", "")
    for hint in get_type_hints(target).values():
        for kind in (hint, *get_args(hint)):
            if is_dataclass(kind):
                joined(kind)
    return target
