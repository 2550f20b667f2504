"""Every layer in one pass, pooled; scores that know where the classes are."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from fastclr.config import ConfigError
from fastclr.encoders import Encoder, create
from fastclr.evaluation.features import Features, extract, extract_layers
from fastclr.evaluation.layers import Layers, digest_of, layer_scores, layers_markdown
from fastclr.heads import mlp, none

STAGES = ["encoder.act1", *(f"encoder.layer{k}" for k in range(1, 5))]
HEAD = [f"projection_head.{name}" for name in ("fc1", "norm1", "relu1", "fc2")]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return create("resnet10", 0.125, "small").eval()


@pytest.fixture(scope="module")
def head() -> nn.Sequential:
    torch.manual_seed(1)
    return mlp(64, 24, 8).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def test_every_layer_is_what_its_modules_make_of_the_one_before(encoder, head, images):
    layers = Layers(encoder, head)
    assert layers.names == [*STAGES, "h", *HEAD]
    found = layers(images)
    assert list(found) == layers.names
    network = encoder.network
    x = network.act1(network.bn1(network.conv1(images)))
    torch.testing.assert_close(found["encoder.act1"], x.mean((2, 3)))
    for name in ("layer1", "layer2", "layer3", "layer4"):
        x = network.get_submodule(name)(x)
        torch.testing.assert_close(found[f"encoder.{name}"], x.mean((2, 3)))
    torch.testing.assert_close(found["h"], encoder(images))
    # The head without its top k modules ends at the layer that says so.
    for name in ("h", *HEAD):
        kept = nn.Sequential(*list(head)[: 4 - layers.num_discarded(name)])
        torch.testing.assert_close(found[name], kept(encoder(images)))
    assert [layers.num_discarded(name) for name in ("h", *HEAD)] == [4, 3, 2, 1, 0]
    assert layers.num_discarded("encoder.layer4") is None


@torch.inference_mode()
def test_only_the_wanted_layers_and_no_hook_is_left(encoder, head, images):
    for names in (["h"], ["encoder.layer2"], ["projection_head.fc2", "h"]):
        found = Layers(encoder, head, names)(images)
        assert set(found) == set(names)
    assert not any(m._forward_hooks for m in (*encoder.modules(), *head.modules()))
    with pytest.raises(ConfigError, match=r"no layer 'encoder.layer9': choose from encoder.act1"):
        Layers(encoder, head, ["encoder.layer9"])


@torch.inference_mode()
def test_a_module_that_works_in_place_does_not_change_the_layer_before(images):
    linear = nn.Linear(4, 4)
    head = nn.Sequential(linear, nn.ReLU(inplace=True))
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = Layers(encoder, head)(images)
    torch.testing.assert_close(found["projection_head.0"], linear(encoder(images)))
    assert (found["projection_head.0"] < 0).any()


@torch.inference_mode()
def test_the_features_of_one_pass_are_those_of_a_pass_each(encoder, head, images):
    batches = [((images * 255).to(torch.uint8), torch.arange(5))]
    found = extract_layers(Layers(encoder, head), batches)
    whole = nn.Sequential(encoder, head)
    np.testing.assert_array_equal(found["h"].h_XF, extract(encoder, batches).h_XF)
    np.testing.assert_array_equal(found[HEAD[-1]].h_XF, extract(whole, batches).h_XF)


def test_a_head_without_weights_has_no_layer(encoder):
    assert Layers(encoder, none(64)).names == Layers(encoder).names == [*STAGES, "h"]


@pytest.mark.parametrize(
    ("name", "dims"), [("vit_tiny_patch16_224", 192), ("swin_tiny_patch4_window7_224", 96)]
)
@torch.inference_mode()
def test_tokens_and_channels_last_maps_are_pooled_over_places(name, dims):
    size = 224 if "swin" in name else 32
    options = {} if "swin" in name else {"img_size": 32}
    network = (
        timm.create_model(name, num_classes=0, depths=(1, 1, 1, 1), **options)
        if ("swin" in name)
        else timm.create_model(name, num_classes=0, depth=2, **options)
    )
    encoder = Encoder(network, network.num_features)
    found = Layers(encoder)(torch.rand(2, 3, size, size))
    stages = [n for n in found if n != "h"]
    assert found[stages[0]].shape == (2, dims)
    assert all(found[n].shape[1] <= network.num_features for n in stages)


def test_the_digest_tells_weights_and_structure():
    def made(stride: int = 1, seed: int = 0) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3, stride=stride), nn.BatchNorm2d(4))

    assert digest_of(made()) == digest_of(made())
    other = made()
    other[1].running_mean[2] += 1e-6
    digests = {digest_of(m) for m in (made(), made(stride=2), made(seed=1), other)}
    assert len(digests) == 4
    a, b = made(), made(seed=1)
    assert Layers(a, b).digests()["h"] == Layers(a).digests()["h"]
    assert Layers(a, b, ["h", "projection_head.0"]).digests()["projection_head.0"] not in digests


def test_a_layer_that_cannot_be_pooled_is_named():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(ConfigError, match=r"layer projection_head.0 returns tuple"):
        Layers(nn.Flatten(), nn.Sequential(Pair()))(torch.rand(2, 3, 4, 4))


def test_scores_say_which_layer_knows_the_classes():
    rng = np.random.default_rng(0)
    label_X = rng.integers(0, 4, 400)
    centres = rng.normal(size=(4, 16))

    def noisy(scale: float, rows: slice) -> Features:
        h_XF = centres[label_X[rows]] + scale * noise[rows]
        return Features(h_XF.astype(np.float32), label_X[rows])

    noise = rng.normal(size=(400, 16))
    train, test = (
        {"h": noisy(0.3, rows), "projection_head.fc1": noisy(30, rows)}
        for rows in (slice(0, 300), slice(300, 400))
    )
    said = []
    known, lost = layer_scores(train, test, {"h": 1, "projection_head.fc1": 0}.get, said.append)
    assert known.ridge_top1 == known.knn_top1 == 1
    assert max(lost.ridge_top1, lost.knn_top1) < 0.5
    assert (known.width, known.num_discarded, lost.num_discarded) == (16, 1, 0)
    assert len(said) == 2
    table = layers_markdown([known, lost]).splitlines()
    assert table[2] == "| h | 16 | 1 | 100.0% | 100.0% |"
    assert len({row.count("|") for row in table}) == 1
