"""The model: a function of its seed, from bytes to projections, view-major."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from fastclr.config import Config, EncoderConfig, HeadConfig
from fastclr.simclr import SimCLR

CONFIG = Config(
    encoder=EncoderConfig("resnet10", 0.25, "small_stride2"), head=HeadConfig(output_dim=16)
)
B = 3


def views() -> torch.Tensor:
    """Return random views."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, B, 3, 16, 16), dtype=torch.uint8, generator=generator)


def weights(config: Config) -> torch.Tensor:
    """Return all of a new model's numbers as one vector."""
    return torch.cat([v.flatten() for v in SimCLR.from_config(config).state_dict().values()])


def test_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    first = weights(CONFIG)
    torch.manual_seed(2)
    torch.rand(5)
    assert torch.equal(weights(CONFIG), first)
    assert not torch.equal(weights(replace(CONFIG, seed=1)), first)
    assert torch.equal(weights(replace(CONFIG, run_dir="elsewhere")), first)


def test_building_draws_nothing_from_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    SimCLR.from_config(CONFIG)
    assert torch.equal(torch.rand(4), expected)


def test_bytes_become_projections():
    model = SimCLR.from_config(CONFIG)
    output = model(views())
    assert output.h_NF.shape == (2 * B, model.encoder.feature_dim)
    assert output.z_ND.shape == (2 * B, 16)
    assert output.z_ND.dtype == torch.float32
    torch.testing.assert_close(output.z_ND, model.projection_head(output.h_NF))
    output.z_ND.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_encoder_sees_0_to_1_and_both_views_at_once():
    seen = []

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
            seen.append(images_NCHW)
            return images_NCHW.mean((2, 3)) * self.scale

    views_VBCHW = torch.zeros(2, B, 3, 4, 4, dtype=torch.uint8)
    for view in range(2):
        for image in range(B):
            views_VBCHW[view, image] = 51 * (B * view + image)
    output = SimCLR(Mean(), nn.Identity())(views_VBCHW)
    assert len(seen) == 1
    # View-major: all of view 0, then all of view 1.
    torch.testing.assert_close(output.z_ND[:, 0], torch.arange(2.0 * B) / 5)
    z0_BD, z1_BD = output.z_ND.chunk(2)
    torch.testing.assert_close(z1_BD - z0_BD, torch.full((B, 3), B / 5))


def test_the_dtype_of_the_weights_is_that_of_the_work():
    model = SimCLR.from_config(CONFIG).double()
    assert model(views()).z_ND.dtype == torch.float64
