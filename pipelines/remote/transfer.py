"""The state of one object's reading: what came, of what, and whether it can be the whole."""

from __future__ import annotations

import hashlib
from typing import Protocol

from pipelines.remote.retries import Again, Final, Wrong


class Sink(Protocol):
    """Where the bytes go. What goes wrong here is final: it raises what the caller shall see."""

    def begin(self, num_bytes: int | None) -> None:
        """Make room for an object, or for one of unknown length, from its first byte."""
        ...

    def write(self, block: bytes) -> None:
        """Append bytes."""
        ...


class Transfer:
    """Bytes of an object on their way into a sink, over as many tries as it takes.

    Args:
        sink: Where they go.
        num_bytes: Length it must have; None if that is not known.
        sha256: Hash it must have; None if that is not known.

    Attributes:
        received: Bytes so far, from the first.
        total: Length the server states, None until then or if it does not.
        version: ETag or the like of the object being read; empty if there is none.
    """

    def __init__(self, sink: Sink, num_bytes: int | None, sha256: str | None) -> None:
        self._sink, self.num_bytes, self.sha256 = sink, num_bytes, sha256
        self.received = 0
        self.total: int | None = None
        self.version = ""
        self._ends_itself = False
        self._digest = hashlib.sha256()

    @property
    def can_resume(self) -> bool:
        """Whether the rest may be asked for alone: a mixture of two objects would be noticed."""
        strong = bool(self.version) and not self.version.startswith("W/")
        return self.received > 0 and (strong or self.sha256 is not None)

    def restart(self) -> None:
        """Forget what came."""
        self.received, self.total, self.version = 0, None, ""
        self._digest = hashlib.sha256()

    def begin(self, total: int | None, version: str, *, ends_itself: bool = False) -> None:
        """Note what the server says of the object, before its first byte.

        Args:
            total: Length in bytes.
            version: ETag or the like.
            ends_itself: Whether the protocol marks the end, so that a cut shows without length.
        """
        self.total, self.version, self._ends_itself = total, version, ends_itself
        if self.num_bytes is not None and total not in (None, self.num_bytes):
            raise Wrong(f"it has {total} bytes, {self.num_bytes} are expected")
        if total is None and not ends_itself and self.num_bytes is None and self.sha256 is None:
            raise Final("its server states no length, so that a cut could not be noticed")
        self._sink.begin(total if total is not None else self.num_bytes)

    def add(self, block: bytes) -> None:
        """Take the next bytes."""
        end = self.received + len(block)
        most = self.total if self.total is not None else self.num_bytes
        if most is not None and end > most:
            raise Wrong(f"more than its {most} bytes came")
        self._sink.write(block)
        self._digest.update(block)
        self.received = end

    def check_end(self) -> None:
        """Check, at the end of a body, that this is the end of the object, and the right one.

        Raises:
            Again: If bytes are missing; they can be asked for.
            Wrong: If all came, and they are not what is expected.
        """
        most = self.total if self.total is not None else self.num_bytes
        if most is not None and self.received < most:
            raise Again(f"it was cut after {self.received} of {most} bytes")
        found = self._digest.hexdigest()
        if self.sha256 is not None and found != self.sha256:
            if most is None and not self._ends_itself:
                raise Wrong(f"it was cut or has sha256 {found}, {self.sha256} is expected")
            raise Wrong(f"it has sha256 {found}, {self.sha256} is expected")
