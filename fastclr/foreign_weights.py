"""Initial weights from files: fastclr's own, and the encoders of other libraries.

A format is recognised by the names of its tensors; :data:`FORMATS` says where its encoder is, how
its names become timm's, and which tensors are heads that this project has no place for. Every other
tensor that is missing or too many is an error.

Most libraries subtract a mean and divide by a standard deviation before the encoder; encoders here
take 0..1. The difference is folded into the first convolution and what follows it, see
:func:`fold_normalisation`.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fastclr.config import ConfigError
from fastclr.simclr import SimCLR

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
UNIT = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

# What a safetensors file says of the images its encoder takes; written by the export.
INPUT_KEY, INPUT_UNIT = "fastclr.input", "0..1 without mean and std"

State = dict[str, torch.Tensor]
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Format:
    """How another library names the tensors of an encoder.

    Attributes:
        name: For messages.
        sign: Name of a tensor, behind the prefix, that tells the format; empty for the first one of
            the network itself.
        prefixes: What stands before the names of the encoder's tensors. ``state_dict.`` and
            ``resnet.`` are dictionaries inside the file.
        mark: Expression that one name must match too.
        alone: Whether nothing else than the weights is in the file.
        renames: Expression and replacement, in order, that make timm's names.
        heads: Expression for the names, behind the prefix, of tensors that are left out.
        takes_unit: Whether the encoder was trained on 0..1 without mean and std.
        note: What to know besides.
    """

    name: str
    sign: str
    prefixes: tuple[str, ...]
    mark: str = ""
    alone: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    heads: str = "$^"
    takes_unit: bool = False
    note: str = ""


_MAX_POOL = "TensorFlow pads the stem's max-pool on one side only, torch on both"
_LIGHTLY_HEADS = (
    r"(state_dict\.)?(projection_head|prediction_head|online_classifier|linear_classifier"
    r"|backbone_momentum|projection_head_momentum|teacher_\w+|memory_bank|criterion)\b|fc\."
)
_SOLO_HEADS = (
    r"(state_dict\.)?(projector|predictor|classifier|prototypes|queue|momentum_\w+)\b|fc\."
)

# The first that fits is taken: those with more to tell them by stand first.
FORMATS: tuple[Format, ...] = (
    Format(
        name="lightly, a torchvision ResNet's children in a Sequential",
        sign="4.0.conv1.weight",
        prefixes=("state_dict.backbone.", "backbone."),
        renames=(
            (r"^0\.", "conv1."),
            (r"^1\.", "bn1."),
            (r"^4\.", "layer1."),
            (r"^5\.", "layer2."),
            (r"^6\.", "layer3."),
            (r"^7\.", "layer4."),
        ),
        heads=_LIGHTLY_HEADS,
    ),
    Format(
        name="lightly",
        sign="conv1.weight",
        prefixes=("state_dict.backbone.", "backbone."),
        mark=r"(state_dict\.)?(projection_head|online_classifier)\.",
        heads=_LIGHTLY_HEADS,
    ),
    Format(
        name="solo-learn",
        sign="conv1.weight",
        prefixes=("state_dict.backbone.", "backbone.", "state_dict.encoder.", "encoder."),
        heads=_SOLO_HEADS,
        note="solo-learn pads the 3x3 stem of its CIFAR encoders by 2, fastclr by 1: features "
        "differ along the borders",
    ),
    Format(
        name="Google's SimCLR v2, converted",
        sign="net.0.0.weight",
        prefixes=("resnet.", ""),
        renames=(
            (r"^net\.0\.0\.", "conv1."),
            (r"^net\.0\.1\.0\.", "bn1."),
            (r"^net\.(\d+)\.blocks\.(\d+)\.", r"layer\1.\2."),
            (r"\.projection\.shortcut\.", ".downsample.0."),
            (r"\.projection\.bn\.0\.", ".downsample.1."),
            (r"\.net\.0\.", ".conv1."),
            (r"\.net\.1\.0\.", ".bn1."),
            (r"\.net\.2\.", ".conv2."),
            (r"\.net\.3\.0\.", ".bn2."),
            (r"\.net\.4\.", ".conv3."),
            (r"\.net\.5\.0\.", ".bn3."),
        ),
        heads=r"fc\.|head\.",
        takes_unit=True,
        note=f"encoders with selective kernels (sk1) have no counterpart here; {_MAX_POOL}",
    ),
    Format(
        name="Google's SimCLR v1, converted",
        sign="conv1.weight",
        prefixes=("state_dict.",),
        alone=True,
        heads=r"fc\.",
        takes_unit=True,
        note=_MAX_POOL,
    ),
    Format(
        name="torchvision",
        sign="layer1.0.conv1.weight",
        prefixes=("", "module.", "model.", "state_dict.", "state_dict.module."),
        heads=r"fc\.",
    ),
    Format(name="timm", sign="", prefixes=("", "module.", "state_dict.", "state_dict.module.")),
)


class _File(NamedTuple):
    """What a file holds: tensors by dotted name, its other entries, what it says of the input."""

    state: State
    others: tuple[str, ...]
    takes_unit: bool | None


def load(model: SimCLR, file: Path, expected_input: str = "as_format") -> str:
    """Load a whole model of this project, or an encoder of any known format, into a model.

    Args:
        model: Loaded in place.
        file: ``.safetensors``, or a ``.pth``, ``.pt``, ``.ckpt`` or ``.tar`` of torch; the latter
            is read without unpickling any class.
        expected_input: What the file's encoder was trained on: ``unit``, 0..1; ``imagenet``,
            ImageNet's mean and std; ``as_format``, what the format's library does. Not for
            fastclr's own files.

    Returns:
        What was recognised, left out and folded, for the user.

    Raises:
        ConfigError: If the file cannot be read, its format is unknown, or it does not fit.
    """
    content = _read(file)
    _refuse_non_finite(file, content.state)
    if any(re.match(r"(encoder\.)?network\.", key) for key in content.state):
        return _load_own(model, file, content.state)
    network: nn.Module = model.encoder.get_submodule("network")
    chosen, prefix = _recognise(file, content, network)
    state, left_out = _renamed(content.state, chosen, prefix, _heads(chosen, network))
    counters = _add_counters(state, network)
    _refuse_misfit(file, chosen.name, state, network, chosen.note)
    said = [f"initial_weights {file} are of the format {chosen.name}"]
    if left_out:
        said.append(f"left out as heads of that format ({len(left_out)}): {', '.join(left_out)}")
    if counters:
        said.append(f"{counters} missing counters num_batches_tracked start at 0")
    mean_std = _normalisation(content, chosen, network, expected_input)
    said.append(_fold(state, network, mean_std))
    said += [chosen.note] if chosen.note else []
    network.load_state_dict(state)
    return "; ".join(said) + "."


def fold_normalisation(state: State, network: nn.Module, mean_std: Normalisation) -> int:
    """Make weights for (images - mean) / std take the images themselves.

    The first convolution's weights are divided by std; the constant goes into its bias or, where it
    has none, into the running mean of the BatchNorm behind it. Exact, except where the convolution
    pads: it padded with the mean colour, now with black. A training forward, which subtracts the
    batch's own mean, is changed along those borders only.

    Args:
        state: Weights by the network's names; changed in place.
        network: The network they belong to.
        mean_std: Of each channel, images being 0..1.

    Returns:
        The pixels that the convolution pads.

    Raises:
        ConfigError: If neither bias nor BatchNorm can take the constant.
    """
    name, conv, norm_name = _first_convolution(network)
    weight = state[f"{name}.weight"].double()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in mean_std)
    shift = (weight * mean / std).sum((1, 2, 3))
    if conv.bias is not None:
        target, constant = f"{name}.bias", -shift
    elif norm_name:
        target, constant = f"{norm_name}.running_mean", shift
    else:
        raise ConfigError(
            f"the mean and std that {type(network).__name__} was trained with cannot be folded "
            f"into {name}: it has no bias, and no BatchNorm follows. Fold them in the file, and "
            "give --initial-weights-input unit."
        )
    state[f"{name}.weight"] = (weight / std).float()
    state[target] = (state[target].double() + constant).float()
    padding = conv.padding if isinstance(conv.padding, tuple) else (0,)
    same = conv.padding == "same" or type(conv) is not nn.Conv2d
    return max(*padding, max(conv.kernel_size) // 2 if same else 0)


def _read(file: Path) -> _File:
    """Read a file of weights; no class is ever unpickled."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                said = (opened.metadata() or {}).get(INPUT_KEY)
                state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            return _File(state, (), True if said == INPUT_UNIT else None)
        if file.suffix not in (".pth", ".pt", ".ckpt", ".tar", ".bin"):
            raise ConfigError(
                f"initial_weights {file} have the ending {file.suffix!r}: give a .safetensors "
                "file, e.g. RUN/checkpoints/step-*/model.safetensors, or torch's .pth or .ckpt."
            )
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(
            f"initial_weights {file} hold more than tensors, or are damaged ({first}): no class is "
            "unpickled here, which could run any code. If you trust the file, keep its weights "
            "alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pth')."
        ) from error
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        raise ConfigError(
            f"initial_weights {file} cannot be read ({error}): give a safetensors file, e.g. "
            "RUN/checkpoints/step-*/model.safetensors, or a .pth or .ckpt of torch."
        ) from error
    return _flat(file, content)


def _flat(file: Path, content: Any) -> _File:
    """Give the tensors of a torch file dotted names."""
    state: State = {}
    others: list[str] = []
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, torch.Tensor):
            state[str(key)] = value
        elif isinstance(value, Mapping) and all(
            isinstance(v, torch.Tensor) for v in value.values()
        ):
            state.update({f"{key}.{name}": tensor for name, tensor in value.items()})
            others += [] if value else [str(key)]
        else:
            others.append(str(key))
    if not state:
        raise ConfigError(
            f"initial_weights {file} hold no dictionary of tensors, but {type(content).__name__} "
            f"{', '.join(others[:5])}: give a state dict."
        )
    return _File(state, tuple(others), None)


def _refuse_non_finite(file: Path, state: State) -> None:
    """Refuse NaN and infinity."""
    for key, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ConfigError(
                f"initial_weights {file}: {key} is not finite, no training begins with that. Give "
                "another checkpoint."
            )


def _load_own(model: SimCLR, file: Path, state: State) -> str:
    """Load a whole model, or an encoder alone, of this project."""
    whole = any(key.startswith("projection_head.") for key in state)
    target: nn.Module = model if whole else model.encoder
    if not whole:
        state = {key.removeprefix("encoder."): value for key, value in state.items()}
    _refuse_misfit(file, "fastclr", state, target)
    target.load_state_dict(state)
    what = "encoder and head" if whole else "an encoder"
    return f"initial_weights {file} are {what} of fastclr."


def _recognise(file: Path, content: _File, network: nn.Module) -> tuple[Format, str]:
    """Find the format and the prefix by the names."""
    own = next(iter(network.state_dict()))
    for chosen in FORMATS:
        if chosen.alone and content.others:
            continue
        if chosen.mark and not any(re.match(chosen.mark, key) for key in content.state):
            continue
        for prefix in chosen.prefixes:
            if prefix + (chosen.sign or own) in content.state:
                return chosen, prefix
    first = ", ".join(list(content.state)[:3])
    raise ConfigError(
        f"initial_weights {file} are of no known format: {len(content.state)} tensors, the first "
        f"{first}. Known are fastclr's own; ResNets of {'; '.join(f.name for f in FORMATS[:-1])}; "
        "and the run's own encoder in timm's names."
    )


def _heads(chosen: Format, network: nn.Module) -> str:
    """Return the expression for what is left out; a timm model says where its classifier is."""
    if chosen.name != "timm":
        return chosen.heads
    said = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    names = (said,) if isinstance(said, str) else tuple(said)
    return "|".join(rf"{re.escape(name)}\." for name in names) or chosen.heads


def _renamed(state: State, chosen: Format, prefix: str, heads: str) -> tuple[State, list[str]]:
    """Give the tensors timm's names; also return the names of those that are left out."""
    renamed: State = {}
    left_out: list[str] = []
    for key, tensor in state.items():
        name = key.removeprefix(prefix)
        if re.match(heads, name):
            left_out.append(key)
            continue
        if key.startswith(prefix):
            for pattern, replacement in chosen.renames:
                name = re.sub(pattern, replacement, name)
        else:
            name = key
        renamed[name] = tensor
    return renamed, left_out


def _add_counters(state: State, network: nn.Module) -> int:
    """Add BatchNorm's step counters, which files of old versions of torch lack; return how many."""
    missing = [
        key
        for key in network.state_dict()
        if key.endswith(".num_batches_tracked")
        and key not in state
        and key.replace("num_batches_tracked", "running_mean") in state
    ]
    state.update({key: torch.tensor(0) for key in missing})
    return len(missing)


def _refuse_misfit(file: Path, name: str, state: State, target: nn.Module, note: str = "") -> None:
    """Refuse missing, unexpected and misshapen tensors."""
    wanted = {key: tuple(value.shape) for key, value in target.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    wrong = sorted(k for k in wanted.keys() | found if wanted.get(k) != found.get(k))
    if not wrong:
        return
    key = wrong[0]
    missing, unexpected = (sorted(a.keys() - b) for a, b in ((wanted, found), (found, wanted)))
    counts = "".join(
        f" {len(keys)} {what}, such as {', '.join(keys[:3])}."
        for what, keys in (("are missing", missing), ("are unexpected", unexpected))
        if keys
    )
    raise ConfigError(
        f"initial_weights {file} ({name}) do not fit the model: {len(wrong)} tensors differ, the "
        f"first is {key}: {found.get(key, 'missing')} there, {wanted.get(key, 'missing')} here."
        f"{counts} Use the encoder and head they were trained with{f' ({note})' if note else ''}."
    )


def _normalisation(
    content: _File, chosen: Format, network: nn.Module, expected_input: str
) -> Normalisation:
    """Return the mean and std that the file's encoder expects to be taken off."""
    if expected_input != "as_format":
        return {"unit": UNIT, "imagenet": IMAGENET}[expected_input]
    if content.takes_unit or chosen.takes_unit:
        return UNIT
    said = getattr(network, "pretrained_cfg", {}) if chosen.name == "timm" else {}
    if "mean" in said and "std" in said:
        return tuple(said["mean"]), tuple(said["std"])
    return IMAGENET


def _fold(state: State, network: nn.Module, mean_std: Normalisation) -> str:
    """Fold mean and std, and say so."""
    if mean_std == UNIT:
        return "its encoder takes 0..1, nothing is folded"
    padding = fold_normalisation(state, network, mean_std)
    where = f", exact but for the outer {padding} pixels, now padded with black" if padding else ""
    return (
        f"mean {mean_std[0]} and std {mean_std[1]} are folded into the first convolution{where}; "
        "if they were others, say so with --initial-weights-input"
    )


def _first_convolution(network: nn.Module) -> tuple[str, nn.Conv2d, str]:
    """Find the convolution that meets the images, and the BatchNorm right behind it, if any."""
    names = {module: name for name, module in network.named_modules()}
    found: list[tuple[str, nn.Conv2d, torch.Tensor]] = []
    behind: list[str] = []

    def after_conv(conv: Any, _: Any, out: torch.Tensor) -> None:
        if not found:
            found.append((names[conv], conv, out))

    def before_norm(norm: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if found and inputs[0] is found[0][2]:
            behind.append(names[norm])

    hooks = [m.register_forward_hook(after_conv) for m in names if isinstance(m, nn.Conv2d)]
    norms = [m for m in names if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks += [m.register_forward_pre_hook(before_norm) for m in norms]
    size = getattr(network, "pretrained_cfg", {}).get("input_size") or (3, 64, 64)
    was_training = network.training
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros(1, *size))
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    if not found:
        raise ConfigError(
            f"{type(network).__name__} has no convolution that a mean and std could be folded "
            "into: give --initial-weights-input unit for weights that take 0..1."
        )
    name, conv, _ = found[0]
    return name, conv, behind[0] if behind else ""
