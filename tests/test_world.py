"""Ranks from the launcher's environment."""

from __future__ import annotations

import dataclasses

import pytest

from fastclr.config import ConfigError
from fastclr.world import World


def test_without_a_launcher_there_is_one_rank():
    world = World.detect({})
    assert world == World(0, 1, 0, 1)
    assert world.is_main


@pytest.mark.parametrize(
    ("environ", "num_local_ranks"),
    [
        ({}, 4),  # one node is assumed
        ({"LOCAL_SIZE": "2"}, 2),  # deepspeed
        ({"LOCAL_WORLD_SIZE": "2"}, 2),  # torchrun
        ({"LOCAL_WORLD_SIZE": "", "LOCAL_SIZE": "2"}, 2),
    ],
)
def test_launchers(environ, num_local_ranks):
    world = World.detect({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **environ})
    assert world == World(3, 4, 1, num_local_ranks)
    assert not world.is_main


def test_the_process_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert World.detect().rank == 1


@pytest.mark.parametrize(
    "values", [(1, 1, 0, 1), (-1, 2, 0, 1), (0, 0, 0, 1), (0, 2, 2, 2), (0, 2, -1, 2)]
)
def test_impossible_worlds_are_refused(values):
    with pytest.raises(ConfigError, match=r"is not a world.*unset RANK"):
        World(*values)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_text_is_refused(name):
    with pytest.raises(ConfigError, match=r"must be integers.*'first'"):
        World.detect({name: "first"})


def test_contradiction_in_the_environment_keeps_its_own_message():
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        World.detect({"RANK": "2", "WORLD_SIZE": "2"})


def test_a_world_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        World().rank = 1  # type: ignore[misc]
