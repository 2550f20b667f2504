"""Statistics of parts of a batch: torch's BatchNorm on each part."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastclr.batch_norm import GlobalBatchNorm
from fastclr.config import ConfigError
from fastclr.simclr import SimCLR
from fastclr.studies.head_starts import Context, build
from fastclr.studies.local_statistics import PartialBatchNorm, divide
from fastclr.studies.scales import TOY
from fastclr.studies.study import Variant
from fastclr.studies.work import train


@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, ()), (nn.BatchNorm2d, (4, 3))])
def test_each_part_is_normalised_with_both_of_its_views(kind, shape):
    generator = torch.Generator().manual_seed(0)
    plain = nn.Sequential(kind(5))
    nn.init.normal_(plain[0].weight, generator=generator)
    divided = copy.deepcopy(plain)
    divide(divided, 3, 12)
    x = torch.randn(24, 5, *shape, generator=generator)
    y = divided(x)
    rows = torch.arange(24).view(2, 3, 4)
    first = None
    for part in range(3):
        mine = copy.deepcopy(plain)
        torch.testing.assert_close(y[rows[:, part].flatten()], mine(x[rows[:, part].flatten()]))
        first = first or mine
    for name, value in first.state_dict().items():
        assert torch.equal(divided.state_dict()[name], value), name
    torch.testing.assert_close(divided.eval()(x), first.eval()(x))


def test_one_part_is_the_whole():
    plain = nn.Sequential(nn.BatchNorm1d(5))
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    divided = copy.deepcopy(plain)
    divide(divided, 1, 4)
    assert torch.equal(divided(x), plain(x))


def test_a_run_has_them_in_training(job, images):
    local = replace(TOY.base, batch_norm="local")
    config = replace(local, head=replace(local.head, norm="batch"))
    variant = Variant(norm_parts=4)
    model = build(variant, Context(config, images, 1), torch.device("cpu"))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 5 and all(type(m) is PartialBatchNorm for m in norms)
    assert model.state_dict().keys() == SimCLR.from_config(config).state_dict().keys()
    trained, _ = train(job(config, variant, "parts"))
    whole, _ = train(job(config, name="whole"))
    assert any(isinstance(m, PartialBatchNorm) for m in trained.modules())
    assert not any(isinstance(m, (PartialBatchNorm, GlobalBatchNorm)) for m in whole.modules())
    name = "encoder.network.conv1.weight"
    assert not torch.equal(trained.state_dict()[name], whole.state_dict()[name])


@pytest.mark.parametrize("num_parts", [0, 5])
def test_unequal_parts_are_refused(num_parts):
    with pytest.raises(ConfigError, match=f"12 images has no {num_parts} equal parts"):
        divide(nn.Sequential(nn.BatchNorm1d(5)), num_parts, 12)


def test_a_norm_that_does_more_is_refused():
    with pytest.raises(ConfigError, match="0 is a SyncBatchNorm"):
        divide(nn.Sequential(nn.SyncBatchNorm(5)), 2, 12)
