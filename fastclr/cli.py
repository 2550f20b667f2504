"""What all command lines share: one clear message for what the user can mend, and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable

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
