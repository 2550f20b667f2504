"""A bit of a file flipped; H6: inputs of parsers mangled, each read or refused by our error."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from drill import Cells

from fastclr import checkpointing, ds_config, ledger, runs
from fastclr.config import Config, ConfigError
from pipelines.decode import DamagedImage, check_image
from pipelines.errors import ShardError
from pipelines.packed import check_index, parse_manifest, read_manifest
from pipelines.remote.urls import protocol_of, redacted
from pipelines.shards import ShardSet
from pipelines.tar_scan import scan

OURS = (ConfigError, ShardError, DamagedImage)
SECONDS = 1.0


@contextmanager
def a_bit_flipped(cells: Cells, file: Path) -> Iterator[None]:
    """Flip a drawn bit of a file while the block runs, which is a cell."""
    whole = file.read_bytes()
    at = cells.generator.randrange(8 * len(whole))
    with cells.cell(f"bit {at} of {file.name}"):
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        file.write_bytes(flipped)
        try:
            yield
        finally:
            file.write_bytes(whole)


def mangled_inputs(cells: Cells, count: int) -> None:
    """Mangle each kind of input in turn, so many times in all."""
    folder = cells.folder / "mangled"
    folder.mkdir()
    readers = _readers(cells.folder / "train", folder)
    outcomes = Counter[str]()
    for number in range(count):
        name = list(readers)[number % len(readers)]
        seed, read = readers[name]
        data = _mangled(seed, cells.generator)
        started = time.monotonic()
        cells.num_cells += 1
        try:
            read(data)
            outcomes["read"] += 1
        except OURS:
            outcomes["refused"] += 1
        except Exception as error:
            kept = folder / f"{name.replace(' ', '-')}-{number}.bin"
            cells.failures.append(f"{name} {number}: {type(error).__name__}: {error} {data[:60]!r}")
            kept.write_bytes(data)
        took = time.monotonic() - started
        cells.slowest = max(cells.slowest, took)
        if took > SECONDS:
            cells.failures.append(f"{name} {number} took {took:.1f} s")
        if len(cells.failures) > 20:
            break
    cells.notes.append(", ".join(f"{n} {what}" for what, n in sorted(outcomes.items())))


def _readers(train: Path, folder: Path) -> dict[str, tuple[bytes, Callable[[bytes], object]]]:
    """Return a good input of each kind, and what reads it."""
    manifest = read_manifest(train)
    (entry,) = manifest.shards
    image = ShardSet.open(train).read(0)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (("a.jpg", image), ("a.cls", b"3"), ("ä" * 60 + ".json", b"{}")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    config = json.dumps(json.loads(json.dumps(Config(), default=vars))).encode()
    start = {"number": 0, "step": 0, "num_ranks": 1, "micro_batch_size": 4,
             "batches_per_epoch": 5, "data": "x", "seed": 1}  # fmt: skip
    line = {"step": 1, "ids": "AAAAAA==", "views": "00", "loss": "0x1p+0"}
    history = "".join(json.dumps(row) + "\n" for row in (start, line, line)).encode()

    def of_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
        def call(data: bytes) -> object:
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            return read(file)

        return call

    def read_run(file: Path) -> object:
        return runs.load_run(file.parent)

    def read_ledger(file: Path) -> object:
        return [list(entries) for _, entries in ledger.history(file.parents[1])]

    def read_text(data: bytes) -> object:
        text = data.decode("utf-8", "replace")
        return redacted(text), protocol_of(text)

    index = (train / entry.index).read_bytes()[:2000]
    facts = {"step": 2, "run": "x", "sha256": {"a": "b"}}
    return {
        "manifest": ((train / "manifest.json").read_bytes(), lambda d: parse_manifest(d, "m")),
        "index": (index, lambda d: check_index(d, entry, 16, "i")),
        "tar": (stream.getvalue(), lambda d: scan(io.BytesIO(d), "x.tar", None)),
        "image": (image, check_image),
        "DeepSpeed JSON": (b'{"fp16": {"enabled": true}, "train_batch_size": 8}',
                           of_file("ds.json", ds_config.read)),
        "settings of a run": (b'{"config": ' + config + b"}", of_file("run/config.json", read_run)),
        "ledger": (history, of_file("r/ledger/start-0000-rank-00000.jsonl", read_ledger)),
        "list of a checkpoint": (
            json.dumps(facts, indent=1).encode(),
            of_file("c/step-0000002/fastclr.json", lambda f: checkpointing._damage(f.parent)),
        ),
        "pointer": (b'"step-0000002"',
                    of_file("c/latest", lambda f: checkpointing._named(f.parent, "latest"))),
        "URL": (b"https://me:secret@host:8080/a/b.tar?x=1", read_text),
    }  # fmt: skip


def _mangled(data: bytes, generator: Random) -> bytes:
    """Turn, cut, repeat, insert or nest a few bytes."""
    raw = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(raw) + 1)
        match generator.randrange(7):
            case 0 if at < len(raw):
                raw[at] ^= 1 << generator.randrange(8)
            case 1:
                raw = raw[:at]
            case 2:
                raw[at:at] = generator.randbytes(generator.randint(1, 9))
            case 3:
                end = min(len(raw), at + generator.randint(1, 200))
                raw[at:at] = raw[at:end] * generator.randint(1, 3)
            case 4:
                del raw[at : at + generator.randint(1, 40)]
            case 5:
                raw[at:at] = generator.choice([b"1e999", b"-1", b"null", b"\0", b"9" * 30, b"NaN",
                                               b'"', b"{", b"true", b"\xff\xfe"])  # fmt: skip
            case 6:
                raw[at:at] = generator.choice([b"[", b'{"a":']) * generator.choice([3, 2000])
    return bytes(raw)
