"""The matrices are the exact colours where those neither clip nor turn the hue."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as ops

from pipelines.colour_affine import matrices
from pipelines.policy import SimCLRPolicy, ViewParams

STEPS = (ops.adjust_brightness, ops.adjust_contrast, ops.adjust_saturation)


def draw(n: int, **changes: object) -> ViewParams:
    sizes_N2 = np.full((n, 2), 50, np.int32)
    params = SimCLRPolicy(size=24, jitter_prob=0.7, color_strength=0.3).draw(
        seed=1, epoch=0, positions=np.arange(n), view=0, sizes_N2=sizes_N2
    )
    return replace(params, **changes)  # pyright: ignore[reportArgumentType]


def apply(params: ViewParams, x_NHW3: np.ndarray) -> np.ndarray:
    a_N33, b_N33 = matrices(params)
    assert a_N33.dtype == b_N33.dtype == np.float32
    mean_N3 = x_NHW3.mean((1, 2))
    y = np.einsum("nij,nhwj->nhwi", a_N33, x_NHW3)
    return y + np.einsum("nij,nj->ni", b_N33, mean_N3)[:, None, None]


def test_without_clips_and_hue_they_are_torchvisions_steps_in_every_order() -> None:
    n = 60
    params = draw(n)
    assert len(np.unique(params.order_N4, axis=0)) > 15
    assert 0 < params.jitter_N.sum() < n and 0 < params.gray_N.sum() < n
    params.factors_N4[:, 3] = 0
    x_NHW3 = np.random.default_rng(0).uniform(0.4, 0.6, (n, 6, 5, 3))
    found = apply(params, x_NHW3)
    for i in range(n):
        x = torch.from_numpy(x_NHW3[i]).permute(2, 0, 1)
        for step in params.order_N4[i] if params.jitter_N[i] else ():
            if step < 3:
                x = STEPS[step](x, float(params.factors_N4[i, step]))
        if params.gray_N[i]:
            x = ops.rgb_to_grayscale(x, num_output_channels=3)
        assert np.abs(found[i] - x.permute(1, 2, 0).numpy()).max() < 2e-3


@pytest.mark.parametrize(("turns", "becomes"), [(1 / 3, (0, 1, 0)), (-1 / 3, (0, 0, 1)), (1, 0)])
def test_a_third_of_a_turn_takes_red_to_green(turns: float, becomes: object) -> None:
    params = draw(2, jitter_N=np.ones(2, bool), gray_N=np.zeros(2, bool))
    params.factors_N4[:] = (1, 1, 1, turns)
    red = np.broadcast_to(np.array([1.0, 0, 0]), (2, 3, 3, 3))
    gray = np.full((2, 3, 3, 3), 0.5)
    assert np.allclose(apply(params, red), red if becomes == 0 else becomes, atol=1e-6)
    assert np.allclose(apply(params, gray), gray, atol=1e-6), "gray has no hue"


def test_no_jitter_is_the_identity() -> None:
    params = draw(3, jitter_N=np.zeros(3, bool), gray_N=np.zeros(3, bool))
    a_N33, b_N33 = matrices(params)
    assert (a_N33 == np.eye(3)).all() and (b_N33 == 0).all()
