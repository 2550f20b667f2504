"""What ranks tell each other while they train: which part of a step asked, how much, how long.

The functions of ``torch.distributed`` are wrapped, and each call is named by the file that it came
from. On one machine all processes share a clock: what a rank spends in a collective until the last
one has come is waiting, the rest is transfer. On a GPU events on the stream tell how long it stood
still; waiting and transfer cannot be told apart there. Never run on a GPU.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from scaling_parts.model import GRADIENTS, LARS_NORMS, LOSS, NORMS, VOTES, WEIGHTS

# function -> place and name of the argument whose bytes travel
FUNCTIONS = {
    "all_reduce": (0, "tensor"),
    "reduce": (0, "tensor"),
    "broadcast": (0, "tensor"),
    "all_gather": (1, "tensor"),
    "all_gather_into_tensor": (1, "input_tensor"),
    "reduce_scatter_tensor": (1, "input"),
    "batch_isend_irecv": (0, "p2p_op_list"),
}
# The innermost of these in the stack is who asked; the engine gathers weights and sums gradients.
CALLERS = {
    "fastclr/batch_norm.py": NORMS,
    "torch/nn/modules/_functions.py": NORMS,
    "fastclr/losses/": LOSS,
    "fastclr/optim/": LARS_NORMS,
    "fastclr/finite.py": VOTES,
    "fastclr/trainer.py": VOTES,
    "deepspeed/runtime/": GRADIENTS,
}


class Call(NamedTuple):
    """One collective of one rank; seconds of a clock that all processes of a machine share.

    Attributes:
        part: Of the step, as in :data:`scaling_parts.model.PARTS`.
        function: Of torch.distributed.
        num_bytes: This rank's.
        started: When it was called.
        waited_from: When the rank began to stand still for it; later, where it was asynchronous.
        ended: When it was done.
    """

    part: str
    function: str
    num_bytes: int
    started: float
    waited_from: float
    ended: float


class Recorder:
    """Keeps every collective of this process between :meth:`on` and its end.

    Attributes:
        calls: In the order they were begun.
    """

    def __init__(self) -> None:
        self._calls: list[_Open] = []

    @property
    def calls(self) -> list[Call]:
        """Return what was recorded; waits for the device."""
        return [call.closed() for call in self._calls]

    @property
    def num_calls(self) -> int:
        """Return how many were begun so far."""
        return len(self._calls)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Wrap the functions in here; begin before DeepSpeed starts, which keeps some of them."""
        with mock.patch.multiple(dist, **{name: self._wrapped(name) for name in FUNCTIONS}):
            yield

    def _wrapped(self, name: str) -> Callable[..., Any]:
        original = getattr(dist, name)
        place, keyword = FUNCTIONS[name]

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            sent = args[place] if len(args) > place else kwargs[keyword]
            call = _Open(_caller(name), name, sent)
            self._calls.append(call)
            found = original(*args, **kwargs)
            call.end()
            if isinstance(found, list):
                return [_Waited(work, call) for work in found]
            return None if found is None else _Waited(found, call)

        return wrapper


class _Open:
    """A call that may not have ended; on a GPU its times are events of the current stream."""

    def __init__(self, part: str, function: str, sent: Any) -> None:
        tensors = [sent]
        if isinstance(sent, list):  # of sends and receipts
            tensors = [op.tensor for op in sent if op.op is dist.isend]
        self._is_cuda = any(tensor.is_cuda for tensor in tensors)
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self._what = (part, function, num_bytes)
        self._started = self._now()
        self._stands: list[tuple[Any, Any]] = []
        self._from = self._started

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        """Begin to stand still again."""
        self._from = self._now()

    def end(self) -> None:
        """Go on."""
        self._stands.append((self._from, self._now()))

    def closed(self) -> Call:
        """Return the call, as if all that it stood still for were at its end."""
        if not self._is_cuda:
            last = self._stands[-1][1]
            stood = sum(end - begin for begin, end in self._stands)
            return Call(*self._what, self._started, last - stood, last)
        torch.cuda.synchronize()
        stood = sum(begin.elapsed_time(end) / 1e3 for begin, end in self._stands)
        return Call(*self._what, 0.0, 0.0, stood)


class _Waited:
    """A ``Work`` whose waiting is timed."""

    def __init__(self, work: Any, call: _Open) -> None:
        self._work, self._call = work, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """Wait, and time it."""
        self._call.begin()
        found = self._work.wait(*args, **kwargs)
        self._call.end()
        return found


def _caller(function: str) -> str:
    """Name the part of the step that calls."""
    frame = sys._getframe(2)
    while frame:
        path = frame.f_code.co_filename
        for where, part in CALLERS.items():
            if where in path:
                gathers = function.startswith("all_gather")
                return WEIGHTS if part == GRADIENTS and gathers else part
        frame = frame.f_back
    return "other"


class Exposed(NamedTuple):
    """What a part of a step's communication cost a rank, medians over steps and ranks.

    Attributes:
        seconds: It stood still.
        waiting: Of these until the last rank had come; None where clocks cannot be compared.
        num_bytes: Its own bytes that travelled.
        calls: Collectives.
    """

    seconds: float
    waiting: float | None
    num_bytes: float
    calls: float

    @property
    def transfer(self) -> float:
        """What is not waiting."""
        return self.seconds - (self.waiting or 0.0)


def exposed(ranks: Sequence[Sequence[Sequence[Call]]]) -> dict[str, Exposed]:
    """Return what each part cost.

    Args:
        ranks: The calls of each rank and step. Where the ranks made the same calls in a step, their
            starts are compared.
    """
    sums: dict[str, list[tuple[float, float, int, int]]] = defaultdict(list)
    every = [call for steps in ranks for calls in steps for call in calls]
    clocked = {call.part for call in every if call.started > 0.0}
    for step in zip(*ranks, strict=True):
        last = [max(call.started for call in calls) for calls in zip(*step, strict=True)]
        for calls in step:
            total = dict.fromkeys({call.part for call in every}, (0.0, 0.0, 0, 0))
            for call, latest in zip(calls, last, strict=True):
                seconds, waiting, num_bytes, count = total[call.part]
                stood = call.ended - call.waited_from
                waited = min(max(latest - call.waited_from, 0.0), stood)
                total[call.part] = (
                    seconds + stood, waiting + waited, num_bytes + call.num_bytes, count + 1,
                )  # fmt: skip
            for part, values in total.items():
                sums[part].append(values)
    found: dict[str, Exposed] = {}
    for part in sorted(sums):
        seconds, waiting, num_bytes, calls = map(median, zip(*sums[part], strict=True))
        found[part] = Exposed(seconds, waiting if part in clocked else None, num_bytes, calls)
    return found
