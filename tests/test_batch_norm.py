"""BatchNorm over ranks is torch's BatchNorm over the whole batch in one process."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from fastclr import batch_norm, encoders, heads
from fastclr.batch_norm import (
    GlobalBatchNorm,
    has_batch_norm,
    share_statistics,
    without_batch_norm,
)
from fastclr.config import Config, EncoderConfig
from fastclr.simclr import SimCLR

SCRIPT = Path(__file__).with_name("batch_norm_ranks.py")


@pytest.fixture(scope="module")
def ranks():
    spec = importlib.util.spec_from_file_location("batch_norm_ranks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=[1, 2, 4])
def measured(request, run_ranks):
    return request.param, run_ranks(SCRIPT, request.param)


def deviation(found: dict, expected: dict) -> dict[str, float]:
    """Largest difference of each tensor, relative to its largest element."""
    pairs = {name: (torch.tensor(found[name]), torch.tensor(expected[name])) for name in expected}
    return {name: ((a - b).abs().max() / b.abs().max()).item() for name, (a, b) in pairs.items()}


@pytest.mark.parametrize(
    ("name", "momentum"), [("moving", 0.2), ("cumulative", None), ("channels last", 0.2)]
)
def test_over_unequal_ranks_it_is_one_process(ranks, measured, name, momentum):
    expected = ranks.measure(ranks.network(momentum), ranks.images(), 1.0)
    worst = deviation(measured[1][name], expected)
    assert max(worst.values()) < 1e-11, worst


@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (6, 5), (6, 5, 7), (6, 5, 4, 3, 2)])
@pytest.mark.parametrize("last", [False, True])
def test_kernels_and_plain_operations_agree(monkeypatch, shape, last):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    if last and len(shape) == 4:
        x, grad = (t.to(memory_format=torch.channels_last) for t in (x, grad))
    fast = batch_norm._moments(x + 3)
    sums = batch_norm._sums(grad, x, *fast, 1e-5)
    monkeypatch.setattr(batch_norm, "_has_kernels", lambda _: False)
    plain = batch_norm._moments(x + 3)
    torch.testing.assert_close(fast, plain, rtol=1e-13, atol=0)
    torch.testing.assert_close(sums, batch_norm._sums(grad, x, *plain, 1e-5), rtol=0, atol=1e-12)


def test_local_statistics_would_be_seen(ranks, measured):
    num_ranks, found = measured
    expected = ranks.measure(ranks.network(), ranks.images(), 1.0)
    worst = deviation(found["local"], expected)
    assert (min(worst[key] for key in ("out", "grad", "parameters")) > 1e-2) == (num_ranks > 1)


def test_gradient_caching_updates_running_statistics_once(ranks, measured):
    expected = ranks.cached(ranks.network(), ranks.images())
    assert measured[1]["cached"] == pytest.approx(expected, rel=1e-11)


def test_autocast_keeps_the_type_of_torchs(ranks, measured):
    with torch.autocast("cpu", torch.bfloat16):
        plain = ranks.network().float()
        out, norm = plain((ranks.images() / 1e3).float()), plain[0](ranks.images().bfloat16())
    assert measured[1]["autocast"] == [str(out.dtype), str(norm.dtype)]


def test_names_and_values_of_a_state_dict_stay():
    before = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    state = before.state_dict()
    share_statistics(before)
    assert isinstance(before[1], GlobalBatchNorm)
    assert list(before.state_dict()) == list(state)
    share_statistics(before)  # twice does no harm


def test_a_norm_that_does_something_else_is_refused():
    class Whitening(nn.BatchNorm2d):
        pass

    with pytest.raises(TypeError, match=r"1 is a Whitening.*local statistics"):
        share_statistics(nn.Sequential(nn.ReLU(), Whitening(3)))


def test_rows_without_channels_are_refused():
    norm = nn.BatchNorm1d(3)
    share_statistics(norm)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        norm(torch.zeros(3))


@pytest.mark.parametrize("name", ["resnet10", "efficientnet_b0", "test_resnet"])
def test_without_batch_norm_no_row_depends_on_another(name):
    stem = "small" if name == "resnet10" else "imagenet"
    encoder = encoders.create(name, width=0.25 if name == "resnet10" else 1.0, stem=stem)
    head = heads.mlp(encoder.feature_dim, 24, 8)
    before = {key: tuple(p.shape) for key, p in nn.Sequential(encoder, head).named_parameters()}
    model = without_batch_norm(nn.Sequential(encoder, head)).double().train()
    assert not has_batch_norm(model)
    assert {key: tuple(p.shape) for key, p in model.named_parameters()} == before
    torch.manual_seed(0)
    for p in model.parameters():  # the last norm of a block may begin at 0
        p.data.uniform_(-0.3, 0.4)
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ == "DropPath":
            module.eval()
    whole = model(images)
    assert torch.allclose(whole[:2], model(images[:2]), atol=1e-12)
    assert whole.std(0).min() > 0


def test_the_activation_of_a_norm_stays():
    norm = BatchNormAct2d(6)
    norm.weight.data.uniform_(-1, 1)
    (replaced,) = without_batch_norm(nn.Sequential(norm)).children()
    x = torch.randn(5, 6, 3, 3)
    expected = nn.functional.group_norm(x, 6, norm.weight, norm.bias, norm.eps).relu()
    assert torch.equal(replaced(x), expected)
    assert (expected == 0).any()


def test_none_is_a_models_setting():
    config = Config(
        encoder=EncoderConfig("resnet10", 0.25, "small"), batch_norm="none", run_dir="x"
    )
    assert not has_batch_norm(SimCLR.from_config(config))
    assert has_batch_norm(SimCLR.from_config(replace(config, batch_norm="global")))
