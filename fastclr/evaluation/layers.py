"""Features of every layer in one pass, and scores of each: stages, h, the head by modules."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fastclr.config import ConfigError
from fastclr.evaluation.features import Features
from fastclr.evaluation.knn import knn_accuracy
from fastclr.evaluation.ridge import ridge_probe

H, _HEAD = "h", "projection_head."
PROTOCOL = (
    "Ridge regression and nearest neighbours, as in the protocols ridge and knn, on every stage of "
    "the encoder (averaged over places), on h, and on the outputs of the head's modules: the head "
    "discarded from the top, one module after the other."
)


class Layers:
    """Encoder and head, seen at all their layers.

    Names, in order: ``encoder.STAGE`` as timm names its stages (of another network its children),
    ``h``, and ``projection_head.MODULE`` for the output of every module of the head; the last is z.
    Identities are left out. Maps are averaged over their places, tokens over theirs.

    Args:
        encoder: Maps float images (n, 3, H, W) in 0..1 to h (n, F); set to evaluation mode.
        head: Maps h to z through modules one after the other; None for none.
        names: The layers wanted; None for all.

    Attributes:
        names: The layers that a call returns.

    Raises:
        ConfigError: If a layer is unknown.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self._encoder = encoder.eval()
        self._head = (nn.Sequential() if head is None else head).eval()
        stages = _stages(encoder)
        self._modules = {name: stage for name, (stage, _) in stages.items()}
        self._num_channels = {name: channels for name, (_, channels) in stages.items()}
        self._modules[H] = encoder
        for name, module in self._head.named_children():
            if not isinstance(module, nn.Identity):
                self._modules[f"{_HEAD}{name}"] = module
        if unknown := [name for name in names or () if name not in self._modules]:
            raise ConfigError(
                f"the model has no layer {unknown[0]!r}: choose from {', '.join(self._modules)}."
            )
        self.names = [name for name in self._modules if names is None or name in names]

    def __call__(self, images_NCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return (n, F) of each layer for float images in 0..1."""
        outputs: dict[str, torch.Tensor] = {}
        handles = [
            self._modules[name].register_forward_hook(self._keep(name, outputs))
            for name in self.names
        ]
        try:
            h_NF = self._encoder(images_NCHW)
            if any(name.startswith(_HEAD) for name in self.names):
                self._head(h_NF)
        finally:
            for handle in handles:
                handle.remove()
        return {name: outputs[name] for name in self.names}

    def only(self, names: Sequence[str]) -> Layers:
        """Return the same model seen at some of the layers."""
        return Layers(self._encoder, self._head, names)

    def _keep(self, name: str, outputs: dict[str, torch.Tensor]) -> Callable[..., None]:
        """Return a hook that keeps a module's pooled output."""

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[name] = _pooled(name, output, self._num_channels.get(name))

        return hook

    def digests(self) -> dict[str, str]:
        """Return, by layer, the sha256 of what its features depend on: weights of its part."""
        of_encoder, of_both = digest_of(self._encoder), digest_of(self._encoder, self._head)
        return {n: of_both if n.startswith(_HEAD) else of_encoder for n in self.names}

    def num_discarded(self, name: str) -> int | None:
        """Return how many modules of the head lie above a layer; None for the encoder's stages."""
        of_head = [H, *(n for n in self._modules if n.startswith(_HEAD))]
        return len(of_head) - 1 - of_head.index(name) if name in of_head else None


def digest_of(*modules: nn.Module) -> str:
    """Return the sha256 of modules: their structure, and name, type, shape and bytes of weights."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(repr(module).encode())  # strides and the like, which no weight shows
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _stages(encoder: nn.Module) -> dict[str, tuple[nn.Module, int | None]]:
    """Return the stages of an encoder, and their channels where they are known."""
    network = getattr(encoder, "network", encoder)
    info = getattr(network, "feature_info", None)
    if not isinstance(info, list):
        return {
            f"encoder.{name}": (module, None)
            for name, module in network.named_children()
            if not isinstance(module, nn.Identity)
        }
    return {
        f"encoder.{stage['module']}": (network.get_submodule(stage["module"]), stage["num_chs"])
        for stage in info
    }


def _pooled(name: str, output: Any, num_channels: int | None) -> torch.Tensor:
    """Average a layer's output to (n, F), in memory of its own."""
    if isinstance(output, torch.Tensor) and output.ndim == 2:
        return output.clone()  # a module after it may work in place
    if isinstance(output, torch.Tensor) and output.ndim == 3:
        return output.mean(1)
    if isinstance(output, torch.Tensor) and output.ndim == 4:
        is_channels_first = num_channels in (None, output.shape[1])
        return output.mean((2, 3) if is_channels_first else (1, 2))
    raise ConfigError(
        f"layer {name} returns {getattr(output, 'shape', type(output).__name__)}, of which no "
        "feature can be made: it needs (n, F), (n, tokens, F) or maps. Leave it out of the layers."
    )


class LayerScore(NamedTuple):
    """How good a layer is.

    Attributes:
        layer: Its name.
        width: Dimensions of its features.
        num_discarded: Modules of the head that are discarded, from the top, to end at this layer:
            0 keeps z, the most leaves h; None for a stage of the encoder.
        ridge_top1: Test accuracy of :func:`~fastclr.evaluation.ridge.ridge_probe`, 0..1.
        ridge_l2: The l2 it chose.
        knn_top1: Test accuracy of :func:`~fastclr.evaluation.knn.knn_accuracy`, 0..1.
    """

    layer: str
    width: int
    num_discarded: int | None
    ridge_top1: float
    ridge_l2: float
    knn_top1: float


def layer_scores(
    train: Mapping[str, Features],
    test: Mapping[str, Features],
    num_discarded: Callable[[str], int | None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> list[LayerScore]:
    """Score every layer by ridge regression and nearest neighbours.

    Args:
        train: Labelled features of each layer.
        test: The same layers of other images.
        num_discarded: :meth:`Layers.num_discarded`.
        say: Told the layer that is being scored.

    Raises:
        ConfigError: If the labels cannot be probed.
        FloatingPointError: If a feature is not finite.
    """
    scores = []
    for name, fitting in train.items():
        say(f"{name}: ridge regression and nearest neighbours")
        knn_top1 = knn_accuracy(fitting, test[name])
        top1, l2 = ridge_probe(fitting, test[name])
        width = fitting.h_XF.shape[1]
        scores.append(LayerScore(name, width, num_discarded(name), top1, l2, knn_top1))
    return scores


def layers_markdown(scores: Sequence[LayerScore]) -> str:
    """Return the table in Markdown."""
    rows = [
        "| layer | width | head modules discarded | ridge top-1 | kNN top-1 |",
        "|---|---|---|---|---|",
    ]
    for s in scores:
        discarded = "" if s.num_discarded is None else s.num_discarded
        rows.append(
            f"| {s.layer} | {s.width} | {discarded} | {s.ridge_top1:.1%} | {s.knn_top1:.1%} |"
        )
    return "\n".join(rows)
