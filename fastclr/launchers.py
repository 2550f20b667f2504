"""A rank whose launcher is gone leaves: nobody would stop it, and it would write into the next run.

Imports nothing heavy: it watches from a command's first second.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from fastclr.interruption import EXIT_PEER_LOST

_EVERY_SECONDS = 1.0
_NODE_LAUNCHER = "deepspeed.launcher.launch"  # started on each node by one that outlives it
_LAUNCHERS = ("torchrun", "torch.distributed.run", "torch/distributed/run", _NODE_LAUNCHER)


def watch() -> None:
    """Begin to watch this process's launcher, if it has one; a daemon thread."""
    chain = _chain()
    if chain:
        threading.Thread(target=_watch, args=(chain,), name="fastclr-launcher", daemon=True).start()


def _chain() -> list[tuple[int, int]]:
    """Return processes and the parents they must keep: this one, and DeepSpeed's on this node."""
    me, parent = os.getpid(), os.getppid()
    words = _words(parent)
    if not any(name in words for name in _LAUNCHERS):
        return []  # started by a shell, which may end
    chain = [(me, parent)]
    above = _parent(parent)
    if _NODE_LAUNCHER in words and above and "deepspeed" in _words(above):
        chain.append((parent, above))
    return chain


def _watch(chain: list[tuple[int, int]]) -> None:
    """Leave when a process of the chain has lost its parent."""
    while True:
        time.sleep(_EVERY_SECONDS)
        for process, parent in chain:
            if _parent(process) != parent:
                text = f"error: the launcher (process {parent}) is gone: this rank leaves too\n"
                os.write(sys.stderr.fileno(), text.encode())
                os._exit(EXIT_PEER_LOST)


def _words(process: int) -> str:
    """Return the command line of a process; empty if it cannot be read."""
    try:
        raw = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return ""
    return raw.replace(b"\0", b" ").decode("utf-8", "replace")


def _parent(process: int) -> int:
    """Return the parent of a process; 0 if it cannot be read."""
    if process == os.getpid():
        return os.getppid()
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        return int(text.rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0
