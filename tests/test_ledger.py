"""What is written down of a step, how it is read again, and what a kill leaves."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from fastclr.audit import _compare_steps
from fastclr.batch import Batch
from fastclr.config import ConfigError
from fastclr.ledger import (
    FOLDER,
    Ledger,
    Start,
    digest_of,
    entries,
    history,
    name_of,
    next_number,
    starts_of,
    unsigned,
)


def start(number=0, step=0, num_ranks=1):
    return Start(number, step, num_ranks, 4, 5, "digest", 7)


def batch(seed, ids=(0, 1, 2, 3)):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, len(ids), 8, 8, 3)
    views = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    ids = torch.tensor(ids)
    return Batch(views.permute(0, 1, 4, 2, 3), torch.full_like(ids, -1), ids)


def write(folder, begun, rank, steps):
    ledger = Ledger(folder, begun, rank)
    for step in steps:
        ledger.add(step, batch(10 * step + rank, (step, 5, 6, 7)), torch.tensor(step / 3), 0)
    ledger.close()


def test_an_entry_comes_back_to_the_bit(tmp_path):
    ledger = Ledger(tmp_path, start(), 0)
    first, second = batch(0, ids=(5, 2**31, 2**40, 1)), batch(1)
    loss = torch.tensor(1 / 3)
    ledger.add(1, first, loss, 0)
    ledger.add(2, second, None, 3)
    ledger.commit()
    one, two = entries(tmp_path, start(), 0)
    assert one.id_B.tolist() == [5, 2**31, 2**40, 1] and one.loss == loss.item()
    assert one.views == unsigned(digest_of(first.views_VBCHW)) != two.views
    assert (one.step, two.step, one.damaged, two.damaged) == (1, 2, 0, 3)
    assert math.isnan(two.loss)
    ledger.close()


def test_the_digest_knows_each_pixel_and_place():
    views = batch(0).views_VBCHW
    expected = digest_of(views)
    assert digest_of(views.contiguous()) == expected, "the layout in memory counts"
    for place in itertools.product((0, 1), (0, 3), (0, 2), (0, 7), (0, 7)):
        changed = views.clone()
        changed[place] ^= 1
        assert digest_of(changed) != expected
    assert digest_of(views.flip(0)) != expected, "views swapped"
    assert digest_of(views.flip(1)) != expected, "images swapped"
    assert digest_of(views.flip(4)) != expected, "mirrored"
    odd_side = torch.randint(0, 256, (2, 3, 3, 5, 5)).to(torch.uint8)
    assert digest_of(odd_side) != digest_of(odd_side ^ 1)


def test_what_later_starts_repeat_is_void(tmp_path):
    for rank in (0, 1):
        write(tmp_path, start(0, 0, 2), rank, [1, 2, 3, 4])
    write(tmp_path, start(1, 2, 1), 0, [3, 4, 5])
    write(tmp_path, start(2, 2, 1), 0, [])
    write(tmp_path, start(3, 2, 1), 0, [3])
    kept = [[[e.step for e in own] for own in ranks] for _, ranks in history(tmp_path)]
    assert kept == [[[1, 2], [1, 2]], [[]], [[]], [[3]]]
    assert next_number(tmp_path) == 4 and len(starts_of(tmp_path)) == 4


def test_a_line_that_a_kill_has_cut_is_none(tmp_path):
    write(tmp_path, start(), 0, [1, 2])
    file = tmp_path / FOLDER / name_of(0, 0)
    whole = file.read_bytes()
    cut = whole[: whole.rindex(b"\n", 0, -1) + 1]
    for end in range(len(cut), len(whole)):
        file.write_bytes(whole[:end])
        assert [e.step for e in entries(tmp_path, start(), 0)] == [1]


def test_damage_elsewhere_is_named(tmp_path):
    write(tmp_path, start(), 0, [1, 2])
    file = tmp_path / FOLDER / name_of(0, 0)
    lines = file.read_text().split("\n")
    for wrong in ("", "{}", "[]", json.dumps({"step": 1, "ids": "?", "views": "0", "loss": None})):
        file.write_text("\n".join([lines[0], wrong, *lines[2:]]))
        with pytest.raises(ConfigError, match=r"start-0000-rank-00000.jsonl cannot be read"):
            list(entries(tmp_path, start(), 0))
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="another start's"):
        list(entries(tmp_path, start(step=1), 0))
    file.unlink()
    with pytest.raises(ConfigError, match="has no ledger"):
        starts_of(tmp_path)


def test_many_ids_take_few_bytes(tmp_path):
    ledger = Ledger(tmp_path, start(), 0)
    ids = torch.arange(10_000)
    views = torch.zeros(2, len(ids), 3, 1, 1, dtype=torch.uint8)
    ledger.add(1, Batch(views, ids, ids), torch.tensor(0.5), 0)
    ledger.close()
    assert (tmp_path / FOLDER / name_of(0, 0)).stat().st_size < 5.5 * len(ids)
    (entry,) = entries(tmp_path, start(), 0)
    assert np.array_equal(entry.id_B, np.arange(10_000))


def test_a_bit_of_a_loss_and_a_missing_step_show_when_steps_are_taken_again(tmp_path):
    then, now = tmp_path / "then", tmp_path / "now"
    for rank in (0, 1):
        write(then, start(num_ranks=2), rank, [1, 2, 3, 4])
        write(now, start(step=2, num_ranks=2), rank, [3, 4] if rank else [3])

    def differing():
        return [row.deviation for row in _compare_steps(then, now, 3, 4)]

    assert differing() == [1, 0, 0, 0]
    file = now / FOLDER / name_of(0, 1)
    lines = file.read_text().split("\n")
    entry = json.loads(lines[1])
    loss = float.fromhex(entry["loss"])
    for key, value in (
        ("loss", math.nextafter(loss, 2).hex()),
        ("views", "0" * 16),
        ("ids", json.loads(lines[2])["ids"]),
    ):
        file.write_text("\n".join([lines[0], json.dumps({**entry, key: value}), *lines[2:]]))
        assert sum(differing()) == 2, key


@pytest.mark.parametrize("value", [b"1e9990", b'"0"', b"0.0", b"null", b"true"])
def test_a_start_without_numbers_is_refused(tmp_path, value):
    file = tmp_path / "ledger/start-0000-rank-00000.jsonl"
    file.parent.mkdir()
    first = json.dumps(asdict(start())).encode()
    file.write_bytes(first.replace(b'"number": 0', b'"number": ' + value) + b"\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        list(history(tmp_path))


def test_a_loss_too_large_to_be_one_is_refused(tmp_path):
    file = tmp_path / "ledger/start-0000-rank-00000.jsonl"
    file.parent.mkdir()
    line = {"step": 1, "ids": "AAAAAA==", "views": "00", "loss": "0x1p+99999"}
    file.write_text(f"{json.dumps(asdict(start()))}\n{json.dumps(line)}\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        list(history(tmp_path))
