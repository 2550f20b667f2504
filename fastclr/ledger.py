"""What each step learned from, written down: the proof that every image came once an epoch.

A file for each start of a run and each rank, ``ledger/start-0002-rank-00001.jsonl``: first what was
started, then a line a step with the ids of this rank's images, a digest of its views and its loss.
A start goes on from a step; what earlier starts did after that step is void, as it is for the
weights. Lines are written at log rows and are on the disk before a checkpoint stands, so that a
checkpoint's steps are all accounted for, whatever happened between.

An image takes 5.4 bytes a time it is seen: 7 MB for an epoch of ImageNet.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from fastclr.batch import Batch
from fastclr.config import ConfigError
from fastclr.contracts import BatchSource
from fastclr.digests import digest_rows, odd
from fastclr.files import sync, write_durably
from fastclr.world import World

FOLDER = "ledger"


@dataclass(frozen=True)
class Start:
    """What a start of a run says of itself.

    Attributes:
        number: Counts the starts of a run, from 0.
        step: Step it goes on from; 0 for a new run.
        num_ranks: Processes.
        micro_batch_size: Images of each rank in a step.
        batches_per_epoch: Steps in an epoch.
        data: Digest of the data set.
        seed: Seed of the order and the views.
    """

    number: int
    step: int
    num_ranks: int
    micro_batch_size: int
    batches_per_epoch: int
    data: str
    seed: int

    def __post_init__(self) -> None:
        """Refuse what is no number of steps, ranks or images."""
        for name, value in vars(self).items():
            if name != "data" and type(value) is not int:
                raise TypeError(f"{name} is {value!r}")


@dataclass(frozen=True)
class Entry:
    """What a rank learned from in a step.

    Attributes:
        step: Counts from 1.
        id_B: int64 ids of the images.
        views: Digest of the views, see :func:`digest_of`.
        loss: Mean over this rank's anchors, to the last bit; NaN for a step that was skipped.
        damaged: Damaged images that this start of this rank has replaced so far.
    """

    step: int
    id_B: npt.NDArray[np.int64]
    views: int
    loss: float
    damaged: int


class Ledger:
    """Writes the entries of one rank; see the module.

    Args:
        run_dir: The run's folder.
        start: What is started; the same on every rank.
        rank: This one.
    """

    def __init__(self, run_dir: Path, start: Start, rank: int) -> None:
        folder = run_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / name_of(start.number, rank)
        write_durably(file, json.dumps(asdict(start)) + "\n")  # no file without its first line
        sync(folder)
        self._stream = file.open("a", encoding="ascii")
        self._pending: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None, int]] = []

    def add(self, step: int, batch: Batch, loss: torch.Tensor | None, damaged: int) -> None:
        """Note a step; nothing waits for the device.

        Args:
            step: Counts from 1.
            batch: What was learned from.
            loss: This rank's loss; None for a step that was skipped.
            damaged: See :class:`Entry`.
        """
        digest = digest_of(batch.views_VBCHW)
        self._pending.append((step, batch.sample_id_B, digest, loss, damaged))

    def write(self) -> None:
        """Write down what was noted; waits for the device."""
        for step, id_B, digest, loss, damaged in self._pending:
            line: dict[str, Any] = {
                "step": step,
                "ids": _pack(id_B.numpy()),
                "views": f"{unsigned(digest):016x}",
                "loss": None if loss is None else float(loss).hex(),
            }
            if damaged:
                line["damaged"] = damaged
            self._stream.write(json.dumps(line) + "\n")
        self._pending.clear()

    def commit(self) -> None:
        """Write, and wait for the disk: call this before a checkpoint of these steps stands."""
        self.write()
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Write what is left and close the file."""
        self.write()
        self._stream.close()


def begin(
    run_dir: Path, loader: BatchSource, step: int, world: World, device: torch.device
) -> Ledger:
    """Begin this start's record; every rank calls this.

    Args:
        run_dir: The run's folder.
        loader: Where the batches come from.
        step: Step it goes on from.
        world: Which rank of how many.
        device: That collectives of objects go through.
    """
    numbers = [next_number(run_dir) if world.is_main else 0]
    dist.broadcast_object_list(numbers, device=device)
    position = loader.state_dict()
    start = Start(
        number=numbers[0], step=step, num_ranks=world.num_ranks,
        micro_batch_size=loader.micro_batch_size, batches_per_epoch=loader.batches_per_epoch,
        data=str(position.get("digest", "")), seed=int(position.get("seed", 0)),
    )  # fmt: skip
    return Ledger(run_dir, start, world.rank)


def name_of(number: int, rank: int) -> str:
    """Return the name of a start's file of a rank."""
    return f"start-{number:04d}-rank-{rank:05d}.jsonl"


def next_number(run_dir: Path) -> int:
    """Return the number of a run's next start."""
    found = (run_dir / FOLDER).glob("start-*-rank-*.jsonl")
    return 1 + max((int(file.name.split("-")[1]) for file in found), default=-1)


def digest_of(views_VBCHW: torch.Tensor) -> torch.Tensor:
    """Return a number that other pixels, or the same in another order, would change.

    Args:
        views_VBCHW: uint8 views; their layout in memory does not count.

    Returns:
        int64 scalar on their device, see :mod:`fastclr.digests`.
    """
    bytes_RK = views_VBCHW.permute(0, 1, 3, 4, 2).reshape(views_VBCHW.shape[:2].numel(), -1)
    row_R = digest_rows(bytes_RK)
    return ((row_R ^ (row_R >> 29)) * odd(len(row_R), row_R.device)).sum()


def unsigned(digest: torch.Tensor) -> int:
    """Return a digest as it stands in an :class:`Entry`, 0 to 2^64 - 1."""
    return int(digest) & 0xFFFFFFFFFFFFFFFF


def _pack(id_B: npt.NDArray[np.int64]) -> str:
    """Write ids in as few bytes as the largest takes."""
    width = "<u4" if not len(id_B) or id_B.max() < 2**32 else "<u8"
    kind = "" if width == "<u4" else "8:"
    return kind + base64.b64encode(id_B.astype(width).tobytes()).decode("ascii")


def _unpack(text: str) -> npt.NDArray[np.int64]:
    """Read what :func:`_pack` wrote."""
    width = "<u8" if text.startswith("8:") else "<u4"
    data = base64.b64decode(text.removeprefix("8:"), validate=True)
    return np.frombuffer(data, width).astype(np.int64)


def starts_of(run_dir: Path) -> list[Start]:
    """Return a run's starts, in their order.

    Raises:
        ConfigError: If there are none, or one cannot be read.
    """
    found = []
    for number in range(next_number(run_dir)):
        file = run_dir / FOLDER / name_of(number, 0)
        try:
            with file.open(encoding="ascii") as stream:
                found.append(Start(**json.loads(stream.readline())))
        except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"{file} cannot be read ({error}): without it nobody can tell which steps of other "
                "starts count. Restore the run's folder."
            ) from error
    if not found:
        raise ConfigError(f"{run_dir} has no ledger: name the --run-dir of a training run.")
    return found


def entries(run_dir: Path, start: Start, rank: int) -> Iterator[Entry]:
    """Yield what a start of a rank wrote; a line that was cut at the end is no line.

    Raises:
        ConfigError: If the file is missing, or damaged elsewhere.
    """
    file = run_dir / FOLDER / name_of(start.number, rank)
    try:
        lines = file.read_text(encoding="ascii").split("\n")
        if Start(**json.loads(lines[0])) != start:
            raise ValueError("its first line is another start's")
        for line in lines[1:-1]:
            fields = json.loads(line)
            loss = float("nan") if fields["loss"] is None else float.fromhex(fields["loss"])
            ids, views = _unpack(fields["ids"]), int(fields["views"], 16)
            yield Entry(fields["step"], ids, views, loss, fields.get("damaged", 0))
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{file} cannot be read ({type(error).__name__}: {error}): what its rank learned from "
            "is not known. Restore the run's folder."
        ) from error


def history(run_dir: Path) -> Iterator[tuple[Start, list[list[Entry]]]]:
    """Yield each start with the entries of its ranks that count: those no later start made void.

    Raises:
        ConfigError: See :func:`starts_of` and :func:`entries`.
    """
    starts = starts_of(run_dir)
    for number, start in enumerate(starts):
        until = min((later.step for later in starts[number + 1 :]), default=None)
        if until is not None and until <= start.step:
            yield start, [[] for _ in range(start.num_ranks)]  # killed before it had saved a step
            continue
        ranks = range(start.num_ranks)
        found = [list(entries(run_dir, start, rank)) for rank in ranks]
        yield start, [[e for e in own if until is None or e.step <= until] for own in found]
