"""The cells' training: one process group per number of ranks, for all tests of a module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.matrix.deviations import Measured


@pytest.fixture(scope="session")
def train_cells(run_ranks) -> Callable[[str], Measured]:
    """Return a function that runs a script of this folder, which trains cells."""

    def train(script: str) -> Measured:
        # The script starts the ranks itself: they are forks of one process, half of their work.
        found = run_ranks(Path(__file__).with_name(script), 1, timeout_seconds=500)
        return {int(ranks): of_ranks for ranks, of_ranks in found.items()}

    return train
