"""Projection heads: every kind, its layers and its widths."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastclr import heads
from fastclr.config import ConfigError, HeadConfig

F, D, N = 12, 6, 8
# What a kind projects to; an entry of HEADS that is missing here fails.
WIDTHS = {"none": F, "linear": D, "mlp": D}


def layers(head: nn.Module, kind: type) -> list:
    """Return the layers of a kind."""
    return [m for m in head.modules() if isinstance(m, kind)]


@pytest.mark.parametrize("kind", heads.HEADS)
def test_every_kind_projects_and_can_be_trained(kind):
    head = heads.from_config(HeadConfig(kind=kind, output_dim=D), F)
    h_NF = torch.randn(N, F, requires_grad=True)
    z_ND = head(h_NF)
    assert z_ND.shape == (N, WIDTHS[kind])
    (z_ND * torch.randn_like(z_ND)).sum().backward()
    for tensor in (h_NF, *head.parameters()):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().max() > 0


def test_no_head_changes_nothing():
    h_NF = torch.randn(N, F)
    assert heads.none(F)(h_NF) is h_NF
    assert not list(heads.none(F).parameters())


def test_a_linear_head_is_one_matrix():
    (weight,) = heads.linear(F, D).parameters()
    assert weight.shape == (D, F)


def test_the_default_is_the_papers():
    head = heads.from_config(HeadConfig(), 2048)
    assert [(m.in_features, m.out_features) for m in layers(head, nn.Linear)] == [
        (2048, 2048),
        (2048, 128),
    ]
    assert [type(m) for m in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_depth_counts_linear_layers(depth):
    head = heads.mlp(F, 10, D, depth)
    widths = [(m.in_features, m.out_features) for m in layers(head, nn.Linear)]
    assert widths == [(F, 10), *[(10, 10)] * (depth - 2), (10, D)]
    assert len(layers(head, nn.ReLU)) == len(layers(head, nn.BatchNorm1d)) == depth - 1


@pytest.mark.parametrize("norm", heads.NORMS)
def test_a_bias_only_where_no_norm_takes_it_away(norm):
    kinds = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": nn.Identity}
    head = heads.mlp(F, 10, D, 3, norm)
    hidden = layers(head, nn.Linear)[:-1]
    assert all((m.bias is not None) == (norm == "none") for m in hidden)
    assert layers(head, nn.Linear)[-1].bias is None
    assert [m.normalized_shape if norm == "layer" else 0 for m in layers(head, kinds[norm])] == [
        (10,) if norm == "layer" else 0
    ] * 2


def test_a_configuration_reaches_every_setting():
    head = heads.from_config(HeadConfig("mlp", 3, 7, 5, "layer"), F)
    assert [m.out_features for m in layers(head, nn.Linear)] == [7, 7, 5]
    assert len(layers(head, nn.LayerNorm)) == 2


@pytest.mark.parametrize(("depth", "norm"), [(1, "batch"), (0, "batch"), (2, "group")])
def test_a_head_that_does_not_exist(depth, norm):
    with pytest.raises(ConfigError, match=rf"depth {depth} with norm '{norm}'.*give depth >= 2"):
        heads.mlp(F, depth=depth, norm=norm)


def test_an_unknown_kind():
    with pytest.raises(ConfigError, match="'wide' is unknown: choose from none, linear, mlp"):
        heads.from_config(HeadConfig(kind="wide"), F)
