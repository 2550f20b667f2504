"""Hashes and syncs beside the writing: all of it, and what fails is raised."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from fastclr import sealing
from fastclr.sealing import Seals


def test_hashes_and_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(sealing, "sync", lambda path: synced.append(path.name))
    (tmp_path / "sub").mkdir()
    with Seals(tmp_path) as seals:
        for number, name in enumerate(("a.pt", "sub/b.pt")):
            file = tmp_path / name
            file.write_bytes(bytes([number]) * 300_000)
            file.chmod(0o666)
            seals.begin(file)
        seals.write_text(tmp_path / "list", "é")
        seals.sync(tmp_path)
        found = seals.hashes()
        seals.wait()
    assert found == {
        name: hashlib.sha256(bytes([k]) * 300_000).hexdigest()
        for k, name in enumerate(("a.pt", "sub/b.pt"))
    }
    assert sorted(synced) == sorted(["a.pt", "b.pt", "list", tmp_path.name])
    assert (tmp_path / "list").read_text(encoding="utf-8") == "é"
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in found] == [0o644] * 2


def test_a_file_written_twice_has_the_hash_of_the_second(tmp_path: Path) -> None:
    file = tmp_path / "a"
    with Seals(tmp_path) as seals:
        for data in (b"one", b"two"):
            file.write_bytes(data)
            seals.begin(file)
            seals.wait()
        assert seals.hashes() == {"a": hashlib.sha256(b"two").hexdigest()}


@pytest.mark.parametrize("part", ["sync", "sha256_of"])
def test_what_fails_beside_is_raised_where_it_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def fails(_: Path) -> None:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(sealing, part, fails)
    (tmp_path / "a").write_bytes(b"a")
    with Seals(tmp_path) as seals:
        seals.begin(tmp_path / "a")
        with pytest.raises(OSError, match="Input/output"):
            seals.wait() if part == "sync" else seals.hashes()


def test_no_thread_outlives_it(tmp_path: Path) -> None:
    with Seals(tmp_path) as seals:
        (tmp_path / "a").write_bytes(bytes(10**6))
        seals.begin(tmp_path / "a")
    assert not [t for t in threading.enumerate() if t.name.startswith("fastclr-seal")]
