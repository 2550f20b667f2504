"""Exports: each library computes our features from its files, and the cards tell the truth."""

from __future__ import annotations

import json
import re
import socket
from contextlib import chdir
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file

from fastclr import export
from fastclr.checkpointing import FACTS, WEIGHTS
from fastclr.config import Config, ConfigError, EncoderConfig, HeadConfig, ViewsConfig
from fastclr.export import formats
from fastclr.export.run import batches
from fastclr.files import sha256_of
from fastclr.simclr import SimCLR
from pipelines import evaluation_views

PLAIN = EncoderConfig("resnet10", 1.0, "imagenet")
TINY = EncoderConfig("resnet10", 0.125, "small")
DIGEST = "0123abc"


def make_run(folder: Path, encoder: EncoderConfig, size: int = 40, batch_norm="global") -> Path:
    """Write what a training run leaves, with weights and statistics that are not trivial."""
    config = Config(
        encoder=encoder,
        head=HeadConfig(output_dim=8),
        views=ViewsConfig(size=size),
        run_dir="/home/me/run",
        initial_weights="/home/me/first.pth",
        batch_norm=batch_norm,
    )
    model = SimCLR.from_config(config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.5 + torch.rand_like(parameter) / 2)
        model.encoder(torch.rand(8, 3, size, size))
    checkpoint = folder / "checkpoints" / "step-0000001"
    checkpoint.mkdir(parents=True)
    save_file(model.state_dict(), checkpoint / WEIGHTS)
    hashes = {WEIGHTS: sha256_of(checkpoint / WEIGHTS)}
    (checkpoint / FACTS).write_text(json.dumps({"step": 1, "sha256": hashes}))
    facts = {
        "config": asdict(config),
        "command": "python fastclr/train.py --recipe demo",
        "versions": {"torch": "2"},
        "data": {"train": {"path": "/home/me/data/train", "num_samples": 9, "digest": DIGEST}},
    }
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


def expected(run: Path, images_NCHW: torch.Tensor) -> torch.Tensor:
    """Return the features of the run's encoder."""
    config = Config.from_dict(json.loads((run / "config.json").read_text())["config"])
    model = SimCLR.from_config(config)
    model.load_state_dict(load_file(run / "checkpoints" / "step-0000001" / WEIGHTS))
    with torch.inference_mode():
        return model.encoder.eval()(images_NCHW)


def run_card(folder: Path, images_NCHW: torch.Tensor) -> torch.Tensor:
    """Execute the card's code in the folder, as a reader would, and return the features."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code
    space: dict = {}
    with chdir(folder), torch.inference_mode():
        exec(code[1], space)
        return torch.as_tensor(space["encoder"](images_NCHW))


def images(*shape: int) -> torch.Tensor:
    """Return random images in 0..1."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(11))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("plain") / "run", PLAIN)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("tiny") / "run", TINY, size=16)


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("vit") / "run", EncoderConfig("test_vit"), size=160)


@pytest.mark.parametrize("to", formats.FORMATS)
def test_the_library_computes_our_features(plain, tiny, tmp_path, to):
    # The others take a plain ResNet alone; these take any width and stem.
    run = tiny if to in ("safetensors", "onnx", "torch_export") else plain
    folder = export.export_run(run, to, tmp_path / "out")
    for shape in ((5, 3, 40, 40), (1, 3, 40, 40), (2, 3, 72, 48)):
        torch.testing.assert_close(
            run_card(folder, images(*shape)), expected(run, images(*shape)), rtol=0, atol=1e-5
        )
    assert {p.name for p in folder.iterdir()} >= {"README.md", "encoder.json"}
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("to", ["timm", "torchvision", "huggingface"])
def test_what_cannot_be_built_there_is_refused(tiny, tmp_path, to):
    with pytest.raises(ConfigError, match=r"width 0\.125.*fit: safetensors, onnx, torch_export\."):
        export.export_run(tiny, to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("encoder", "batch_norm", "to"),
    [
        (replace(PLAIN, stem="small"), "global", "torchvision"),
        (replace(PLAIN, stem="small_stride2"), "none", "torchvision"),
        (replace(PLAIN, activation_checkpointing=True), "none", "timm"),
        (PLAIN, "none", "huggingface"),
        (TINY, "none", "safetensors"),
    ],
)
def test_other_stems_and_group_norm(tmp_path, encoder, batch_norm, to):
    run = make_run(tmp_path / "run", encoder, size=32, batch_norm=batch_norm)
    folder = export.export_run(run, to, tmp_path / "out")
    torch.testing.assert_close(
        run_card(folder, images(2, 3, 32, 32)),
        expected(run, images(2, 3, 32, 32)),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("to", ["timm", "huggingface"])
def test_a_vision_transformer(vit, tmp_path, to):
    folder = export.export_run(vit, to, tmp_path / "out")
    shape = (2, 3, 160, 160)
    torch.testing.assert_close(
        run_card(folder, images(*shape)), expected(vit, images(*shape)), rtol=0, atol=1e-5
    )
    with pytest.raises(ConfigError, match="test_vit is none of the ResNets"):
        export.export_run(vit, "torchvision", tmp_path / "other")


def test_torchvisions_own_constructor_takes_it_strictly(tmp_path):
    run = make_run(tmp_path / "run", EncoderConfig("resnet18"), size=64)
    export.export_run(run, "torchvision", tmp_path / "out")
    model = torchvision.models.resnet18(weights=None)
    model.fc = torch.nn.Identity()
    done = model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    assert not done.missing_keys and not done.unexpected_keys
    with torch.inference_mode():
        h_NF = model.eval()(images(2, 3, 64, 64))
    torch.testing.assert_close(h_NF, expected(run, images(2, 3, 64, 64)), rtol=0, atol=1e-5)


def test_the_hub_layout_needs_no_network_and_says_what_the_input_is(plain, tmp_path, monkeypatch):
    folder = export.export_run(plain, "huggingface", tmp_path / "out")

    def refuse(*_: object) -> None:
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    data = timm.data.resolve_model_data_config(model)
    assert list(data["mean"]) == [0, 0, 0] and list(data["std"]) == [1, 1, 1]
    assert list(data["input_size"]) == [3, 40, 40]
    ten = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=10)
    assert ten.get_classifier().out_features == 10


def test_three_stages_are_exported_where_an_architecture_has_them(tmp_path):
    run = make_run(tmp_path / "run", EncoderConfig("resnet8"), size=32)
    for other in ("timm", "huggingface", "torchvision"):
        with pytest.raises(ConfigError, match="four stages, resnet8 has three"):
            export.export_run(run, other, tmp_path / other)
    assert export.export_run(run, "safetensors", tmp_path / "out").is_dir()


@pytest.mark.parametrize("size", [32, 96, 128, 224])
def test_timms_transform_makes_our_views(size):
    subject = formats.Subject(formats.new_encoder(TINY, False), TINY, False, size)
    overlay = formats.pretrained_cfg(subject)
    model = timm.create_model("resnet18", num_classes=0, pretrained_cfg_overlay=overlay)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    pixels = np.random.default_rng(0).integers(0, 256, (300, 600, 3), np.uint8)
    theirs = transform(Image.fromarray(pixels))
    ours = torch.from_numpy(evaluation_views._centre(pixels, size)).permute(2, 0, 1) / 255
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


def test_the_card_tells_where_it_comes_from(tiny, tmp_path):
    scores = {"checkpoint": "step-0000001", "scores": {"trained": {"knn_top1": 0.5125}}}
    (tiny / "scores.json").write_text(json.dumps(scores))
    try:
        folder = export.export_run(tiny, "safetensors", tmp_path / "a", "CC BY 4.0 | <b>\n# x")
        scores["checkpoint"] = "step-0000009"
        (tiny / "scores.json").write_text(json.dumps(scores))
        other = export.export_run(tiny, "safetensors", tmp_path / "b")
        (tiny / "scores.json").write_text("{")
        with pytest.raises(ConfigError, match=r"scores\.json cannot be read"):
            export.export_run(tiny, "safetensors", tmp_path / "c")
    finally:
        (tiny / "scores.json").unlink()
    text, facts = (folder / "README.md").read_text(), (folder / "encoder.json").read_text()
    for words in (
        DIGEST,
        "| loss.temperature | 0.1 |",
        "| path | train |",
        "0.5125",
        "step-0000001",
        "CC BY 4.0 / &lt;b> # x",
    ):
        assert words in text
    assert "0..1 without mean and std" in text
    assert "| initial_weights | first.pth |" in text
    assert "/home/me" not in text + facts, "where things lay is nobody's business"
    said = json.loads(facts)
    assert said["architecture"] == {
        "name": "resnet10", "width": 0.125, "stem": "small", "batch_norm": "global",
        "input_size": 16, "sides_vary": True,
    }  # fmt: skip
    assert said["feature_dim"] == 64 and said["data"]["digest"] == DIGEST
    assert said["input"]["mean"] == [0, 0, 0] and said["input"]["std"] == [1, 1, 1]
    assert said["scores"]["scores"]["trained"]["knn_top1"] == 0.5125
    assert "0.5125" not in (other / "README.md").read_text(), "scores of another checkpoint"
    assert "are of step-0000009, this is step-0000001" in (other / "README.md").read_text()
    assert "Licence of the data: not stated" in (other / "README.md").read_text()


@pytest.mark.parametrize("wrong", ["weights", "nan", "shape"])
def test_what_reads_back_otherwise_is_not_kept(tiny, tmp_path, monkeypatch, wrong):
    def read(subject, folder):
        change = {
            "weights": lambda h: h + 2e-5 * max(1, h.abs().max()),
            "nan": lambda h: h * float("nan"),
            "shape": lambda h: h[:, :1],
        }
        return lambda images_NCHW: change[wrong](subject.encoder(images_NCHW))

    broken = replace(formats.FORMATS["safetensors"], read=read)
    monkeypatch.setitem(formats.FORMATS, "safetensors", broken)
    with pytest.raises(ConfigError, match=r"read back gives .* is not kept"):
        export.export_run(tiny, "safetensors", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_stop_leaves_no_folder_of_that_name(tiny, tmp_path, monkeypatch):
    def stop(*_: object) -> None:
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("fastclr.export.run.sync", stop)
    with pytest.raises(KeyboardInterrupt):
        export.export_run(tiny, "safetensors", tmp_path / "out")
    monkeypatch.undo()
    (tmp_path / ".out.partial").mkdir()  # what a kill leaves
    assert export.export_run(tiny, "safetensors", tmp_path / "out").is_dir()
    with pytest.raises(ConfigError, match=r"out exists: nothing is written over"):
        export.export_run(tiny, "safetensors", tmp_path / "out")


def test_refusals(tiny, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="'tflite' is unknown: choose from safetensors, timm"):
        export.export_run(tiny, "tflite", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        export.export_run(tmp_path, "timm", tmp_path / "out")
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        export.export_run(tmp_path, "timm", tmp_path / "out")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs onnx, onnxscript.*fastclr\[export\]"):
        export.export_run(tiny, "onnx", tmp_path / "out")
    with pytest.raises(ConfigError, match="is no export of the format safetensors"):
        export.load(tmp_path)


def test_loading_is_strict(tiny, tmp_path):
    folder = export.export_run(tiny, "safetensors", tmp_path / "out")
    assert export.load(folder).feature_dim == 64
    state = load_file(folder / "encoder.safetensors")
    state.pop("network.bn1.weight")
    save_file(state, folder / "encoder.safetensors")
    with pytest.raises(ConfigError, match=r"bn1\.weight"):
        export.load(folder)


def test_the_compared_images_vary_in_number_and_sides():
    tiny = formats.Subject(formats.new_encoder(TINY, False), TINY, False, 16)
    assert [tuple(b.shape) for b in batches(tiny)] == [
        (3, 3, 16, 16), (1, 3, 16, 16), (2, 3, 40, 16)
    ]  # fmt: skip
    assert len(batches(tiny._replace(size=8))) == 2
