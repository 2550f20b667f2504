"""Files are whole or unchanged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from fastclr.files import sha256_of, write_durably, write_json


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 5 << 19])
def test_sha256_of_files_around_the_block_size(tmp_path, size):
    content = bytes(i % 251 for i in range(1000)) * (size // 1000 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()


def test_writing_replaces_and_leaves_nothing_beside(tmp_path):
    file = tmp_path / "file.txt"
    file.write_text("before, and longer")
    write_durably(file, "naïve ∑")
    assert file.read_bytes() == "naïve ∑".encode()
    assert list(tmp_path.iterdir()) == [file]


def test_a_stop_before_the_end_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "file.txt"
    file.write_text("before")

    def stop(*_: object) -> None:
        assert file.read_text() == "before"
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_durably(file, "after")
    assert file.read_text() == "before"
    monkeypatch.undo()
    write_durably(file, "after")  # what the stop left is no obstacle
    assert file.read_text() == "after"
    assert list(tmp_path.iterdir()) == [file]


def test_the_text_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    replace = Path.replace
    monkeypatch.setattr("os.fsync", lambda _: calls.append("fsync"))
    monkeypatch.setattr(Path, "replace", lambda *args: (calls.append("replace"), replace(*args)))
    write_durably(tmp_path / "file", "text")
    assert calls == ["fsync", "replace"]


def test_write_json(tmp_path):
    value = {"a": [1, 2.5, None], "ü": {"b": True}}
    write_json(tmp_path / "file.json", value)
    assert json.loads((tmp_path / "file.json").read_text()) == value


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "file.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "file.json", {"a": object()})
    assert (tmp_path / "file.json").read_text() == "1"
