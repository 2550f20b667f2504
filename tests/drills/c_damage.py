"""C: damaged data. Cut, flipped, with another's index, more of it than allowed."""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from drill import Cells, Drill
from forks import Ranks, train
from mangling import a_bit_flipped

from fastclr.config import DataConfig
from fastclr.world import World
from pipelines.damage import GoodSamples
from pipelines.shards import DamagedSample, ShardError, ShardSet

HOSTILE = "tests/pipelines/test_foreign_hostile.py"
CUTS = 478


def cut_shards(cells: Cells) -> None:
    """C1: a shard cut anywhere; each sample comes whole or an error does."""
    source = (cells.folder / "train").resolve()
    packed = shutil.copytree(source, cells.folder / "packed")
    (tar,) = packed.glob("*.tar")
    whole = tar.read_bytes()
    right = ShardSet.open(source)
    expected = [right.read(i) for i in range(len(right))]
    blocks = list(range(0, len(whole), 512))
    count = min(len(blocks), CUTS * 3 // 5)
    cuts = sorted({*cells.generator.sample(blocks, count),
                   *cells.generator.sample(range(len(whole)), CUTS - count)})  # fmt: skip
    while len(cuts) < CUTS:
        cuts.append(cells.generator.randrange(len(whole)))
    foreign = cells.folder / "foreign"
    foreign.mkdir()
    for cut in cuts:
        with cells.cell(f"packed, {cut} bytes left"):
            _is_told(packed, tar, whole[:cut], expected)
        with cells.cell(f"cut while it is read, {cut} bytes left"):
            _is_told_later(packed, tar, whole, cut, expected)
        with cells.cell(f"tars of others, {cut} bytes left"):
            _is_told(foreign, foreign / tar.name, whole[:cut], expected)
    cells.tests("tests/pipelines/test_remote.py::test_no_truncation_is_silent")
    cells.notes.append(f"{len(cuts)} cuts of {len(whole)} bytes, 3 ways, and {CUTS} over http")


def _is_told(folder: Path, tar: Path, data: bytes, expected: list[bytes]) -> None:
    """Check that a set is refused or has all its samples."""
    tar.write_bytes(data)
    for index in folder.glob(f".{tar.name}*"):
        index.unlink()
    try:
        found = ShardSet.open(folder, cache_dir=folder.parent / "indexes", max_damaged=0)
        samples = [found.read(i) for i in range(len(found))]
    except ShardError as error:
        assert tar.name in str(error) or (not data and str(folder) in str(error)), error
    else:
        assert samples == expected, f"{len(samples)} of {len(expected)} samples, silently"


def _is_told_later(folder: Path, tar: Path, whole: bytes, cut: int, expected: list[bytes]) -> None:
    """Check that a set cut while it is open gives each sample whole or an error."""
    tar.write_bytes(whole)
    found = ShardSet.open(folder)
    found.read(0)
    with tar.open("r+b") as stream:
        stream.truncate(cut)
    for i, sample in enumerate(expected):
        try:
            assert found.read(i) == sample
        except ShardError as error:
            assert tar.name in str(error), error


def flipped_shards(cells: Cells) -> None:
    """C2: one bit of a tar or an index; named against the manifest."""
    packed = shutil.copytree((cells.folder / "train").resolve(), cells.folder / "packed")
    files = [*packed.glob("*.tar"), *packed.glob("*.index.jsonl")]
    for _ in range(1000 if cells.is_long else 200):
        file = cells.generator.choice(files)
        with a_bit_flipped(cells, file):
            try:
                found = ShardSet.open(packed)
                found.verify()
                _ = found.label_N
                raise AssertionError("nothing was noticed")
            except ShardError as error:
                assert file.name in str(error), error
    _a_bit_while_training(cells)


def _a_bit_while_training(cells: Cells) -> None:
    """Train on a tar with a flipped bit that no decoder would notice: told by all ranks, soon."""
    packed = shutil.copytree((cells.folder / "train").resolve(), cells.folder / "flipped")
    (tar,) = packed.glob("*.tar")
    whole = bytearray(tar.read_bytes())
    whole[-1] ^= 1
    tar.write_bytes(whole)
    data = DataConfig(train=str(packed))
    for ranks in (1, 2):
        with cells.cell(f"a training run, {ranks} ranks"):
            run_dir = cells.folder / f"flipped{ranks}"
            work = partial(train, cells.folder, run_dir, data=data, epochs=1000)
            run = Ranks(cells.folder, ranks, work)
            assert run.wait(60) and run.codes == [65] * ranks, (run.codes, run.said())
            assert tar.name in run.said() and "sha256" in run.said(), run.said()


def damaged_images(cells: Cells) -> None:
    """C3: images damaged in every way: refused alike by all back-ends, replaced the same way."""
    cells.tests(
        "tests/pipelines/test_decode.py::test_damaged_jpegs_are_refused",
        "tests/pipelines/test_decode.py::test_cut_png_and_webp_are_refused",
        "tests/pipelines/test_decode.py::test_any_damage_gives_an_image_or_damaged_image",
        "tests/pipelines/test_decode.py::test_what_is_cut_is_refused_by_its_header",
        "tests/pipelines/test_decode.py::test_other_formats_are_refused",
        "tests/pipelines/test_augment_dali.py::test_damage_is_named_by_image_and_the_next_batch_is_right",
        "tests/pipelines/test_augment_dali.py::test_every_format_has_the_pixels_of_decode",
        "tests/pipelines/test_damage.py",
    )


def foreign_indexes(cells: Cells) -> None:
    """C4: an index of another shard, an old one, one that lies."""
    cells.tests(
        "tests/pipelines/test_shards.py::test_a_tampered_index",
        "tests/pipelines/test_shards.py::test_an_index_line_that_cannot_be",
        "tests/pipelines/test_shards.py::test_an_image_of_another_size_than_its_index",
        "tests/pipelines/test_shards.py::test_an_image_of_another_length_than_its_index",
        "tests/pipelines/test_foreign.py::test_a_cache_with_lies_is_found",
        "tests/pipelines/test_foreign.py::test_indexed_once_and_again_when_changed",
        "tests/commands/test_check.py::test_dali_index_of_another_tar",
        "tests/commands/test_check.py::test_an_index_that_lies_with_the_right_hash",
    )


def too_much_damage(cells: Cells) -> None:
    """C5: more damaged images than allowed, on one rank: all stop at the same step with 65."""
    image = GoodSamples._image

    def damaged(self: GoodSamples, sample_id: int) -> Any:
        if World.detect().rank == 1 and sample_id % 3 == 0:
            raise DamagedSample(f"shard, key {sample_id:09d}", "is damaged for this drill")
        return image(self, sample_id)

    for policy, most in ("replace", 4), ("raise", 0):
        with cells.cell(policy):
            data = DataConfig(
                train=str(cells.folder / "train"), on_damage=policy, most_damaged=most
            )
            run_dir = cells.folder / policy
            with (
                mock.patch.object(GoodSamples, "_image", damaged),
                mock.patch.object(ShardSet, "images", lambda self, ids: [None] * len(ids)),
            ):
                run = Ranks(cells.folder, 2, partial(train, cells.folder, run_dir, data=data))
            assert run.wait(30) and run.codes == [65, 65], (run.codes, run.said(), run.said(1))
            assert "rank 1: " in run.said() and "is damaged for this drill" in run.said(), (
                run.said()
            )
            assert f"data.most_damaged is {most}" in run.said() or policy == "raise", run.said()


DRILLS = {
    "C1": Drill(
        "a shard cut anywhere, while it is read, over http: no silent loss", cut_shards, 120
    ),
    "C2": Drill(
        "one bit of a shard or its index flipped: named against the manifest, in training too",
        flipped_shards,
        90,
        150,
    ),
    "C3": Drill(
        "damaged images: refused alike by all back-ends, replaced the same way", damaged_images, 120
    ),
    "C4": Drill(
        "an index of another shard, an old one, one that lies: refused", foreign_indexes, 90
    ),
    "C5": Drill(
        "more damage than allowed on one rank: all ranks stop with 65", too_much_damage, 60
    ),
}
logging.getLogger("pipelines").setLevel(logging.ERROR)
