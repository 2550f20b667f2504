"""What needs a GPU: ``make gpu-check`` names these files, which the suite does not collect."""

from __future__ import annotations

import pytest
import torch

from tests.end_to_end.conftest import commands, photos  # noqa: F401


@pytest.fixture(autouse=True, scope="session")
def _there_is_one() -> None:
    assert torch.cuda.is_available(), "no GPU here: nothing was checked"
