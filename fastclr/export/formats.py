"""What an encoder can be exported to: how it is written, read back by the library, and loaded.

Every encoder here takes floating-point images in 0..1, mean and std are not taken off. Where a
format says what its model expects, that is written as mean 0 and std 1.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.export import Dim

from fastclr import encoders
from fastclr.batch_norm import without_batch_norm
from fastclr.config import ConfigError, EncoderConfig
from fastclr.encoders import Encoder
from fastclr.foreign_weights import INPUT_KEY, INPUT_UNIT

Features = Callable[[torch.Tensor], torch.Tensor]

# A protocol buffer ends at 2 GiB; larger weights go beside it.
MOST_ONNX_BYTES = 1_900_000_000


class Subject(NamedTuple):
    """What is exported.

    Attributes:
        encoder: On the CPU, in inference mode.
        config: Its architecture.
        has_group_norm: Whether GroupNorm stands in the place of every BatchNorm.
        size: Side in pixels of the images it was trained on.
    """

    encoder: Encoder
    config: EncoderConfig
    has_group_norm: bool
    size: int

    @property
    def is_resnet(self) -> bool:
        """Whether it is one of the ResNets that take a width and a stem."""
        return self.config.name in encoders.RESNETS

    @property
    def sides_vary(self) -> bool:
        """Whether exported programs take images of other and unequal sides.

        Vision transformers have a fixed size; torch takes a last stage of one pixel as fixed.
        """
        if not self.is_resnet:
            return False
        _, stride, pooled = encoders.STEMS[self.config.stem]
        return self.size > stride * (2 if pooled else 1) * 8

    @property
    def network_state(self) -> dict[str, torch.Tensor]:
        """The weights under timm's names."""
        return {k: v.contiguous() for k, v in self.encoder.network.state_dict().items()}


@dataclass(frozen=True)
class Format:
    """One kind of export.

    Attributes:
        write: Writes its files into a folder.
        read: Reads them with the library they are for; returns what maps images to h.
        lines: Python lines that make ``encoder``, run in the folder, for the card.
        unfit: Says why an encoder cannot be exported so; empty if it can.
    """

    write: Callable[[Subject, Path], None]
    read: Callable[[Subject, Path], Features]
    lines: Callable[[Subject], list[str]]
    unfit: Callable[[Subject], str] = lambda _: ""


def pretrained_cfg(subject: Subject) -> dict[str, Any]:
    """Return what timm should know of the input, so that its transforms make our views."""
    size, known = subject.size, getattr(subject.encoder.network, "pretrained_cfg", {})
    shorter = round(size / 0.875) if size > 64 else size  # as in pipelines' evaluation view
    return {
        "input_size": [3, size, size],
        "fixed_input_size": bool(known.get("fixed_input_size", False)),
        "interpolation": "bicubic",
        # timm rounds size / crop_pct down.
        "crop_pct": size / (shorter + 0.01) if size > 64 else 1.0,
        "crop_mode": "center",
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        "num_classes": 0,
        # What timm exchanges for another number of classes or channels.
        "classifier": known.get("classifier", "fc"),
        "first_conv": known.get("first_conv", "conv1"),
    }


def timm_name(subject: Subject) -> tuple[str, dict[str, Any]]:
    """Return timm's name for the architecture, and the arguments it needs besides."""
    arguments: dict[str, Any] = {}
    name = subject.config.name
    if name == "resnet10":
        name, arguments = "resnet18", {"layers": [1, 1, 1, 1]}
    if subject.has_group_norm:
        arguments["norm_layer"] = "groupnorm"
    return name, arguments


def _unfit_for_timm(subject: Subject) -> str:
    """Say why timm cannot build the architecture from a name and arguments."""
    config = subject.config
    if subject.is_resnet and len(encoders.RESNETS[config.name][1]) != 4:
        return f"timm's ResNets have four stages, {config.name} has three"
    if config.width != 1 or config.stem != "imagenet":
        return (
            f"timm has no arguments for {config.name} with width {config.width:g} and stem "
            f"{config.stem!r}: width 1 and stem 'imagenet' fit"
        )
    if subject.has_group_norm and not subject.is_resnet:
        return f"timm has no argument that gives {config.name} GroupNorm for BatchNorm"
    return ""


def _unfit_for_torchvision(subject: Subject) -> str:
    """Say why torchvision's ResNet cannot be that architecture."""
    config = subject.config
    if not subject.is_resnet:
        return f"{config.name} is none of the ResNets {', '.join(encoders.RESNETS)}"
    if len(encoders.RESNETS[config.name][1]) != 4:
        return f"torchvision's ResNets have four stages, {config.name} has three"
    if config.width != 1:
        return f"torchvision's ResNet begins with 64 channels: width {config.width:g} does not fit"
    return ""


def _save(state: dict[str, torch.Tensor], file: Path) -> None:
    """Write safetensors that say which input their encoder takes."""
    save_file(state, file, metadata={"format": "pt", INPUT_KEY: INPUT_UNIT})


def _write_safetensors(subject: Subject, folder: Path) -> None:
    _save({f"network.{k}": v for k, v in subject.network_state.items()}, _weights(folder))


def _weights(folder: Path) -> Path:
    return folder / "encoder.safetensors"


def _read_safetensors(subject: Subject, folder: Path) -> Features:
    return read_weights(new_encoder(subject.config, subject.has_group_norm), folder)


def new_encoder(config: EncoderConfig, has_group_norm: bool) -> Encoder:
    """Build the architecture with any weights."""
    encoder = encoders.from_config(config)
    if has_group_norm:
        without_batch_norm(encoder)
    return encoder


def read_weights(encoder: Encoder, folder: Path) -> Encoder:
    """Load ``encoder.safetensors`` of a folder, strictly, for inference."""
    encoder.load_state_dict(load_file(_weights(folder)))
    return encoder.eval()


def _write_timm(subject: Subject, folder: Path) -> None:
    _save(subject.network_state, folder / "model.safetensors")


def _read_timm(subject: Subject, folder: Path) -> Features:
    name, arguments = timm_name(subject)
    return timm.create_model(
        name,
        num_classes=0,
        checkpoint_path=str(folder / "model.safetensors"),
        pretrained_cfg_overlay=pretrained_cfg(subject),
        **arguments,
    ).eval()


def _timm_lines(subject: Subject) -> list[str]:
    name, arguments = timm_name(subject)
    given = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return [
        "import timm",
        f"cfg = {pretrained_cfg(subject)}",
        f"encoder = timm.create_model({name!r}, num_classes=0{given}, "
        "checkpoint_path='model.safetensors', pretrained_cfg_overlay=cfg).eval()",
    ]


def _write_huggingface(subject: Subject, folder: Path) -> None:
    name, arguments = timm_name(subject)
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": subject.encoder.feature_dim,
        "pretrained_cfg": {**pretrained_cfg(subject), "license": "other"},
        **({"model_args": arguments} if arguments else {}),
    }
    _save(subject.network_state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _read_huggingface(subject: Subject, folder: Path) -> Features:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()


def _write_torchvision(subject: Subject, folder: Path) -> None:
    # timm's ResNets name their tensors as torchvision's do: the map of keys is the identity, which
    # the strict reading back proves.
    _save(subject.network_state, folder / "model.safetensors")


def _read_torchvision(subject: Subject, folder: Path) -> Features:
    from torchvision.models import resnet

    block, layers = encoders.RESNETS[subject.config.name]
    norm = functools.partial(nn.GroupNorm, 32) if subject.has_group_norm else None
    model = resnet.ResNet(getattr(resnet, block.__name__), list(layers), norm_layer=norm)
    model.fc = cast(Any, nn.Identity())
    kernel, stride, pooled = encoders.STEMS[subject.config.stem]
    if subject.config.stem != "imagenet":
        model.conv1 = nn.Conv2d(3, 64, kernel, stride, kernel // 2, bias=False)
    if not pooled:
        model.maxpool = cast(Any, nn.Identity())
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def _torchvision_lines(subject: Subject) -> list[str]:
    block, layers = encoders.RESNETS[subject.config.name]
    norm = ", norm_layer=partial(nn.GroupNorm, 32)" if subject.has_group_norm else ""
    kernel, stride, pooled = encoders.STEMS[subject.config.stem]
    lines = [
        "from torchvision.models.resnet import ResNet, BasicBlock, Bottleneck",
        "from safetensors.torch import load_file",
        "from functools import partial" if norm else "",
        "from torch import nn",
        f"encoder = ResNet({block.__name__}, {list(layers)}{norm})",
        "encoder.fc = nn.Identity()",
    ]
    if subject.config.stem != "imagenet":
        stem = f"3, 64, {kernel}, {stride}, {kernel // 2}, bias=False"
        lines.append(f"encoder.conv1 = nn.Conv2d({stem})")
    if not pooled:
        lines.append("encoder.maxpool = nn.Identity()")
    lines.append("encoder.load_state_dict(load_file('model.safetensors'))")
    return [line for line in (*lines, "encoder.eval()") if line]


def _dynamic_shapes(subject: Subject) -> tuple[dict[int, Any]]:
    """Say which dimensions may vary: the batch, and height and width if they can."""
    sides = {2: Dim.AUTO, 3: Dim.AUTO} if subject.sides_vary else {}
    return ({0: Dim("batch"), **sides},)


def _example(subject: Subject) -> tuple[torch.Tensor]:
    # Two images of unequal sides where they may be: a 1, or equal sides, would be taken as fixed.
    width = subject.size + 32 * subject.sides_vary
    return (torch.zeros(2, 3, subject.size, width),)


def _write_onnx(subject: Subject, folder: Path) -> None:
    _need("onnx", "onnxscript", "onnxruntime")
    num_bytes = sum(t.numel() * t.element_size() for t in subject.network_state.values())
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        torch.onnx.export(
            subject.encoder,
            _example(subject),
            folder / "encoder.onnx",
            input_names=["images_NCHW"],
            output_names=["h_NF"],
            dynamic_shapes=_dynamic_shapes(subject),
            external_data=num_bytes > MOST_ONNX_BYTES,
            dynamo=True,
            verbose=False,
        )
    finally:
        logger.setLevel(level)


def _read_onnx(subject: Subject, folder: Path) -> Features:
    _need("onnx", "onnxruntime")
    import onnx
    import onnxruntime

    file = folder / "encoder.onnx"
    onnx.checker.check_model(str(file))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def features(images_NCHW: torch.Tensor) -> torch.Tensor:
        found = session.run(["h_NF"], {"images_NCHW": images_NCHW.numpy()})
        return torch.from_numpy(np.asarray(found[0]))

    return features


def _need(*packages: str) -> None:
    """Raise ConfigError unless the packages can be imported."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"export to onnx needs {', '.join(missing)}: install the extra, "
            "pip install 'fastclr[export]'."
        )


def _write_torch_export(subject: Subject, folder: Path) -> None:
    program = torch.export.export(
        subject.encoder, _example(subject), dynamic_shapes=_dynamic_shapes(subject)
    )
    torch.export.save(program, folder / "encoder.pt2")


def _read_torch_export(subject: Subject, folder: Path) -> Features:
    return torch.export.load(folder / "encoder.pt2").module()


FORMATS: dict[str, Format] = {
    "safetensors": Format(
        _write_safetensors,
        _read_safetensors,
        lambda _: ["from fastclr import export", "encoder = export.load('.')"],
    ),
    "timm": Format(_write_timm, _read_timm, _timm_lines, _unfit_for_timm),
    "torchvision": Format(
        _write_torchvision, _read_torchvision, _torchvision_lines, _unfit_for_torchvision
    ),
    "huggingface": Format(
        _write_huggingface,
        _read_huggingface,
        lambda _: [
            "import timm",
            "encoder = timm.create_model('local-dir:.', pretrained=True, num_classes=0).eval()",
        ],
        _unfit_for_timm,
    ),
    "onnx": Format(
        _write_onnx,
        _read_onnx,
        lambda _: [
            "import onnxruntime, torch",
            "session = onnxruntime.InferenceSession('encoder.onnx')",
            "encoder = lambda images: torch.from_numpy(session.run(None, "
            "{'images_NCHW': images.numpy()})[0])",
        ],
    ),
    "torch_export": Format(
        _write_torch_export,
        _read_torch_export,
        lambda _: ["import torch", "encoder = torch.export.load('encoder.pt2').module()"],
    ),
}
