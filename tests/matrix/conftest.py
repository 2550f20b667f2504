"""The cells' training: one process group per number of ranks, for all tests of the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.matrix import deviations


@pytest.fixture(scope="session")
def measured(run_ranks) -> deviations.Measured:
    """Train every cell; ``pytest -s`` shows how far the product is from one process in fp32."""
    script = Path(__file__).with_name("matrix_ranks.py")
    # The script starts the ranks itself: they share what they import, half of their work.
    found = {int(ranks): f for ranks, f in run_ranks(script, 1, timeout_seconds=500).items()}
    print("\nway of the weights, loss; from one process in fp32\n" + deviations.table(found))
    return found
