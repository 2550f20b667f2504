"""Where tests of kernels and back-ends run them: on the CPU, kernels interpreted, or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")


@pytest.fixture(scope="module", autouse=True)
def on_device() -> Iterator[None]:
    """Make what a test module makes there."""
    with DEVICE:
        yield
