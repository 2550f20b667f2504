"""Which back-end a name means, and what every back-end keeps to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastclr.config import ConfigError
from pipelines import backends
from pipelines.backends import BACKENDS, TAKE_BYTES, resolve_backend
from pipelines.policy import SimCLRPolicy
from tests.pipelines.fakes import FakeSet

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
POLICY = SimCLRPolicy(size=12)


@pytest.mark.parametrize(
    ("device", "there", "has_triton", "in_memory", "expected"),
    [
        (CPU, ("threads", "triton"), True, False, "threads"),
        (CPU, ("triton",), True, False, "kornia"),
        (CPU, (), False, True, "kornia"),
        (CUDA, ("threads", "triton"), True, False, "triton"),
        (CUDA, ("threads", "triton"), True, True, "triton"),
        (CUDA, ("threads", "triton"), False, False, "kornia"),
        (CUDA, ("threads",), True, False, "kornia"),
    ],
)
def test_auto(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    there: tuple[str, ...],
    has_triton: bool,
    in_memory: bool,
    expected: str,
) -> None:
    known = dict.fromkeys(("kornia", "reference", *there), BACKENDS["kornia"])
    monkeypatch.setattr(backends, "BACKENDS", known)
    monkeypatch.setattr(backends, "_has_triton", lambda: has_triton)
    assert resolve_backend("auto", device, in_memory) == expected
    for name in known:  # an explicit choice stays what it is
        assert resolve_backend(name, device) == name


def test_a_back_end_that_decodes_is_refused_for_decoded_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BACKENDS, "dali", BACKENDS["kornia"])
    with pytest.raises(ConfigError, match=r"'dali' decodes images itself, and data\.in_memory"):
        resolve_backend("dali", CPU, in_memory=True)


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_auto_makes_the_colours_of_the_policy_or_refuses(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    policies = [POLICY, SimCLRPolicy(size=12, colour_model="affine")]
    monkeypatch.setattr(backends, "_has_dali", lambda: True)
    assert resolve_backend("auto", device, policies=policies) == "dali"
    with pytest.raises(ConfigError, match=r"only the back-end dali makes.*leave data\.in_memory"):
        resolve_backend("auto", device, in_memory=True, policies=policies)
    monkeypatch.setattr(backends, "_has_dali", lambda: False)
    with pytest.raises(ConfigError, match=r"DALI is not installed.*exact, or pip install"):
        resolve_backend("auto", device, policies=policies)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'dahli' is unknown: .*reference.*, or auto"):
        resolve_backend("dahli", CPU)


@pytest.mark.parametrize("name", BACKENDS)
def test_one_image_alone_is_the_same_as_in_a_batch(name: str) -> None:
    """The loader tries the images of a refused batch alone."""
    backend = BACKENDS[name]([POLICY] * 2, CPU, 1)
    assert backend.takes_bytes == (name in TAKE_BYTES)
    images, ids_N = FakeSet((6,)), np.arange(6)
    source = [images.read(i) if backend.takes_bytes else images[i] for i in range(6)]
    params = [
        POLICY.draw(seed=0, epoch=0, positions=ids_N, view=v, sizes_N2=images.sizes(ids_N))
        for v in (0, 1)
    ]
    whole = backend(source, params)
    for row in range(6):
        one = slice(row, row + 1)
        alone = backend(source[one], [p[one] for p in params])
        assert (whole[:, one].int() - alone.int()).abs().max() <= 1
