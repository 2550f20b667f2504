"""Encoders say how wide they are, and take SimCLR's widths and stems."""

from __future__ import annotations

from copy import deepcopy

import pytest
import timm
import torch

from fastclr import encoders
from fastclr.config import ConfigError, EncoderConfig


def num_parameters(module: torch.nn.Module) -> int:
    """Count the parameters."""
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "settings", "size"),
    [
        ("resnet8", {"width": 0.25, "stem": "small"}, 32),
        ("resnet14", {"width": 0.25, "stem": "small"}, 32),
        ("resnet10", {"width": 0.25}, 32),
        ("resnet10", {"width": 0.5, "stem": "small_stride2"}, 32),
        ("resnet10", {"width": 1, "stem": "small"}, 32),
        ("resnet10", {"width": 2}, 32),
        ("resnet50", {"width": 1}, 32),
        ("resnet50", {"width": 0.25, "stem": "small"}, 32),
        ("convnext_atto", {}, 32),
        ("mobilenetv3_small_050", {}, 32),  # wider than its num_features
        ("test_vit", {}, 160),
        ("regnetx_002", {}, 64),
    ],
)
def test_features_are_as_wide_as_promised(name, settings, size):
    encoder = encoders.create(name, **settings).eval()
    with torch.inference_mode():
        h_NF = encoder(torch.rand(2, 3, size, size))
    assert h_NF.shape == (2, encoder.feature_dim)
    assert h_NF.isfinite().all()


@pytest.mark.parametrize(
    ("name", "width", "feature_dim"),
    [
        ("resnet8", 0.25, 64),
        ("resnet10", 0.25, 128),
        ("resnet18", 1, 512),
        ("resnet34", 2, 1024),
        ("resnet50", 2, 4096),
    ],
)
def test_width_multiplies_the_features(name, width, feature_dim):
    with torch.device("meta"):
        assert encoders.create(name, width).feature_dim == feature_dim


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet50", 23.5), ("resnet101", 42.5), ("resnet152", 58.1)]
)
def test_parameters_of_the_paper(name, millions):
    with torch.device("meta"):
        assert num_parameters(encoders.create(name)) / 1e6 == pytest.approx(millions, abs=0.06)


def test_width_of_4_has_16_times_the_parameters():
    with torch.device("meta"):
        wide, narrow = encoders.create("resnet50", 4), encoders.create("resnet50")
    assert num_parameters(wide) / num_parameters(narrow) == pytest.approx(16, rel=0.02)


def test_at_width_1_it_is_timms_resnet18():
    ours = encoders.create("resnet18").network
    theirs = timm.create_model("resnet18", pretrained=False, num_classes=0)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 16), ("small", 64), ("small_stride2", 32)])
def test_stems_shrink_images_as_they_say(stem, side):
    network = encoders.create("resnet10", 0.25, stem).network
    seen = []
    network.layer1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    with torch.inference_mode():
        network(torch.rand(1, 3, 64, 64))
    assert seen == [(1, 16, side, side)]


def test_the_last_norm_of_each_block_starts_at_zero():
    network = encoders.create("resnet50", 0.25).network
    blocks = [block for i in range(1, 5) for block in getattr(network, f"layer{i}")]
    assert len(blocks) == 16
    assert all((block.bn3.weight == 0).all() for block in blocks)


def test_every_listed_resnet_takes_every_stem():
    with torch.device("meta"):
        for name in encoders.RESNETS:
            for stem in encoders.STEMS:
                assert encoders.create(name, 0.25, stem).feature_dim in (64, 128, 512)


def test_a_configuration_is_enough():
    encoder = encoders.from_config(EncoderConfig("resnet10", 0.25, "small"))
    assert encoder.feature_dim == 128
    assert encoder.network.conv1.kernel_size == (3, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "resnet_fifty"}, r"'resnet_fifty' is unknown to timm.*choose resnet8"),
        ({"name": "resnet18.no_such_tag"}, "no_such_tag.*choose"),
        ({"name": ""}, "is unknown to timm"),
        ({"name": "convnext_atto", "width": 2}, "no width 2.*Leave them at 1 and imagenet"),
        ({"name": "convnext_atto", "stem": "small"}, "stem 'small'.*Leave them at 1"),
        ({"name": "resnet18", "stem": "tiny"}, "'tiny' is unknown: choose from imagenet, small"),
        ({"name": "resnet18", "width": 0}, "width 0 gives 0 channels.*e.g. width 0.25"),
        ({"name": "resnet18", "width": 0.05}, "gives 3 channels"),
        ({"name": "resnet18", "width": -1}, "gives -64 channels"),
        ({"name": "resnet18", "width": 0.17}, "gives 11 channels.*even number"),
    ],
)
def test_what_does_not_exist_is_refused_with_a_remedy(settings, message):
    with pytest.raises(ConfigError, match=message):
        encoders.create(**settings)


def test_a_near_name_is_offered():
    with pytest.raises(ConfigError, match="convnext_atto"):
        encoders.create("convnext_attto")


def test_checkpointed_activations_change_nothing_but_memory():
    torch.manual_seed(0)
    plain = encoders.create("resnet10", width=0.25, stem="small").double()
    checkpointed = deepcopy(plain)
    checkpointed.checkpoint_activations()
    images_NCHW = torch.rand(6, 3, 16, 16, dtype=torch.float64)
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    checkpointed.network.layer3[0].register_forward_pre_hook(count)
    for encoder in (plain, checkpointed):
        for _ in range(2):
            encoder(images_NCHW).square().sum().backward()
    assert calls == 4, "nothing was computed again"
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-12, atol=1e-12, msg=name)
    for (name, p), q in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-12, msg=name)
    assert plain.eval()(images_NCHW).allclose(checkpointed.eval()(images_NCHW))


def test_a_model_that_cannot_checkpoint_says_so():
    with pytest.raises(ConfigError, match=r"leave encoder\.activation_checkpointing off"):
        encoders.from_config(EncoderConfig("dla34", activation_checkpointing=True))
