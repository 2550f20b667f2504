"""Features of a data set: what the probes see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fastclr.config import ConfigError

_BLOCK = 8192  # rows checked at a time

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


class Features(NamedTuple):
    """Features of X images.

    Attributes:
        h_XF: float32; may lie in a file (``np.memmap``), and then cannot be written to.
        label_X: int64.
    """

    h_XF: npt.NDArray[np.float32]
    label_X: npt.NDArray[np.int64]


def extract(
    encoder: nn.Module,
    batches: Batches,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Features:
    """Run an encoder in evaluation mode (BatchNorm with running statistics) over a data set.

    Args:
        encoder: Maps float images (n, 3, H, W) in 0..1 to (n, F); left in evaluation mode.
        batches: uint8 images (n, 3, H, W) and int64 labels (n,).
        device: Where the encoder is.

    Raises:
        FloatingPointError: If a feature is not finite; it names the first such image.
    """
    encoder.eval()

    def layers(images_NCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"h": encoder(images_NCHW)}

    return extract_layers(layers, batches, device)["h"]


@torch.inference_mode()
def extract_layers(
    layers: Callable[[torch.Tensor], Mapping[str, torch.Tensor]],
    batches: Batches,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    first: int = 0,
    place: Callable[[int], str] = "image {}".format,
) -> dict[str, Features]:
    """Take the features of several layers in one pass.

    Args:
        layers: Maps float images (n, 3, H, W) in 0..1 to (n, F) of each layer, in evaluation mode.
        batches: At least one of uint8 images (n, 3, H, W) and int64 labels (n,).
        device: Where the layers are.
        first: Number of the first image, for errors.
        place: Names an image by its number, for errors.

    Raises:
        FloatingPointError: If a feature is not finite; it names the first such image.
    """
    features: dict[str, list[npt.NDArray[np.float32]]] = {}
    labels: list[npt.NDArray[np.int64]] = []
    for images_NCHW, label_N in batches:
        for name, h_NF in layers(images_NCHW.to(device).float() / 255).items():
            h_NF = h_NF.float().cpu().numpy()
            refuse_non_finite(h_NF, name, first, place)
            features.setdefault(name, []).append(h_NF)
        labels.append(label_N.numpy())
        first += len(label_N)
    label_X = np.concatenate(labels)
    return {name: Features(np.concatenate(parts), label_X) for name, parts in features.items()}


def refuse_non_finite(
    h_XF: npt.NDArray[np.float32],
    name: str,
    first: int = 0,
    place: Callable[[int], str] = "image {}".format,
) -> None:
    """Refuse features that are not finite; a block is looked at at a time.

    Raises:
        FloatingPointError: With the first such image and the layer's name.
    """
    for start in range(0, len(h_XF), _BLOCK):
        is_finite_N = np.isfinite(h_XF[start : start + _BLOCK]).all(axis=1)
        if not is_finite_N.all():
            image = place(first + start + int(is_finite_N.argmin()))
            raise FloatingPointError(
                f"features of {image} at {name} are not finite: no score can be made of them. The "
                "encoder has diverged, or overflows in half precision; evaluate an earlier "
                "checkpoint."
            )


def check_pair(train: Features, test: Features) -> None:
    """Refuse features that no probe can be fitted to and scored on.

    Raises:
        ConfigError: If a set is empty, its rows are not its labels, labels are missing, or widths
            differ.
        FloatingPointError: If a feature is not finite; it names the first such image.
    """
    for name, (h_XF, label_X) in {"training": train, "test": test}.items():
        if not len(h_XF) or h_XF.shape[:1] != label_X.shape:
            raise ConfigError(
                f"the {name} set has {len(h_XF)} features and {len(label_X)} labels: a score needs "
                "one of each for every image, and at least one image."
            )
        if missing := int((label_X < 0).sum()):
            raise ConfigError(
                f"{missing} of the {len(label_X)} {name} images have no label: probes need labels. "
                "Name a labelled set."
            )
        refuse_non_finite(h_XF, f"the {name} set's layer")
    if train.h_XF.shape[1] != test.h_XF.shape[1]:
        raise ConfigError(
            f"training features have {train.h_XF.shape[1]} dimensions, test features "
            f"{test.h_XF.shape[1]}: take both from the same layer of the same encoder."
        )


class Pixels(nn.Module):
    """The encoder that encodes nothing: raw pixels as features."""

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Return (n, 3 * H * W)."""
        return images_NCHW.flatten(1)
