"""Weights of other libraries: recognised by their names, mapped strictly, nothing lost silently."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from fastclr import encoders, foreign_weights
from fastclr.config import Config, ConfigError, EncoderConfig, HeadConfig
from fastclr.foreign_weights import IMAGENET, UNIT
from fastclr.simclr import SimCLR

State = dict[str, torch.Tensor]
TINY = EncoderConfig("resnet10", 0.125, "small")
MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in IMAGENET)


def new_model(encoder: EncoderConfig = TINY, seed: int = 0) -> SimCLR:
    """Return a model with statistics and scales that are not trivial."""
    model = SimCLR.from_config(Config(encoder=encoder, head=HeadConfig(output_dim=8), seed=seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.encoder.state_dict().values():
            if tensor.ndim == 1:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model.eval()


def images(*shape: int) -> torch.Tensor:
    """Return random images in 0..1."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(5))


def features(model: SimCLR, images_NCHW: torch.Tensor) -> torch.Tensor:
    """Return h."""
    with torch.inference_mode():
        return model.eval().encoder(images_NCHW)


def linear(prefix: str) -> State:
    """Return the tensors of some head."""
    return {f"{prefix}.weight": torch.ones(5, 64), f"{prefix}.bias": torch.zeros(5)}


def prefixed(prefix: str, state: State) -> State:
    """Put a prefix before every name."""
    return {f"{prefix}{key}": value for key, value in state.items()}


def in_sequential(state: State) -> State:
    """Name tensors as ``nn.Sequential(*list(resnet.children())[:-1])`` does."""
    order = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")
    return {
        ".".join([str(order.index(key.partition(".")[0])), key.partition(".")[2]]): value
        for key, value in state.items()
    }


def lightning(state: State, **more: Any) -> dict[str, Any]:
    """Return what Lightning writes around the weights."""
    return {"epoch": 3, "global_step": 9, "optimizer_states": [], "state_dict": state, **more}


# What the libraries' training leaves, from the tensors of a ResNet in torchvision's names, and the
# names that are left out.
FILES: dict[str, tuple[Callable[[State], dict[str, Any]], list[str]]] = {
    "lightly, a torchvision ResNet's children in a Sequential": (
        lambda s: lightning(
            {**prefixed("backbone.", in_sequential(s)), **linear("projection_head.layers.0")}
        ),
        ["state_dict.projection_head.layers.0.weight", "state_dict.projection_head.layers.0.bias"],
    ),
    "lightly": (
        lambda s: lightning(
            {
                **prefixed("backbone.", s),
                **linear("projection_head.layers.0"),
                **linear("online_classifier"),
            }
        ),
        ["state_dict.projection_head.layers.0.weight", "state_dict.online_classifier.bias"],
    ),
    "solo-learn": (
        lambda s: lightning(
            {
                **prefixed("backbone.", s),
                **prefixed("momentum_backbone.", s),
                **linear("projector.0"),
                **linear("classifier"),
            }
        ),
        ["state_dict.momentum_backbone.conv1.weight", "state_dict.classifier.weight"],
    ),
    "Google's SimCLR v1, converted": (
        lambda s: {"state_dict": {**s, **linear("fc")}},
        ["state_dict.fc.weight"],
    ),
    "torchvision": (lambda s: {**s, **linear("fc")}, ["fc.weight", "fc.bias"]),
}


@pytest.mark.parametrize("name", FILES)
def test_each_format_is_recognised_and_its_heads_are_named(tmp_path, name):
    content, left_out = FILES[name]
    theirs, ours = new_model(seed=1), new_model(seed=2)
    file = tmp_path / "weights.ckpt"
    torch.save(content(theirs.encoder.network.state_dict()), file)
    said = foreign_weights.load(ours, file, "unit")
    assert f"of the format {name};" in said and "nothing is folded" in said
    for key in left_out:
        assert key in said
    batch = images(2, 3, 20, 28)
    assert torch.equal(features(ours, batch), features(theirs, batch))


@pytest.mark.parametrize(
    "content",
    [
        lambda s: prefixed("module.", {**s, **linear("fc")}),
        lambda s: {"state_dict": prefixed("module.", s), "epoch": 3, "arch": "resnet50"},
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: prefixed("encoder.", s),
        lambda s: prefixed("backbone.", s),
        lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
        lambda s: {k: v.half() for k, v in s.items()},
    ],
)
def test_other_forms_of_the_same_weights(tmp_path, content):
    theirs, ours = new_model(seed=1), new_model(seed=2)
    saved = content(theirs.encoder.network.state_dict())
    torch.save(saved, tmp_path / "weights.pth")
    said = foreign_weights.load(ours, tmp_path / "weights.pth", "unit")
    batch = images(2, 3, 20, 28)
    # fp16 weights are the one case that is not bit for bit.
    is_half = any(t.dtype == torch.float16 for t in _tensors(saved))
    torch.testing.assert_close(
        features(ours, batch), features(theirs, batch), rtol=0, atol=0.01 if is_half else 0
    )
    assert "nothing is folded" in said
    assert "Google" not in said, "more than weights is in a trainer's own checkpoint"


def _tensors(content: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors of a file."""
    flat = content.get("state_dict", content)
    return list(flat.values())


def test_missing_counters_are_said(tmp_path):
    state = new_model(seed=1).encoder.network.state_dict()
    kept = {k: v.contiguous() for k, v in state.items() if "num_batches" not in k}
    save_file(kept, tmp_path / "weights.safetensors")
    said = foreign_weights.load(new_model(), tmp_path / "weights.safetensors")
    assert f"{len(state) - len(kept)} missing counters num_batches_tracked start at 0" in said


class NormRelu(nn.Sequential):
    """As the converted SimCLR v2 encoders do it."""

    def __init__(self, channels: int, relu: bool = True) -> None:
        super().__init__(nn.BatchNorm2d(channels), nn.ReLU() if relu else nn.Identity())


class Shortcut(nn.Module):
    """The projection beside a block."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)
        self.bn = NormRelu(out, relu=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.shortcut(x))


class Block(nn.Module):
    """A bottleneck."""

    def __init__(self, channels: int, width: int, stride: int, first: bool) -> None:
        super().__init__()
        self.projection = Shortcut(channels, 4 * width, stride) if first else nn.Identity()
        self.net = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False),
            NormRelu(width),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            NormRelu(width),
            nn.Conv2d(width, 4 * width, 1, bias=False),
            NormRelu(4 * width, relu=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.projection(x) + self.net(x))


class Blocks(nn.Module):
    """A stage."""

    def __init__(self, num_blocks: int, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(4 * width if i else channels, width, 1 if i else stride, first=i == 0)
            for i in range(num_blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class SimCLRv2(nn.Module):
    """A converted ResNet-50 of Google's SimCLR v2, as narrow as wanted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), NormRelu(width), nn.MaxPool2d(3, 2, 1)
        )
        stages, channels = [], width
        for i, num_blocks in enumerate((3, 4, 6, 3)):
            stages.append(Blocks(num_blocks, channels, width * 2**i, 1 if i == 0 else 2))
            channels = 4 * width * 2**i
        self.net = nn.Sequential(stem, *stages)
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).mean((2, 3))


@pytest.mark.parametrize("whole", [True, False])
def test_googles_simclr_v2(tmp_path, whole):
    torch.manual_seed(0)
    theirs = SimCLRv2(4)
    theirs(images(4, 3, 64, 64))  # statistics
    state, head = theirs.state_dict(), linear("layers.0")
    torch.save({"resnet": state, "head": head} if whole else state, tmp_path / "r50.pth")
    ours = new_model(EncoderConfig("resnet50", 0.0625))
    said = foreign_weights.load(ours, tmp_path / "r50.pth")
    assert "Google's SimCLR v2, converted" in said and "nothing is folded" in said
    assert "fc.weight" in said and ("head.layers.0.weight" in said) == whole
    with torch.inference_mode():
        expected = theirs.eval()(images(2, 3, 64, 96))
    torch.testing.assert_close(features(ours, images(2, 3, 64, 96)), expected, rtol=0, atol=1e-5)


def test_selective_kernels_are_refused_with_the_reason(tmp_path):
    state = SimCLRv2(4).state_dict()
    state["net.1.blocks.0.net.2.main_conv.weight"] = state.pop("net.1.blocks.0.net.2.weight")
    torch.save({"resnet": state}, tmp_path / "r50_sk1.pth")
    message = r"1 are missing, such as layer1\.0\.conv2\.weight\..*1 are unexpected.*sk1"
    with pytest.raises(ConfigError, match=message):
        foreign_weights.load(new_model(EncoderConfig("resnet50", 0.0625)), tmp_path / "r50_sk1.pth")


def test_torchvisions_own_resnet(tmp_path):
    torch.manual_seed(0)
    theirs = ResNet(BasicBlock, [1, 1, 1, 1])
    theirs(images(4, 3, 64, 64))
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    ours = new_model(EncoderConfig("resnet10"))
    assert "fc.weight, fc.bias" in foreign_weights.load(ours, tmp_path / "resnet.pth", "unit")
    theirs.fc = nn.Identity()
    with torch.inference_mode():
        expected = theirs.eval()(images(2, 3, 64, 96))
    torch.testing.assert_close(features(ours, images(2, 3, 64, 96)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "mobilenetv3_small_050", "test_convnext"])
def test_timms_own_models_with_their_classifier(tmp_path, name):
    torch.manual_seed(0)
    theirs = timm.create_model(name, pretrained=False)
    size = 160
    if "mobile" in name:
        theirs.train()(images(4, 3, size, size))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = new_model(EncoderConfig(name))
    said = foreign_weights.load(ours, tmp_path / "model.safetensors")
    assert "of the format timm" in said and "left out as heads" in said
    theirs.reset_classifier(0)
    mean, std = (torch.tensor(theirs.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    assert mean.max() > 0
    batch = images(2, 3, size, size)
    with torch.inference_mode():
        expected = theirs.eval()((batch - mean) / std)
    difference = (features(ours, batch) - expected).abs().max() / expected.abs().max()
    if "mobile" in name:  # its stem pads
        assert "exact but for the outer 1 pixels" in said
        assert 1e-5 < difference < 0.3
    else:
        assert "pixels" not in said
        assert difference < 1e-5


def test_folding_is_exact_inside_the_borders(tmp_path):
    theirs, ours = new_model(seed=1), new_model(seed=2)
    file = tmp_path / "weights.pth"
    torch.save(theirs.encoder.network.state_dict(), file)
    said = foreign_weights.load(ours, file)
    assert "(0.485, 0.456, 0.406)" in said and "exact but for the outer 1 pixels" in said

    def stem(model: SimCLR, images_NCHW: torch.Tensor) -> torch.Tensor:
        network: Any = model.encoder.network
        with torch.inference_mode():
            return network.bn1(network.conv1(images_NCHW))

    batch = images(2, 3, 16, 16)
    expected, found = stem(theirs, (batch - MEAN) / STD), stem(ours, batch)
    torch.testing.assert_close(
        found[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1], rtol=0, atol=1e-5
    )
    assert (found - expected).abs().max() > 0.01, "borders are padded otherwise"
    # Had nothing been folded, the whole would be wrong.
    foreign_weights.load(ours, file, "unit")
    wrong = stem(ours, batch)[:, :, 1:-1, 1:-1] - expected[:, :, 1:-1, 1:-1]
    assert wrong.abs().max() > 0.1


def test_folding_changes_nothing_for_mean_0_and_std_1():
    network: Any = new_model().encoder.network
    state = {k: v.clone() for k, v in network.state_dict().items()}
    assert foreign_weights.fold_normalisation(state, network, UNIT) == 1
    assert all(torch.equal(state[k], v) for k, v in network.state_dict().items())


def test_a_constant_that_nothing_can_take_is_refused(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.GroupNorm(2, 4))
    with pytest.raises(ConfigError, match=r"no BatchNorm follows.*--initial-weights-input unit"):
        foreign_weights.fold_normalisation(dict(network.state_dict()), network, IMAGENET)
    with pytest.raises(ConfigError, match="no convolution"):
        foreign_weights.fold_normalisation({}, nn.Flatten(), IMAGENET)


@pytest.mark.parametrize("what", ["model", "encoder.", ""])
def test_our_own_files(tmp_path, what):
    theirs, ours = new_model(seed=1), new_model(seed=2)
    with torch.no_grad():
        theirs.projection_head.fc1.weight.fill_(0.5)
    state = theirs.state_dict() if what == "model" else theirs.encoder.state_dict()
    state = state if what == "model" else prefixed(what, state)
    save_file(state, tmp_path / "model.safetensors")
    said = foreign_weights.load(ours, tmp_path / "model.safetensors", "imagenet")
    assert ("encoder and head of fastclr" in said) == (what == "model")
    assert torch.equal(features(ours, images(2, 3, 16, 16)), features(theirs, images(2, 3, 16, 16)))
    assert (ours.projection_head.fc1.weight == 0.5).all() == (what == "model")


def test_our_exports_come_back_unchanged(tmp_path):
    theirs, ours = new_model(seed=1), new_model(seed=2)
    metadata = {foreign_weights.INPUT_KEY: foreign_weights.INPUT_UNIT}
    save_file(theirs.encoder.network.state_dict(), tmp_path / "m.safetensors", metadata=metadata)
    assert "nothing is folded" in foreign_weights.load(ours, tmp_path / "m.safetensors")
    assert torch.equal(features(ours, images(2, 3, 16, 16)), features(theirs, images(2, 3, 16, 16)))


class Evil:
    """Would run code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


def test_classes_are_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = new_model().encoder.network.state_dict()
    torch.save(lightning(prefixed("backbone.", state), hyper_parameters=Evil()), "solo.ckpt")
    with pytest.raises(ConfigError, match=r"no class is unpickled.*torch\.save\(torch\.load\(FILE"):
        foreign_weights.load(new_model(), Path("solo.ckpt"))
    assert not Path("unpickled").exists()


def changed(**tensors: torch.Tensor | None) -> State:
    """Return the weights of a network with some tensors replaced, or gone."""
    state = {**new_model().encoder.network.state_dict()}
    for key, value in tensors.items():
        state[key.replace("__", ".")] = value  # type: ignore[assignment]
    return {k: v for k, v in state.items() if v is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(bn1__weight=None), r"1 tensors differ, the first is bn1\.weight: missing there"),
        (changed(bn1__weight=torch.ones(9)), r"bn1\.weight: \(9,\) there, \(8,\) here"),
        (changed(neck__weight=torch.ones(9)), r"1 are unexpected, such as neck\.weight"),
        (changed(layer1__0__bn1__running_mean=None), r"1 are missing, such as layer1\.0\.bn1\.run"),
        (
            lightning({**prefixed("backbone.", changed()), "necks.0.weight": torch.ones(2)}),
            r"\(solo-learn\) do not fit.*1 are unexpected, such as state_dict\.necks",
        ),
        (changed(bn1__bias=torch.full((8,), float("nan"))), r"bn1\.bias is not finite"),
        ({"a.weight": torch.ones(2)}, r"no known format: 1 tensors, the first a\.weight\. Known"),
        ({"backbone.2.0.conv1.weight": torch.ones(2)}, "no known format"),
        ({}, "hold no dictionary of tensors"),
        ([torch.ones(2)], "hold no dictionary of tensors, but list"),
        ({"epoch": 3}, "no dictionary of tensors, but dict epoch"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pth")
    model = new_model(seed=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        foreign_weights.load(model, tmp_path / "weights.pth")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.ckpt", "w.h5", "none.pth"])
def test_files_that_are_none(tmp_path, name):
    file = tmp_path / name
    if name != "none.pth":
        file.write_bytes(b"\x00not a checkpoint")
    with pytest.raises(ConfigError, match=f"initial_weights .*{name}.*(give|keep)"):
        foreign_weights.load(new_model(), file)


def test_another_width_is_refused_with_todays_words(tmp_path):
    wide = encoders.create("resnet10", 0.25, "small")
    save_file(wide.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"do not fit the model: \d+ tensors differ, the first is"
    ):
        foreign_weights.load(new_model(), tmp_path / "model.safetensors")
