"""LARS, exact under every ZeRO stage; by default in the form of the SimCLR authors."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import nn

from fastclr.heads import SupervisedHead
from fastclr.kernels import KernelUnavailable, lars_torch
from fastclr.optim import apex, layer_state, segments
from fastclr.optim.segments import SegmentTable

logger = logging.getLogger(__name__)

Denominator = Literal["decayed_gradient", "sum_of_norms"]
Impl = Literal["auto", "torch", "numba", "triton", "apex"]
# Imported at the first use.
COMPILED = {"numba": "fastclr.kernels.lars_numba", "triton": "fastclr.kernels.lars"}
# What "auto" takes; torch for the rest.
FASTEST = {
    **{("cpu", dtype): "numba" for dtype in (torch.float32, torch.float64)},
    **{("cuda", dtype): "triton" for dtype in (torch.float16, torch.bfloat16, torch.float32)},
}


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters by role: adapted and decayed, or neither.

    Biases, normalisation layers (every parameter of fewer than 2 dimensions) and supervised heads
    get no decay and no adaptation, by role; the SimCLR authors' code tells the same ones by name.

    Args:
        module: Model whose parameters are to be optimised.
        weight_decay: Decay of the first group.

    Returns:
        Two groups with keys ``params``, ``weight_decay``, ``adapt`` and ``name``; an empty one is
        left out.
    """
    heads = [m for m in module.modules() if isinstance(m, SupervisedHead)]
    excluded = {id(p) for head in heads for p in head.parameters()}
    excluded |= {id(p) for p in module.parameters() if p.ndim < 2}
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trainable if id(p) not in excluded],
            "weight_decay": weight_decay,
            "adapt": True,
            "name": "weights",
        },
        {
            "params": [p for p in trainable if id(p) in excluded],
            "weight_decay": 0.0,
            "adapt": False,
            "name": "excluded",
        },
    ]
    return [group for group in groups if group["params"]]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates, as the SimCLR code does it (google-research/simclr, LARS).

    For each layer w with gradient g, none of the norms stopping the device:

        g <- g + weight_decay * w
        ratio = trust_coefficient * |w| / |g|     (1 if either norm is 0, or adapt is False)
        v <- momentum * v + lr * ratio * g
        w <- w - v

    The decayed gradient enters the norm and the rate is inside the buffer. Others do neither, and
    hyper-parameters do not carry over between the forms:

    - You et al. 2017, lightly, torch-optimizer: ``denominator="sum_of_norms"``,
      ``rate_inside_momentum=False``. The two libraries add 1e-8 to the denominator, and leave a
      layer whose gradient is exactly 0 undecayed too; here it decays with ratio 1.
    - apex's LARC: the same with ``clip=True``, which makes ``lr`` a ceiling of the layer's rate.

    A gradient that is not finite makes its whole layer NaN, so that it cannot go unnoticed; an
    engine with loss scaling skips the step before it comes here.

    Under ZeRO the optimizer is given flat buffers that cut layers across ranks: call
    :meth:`attach` once after ``deepspeed.initialize``. The norms are then summed over ranks, in one
    all-reduce of two numbers a layer, and the ratios are those of whole layers.

    Args:
        params: Parameters or groups; a group may set anything below but ``impl``.
        lr: Learning rate, >= 0.
        momentum: 0 <= momentum < 1.
        weight_decay: L2 decay, >= 0.
        trust_coefficient: eta, > 0.
        adapt: Whether the ratio applies.
        denominator: ``decayed_gradient``, |g + weight_decay * w|; or ``sum_of_norms``,
            |g| + weight_decay * |w|.
        rate_inside_momentum: Whether the buffer holds steps (v above), or gradients
            (v <- momentum * v + ratio * g; w <- w - lr * v, as in torch.optim.SGD).
        clip: Whether the ratio is min(ratio / lr, 1).
        nesterov: Whether the step looks ahead, as in torch.optim.SGD.
        impl: ``torch``; ``numba`` on the CPU, in single and double precision; ``triton`` or
            ``apex`` (its norms, see ``fastclr/optim/apex.py``) on CUDA; ``auto`` for numba or
            Triton where they can, and torch for the rest. None of them waits for the device.

    Raises:
        ValueError: If a value is out of range.
        KernelUnavailable: If ``impl`` names what is not installed.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust_coefficient: float = 1e-3,
        adapt: bool = True,
        *,
        denominator: Denominator = "decayed_gradient",
        rate_inside_momentum: bool = True,
        clip: bool = False,
        nesterov: bool = False,
        impl: Impl = "auto",
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0 or trust_coefficient <= 0:
            raise ValueError(
                f"LARS got lr {lr}, momentum {momentum}, weight_decay {weight_decay}, "
                f"trust_coefficient {trust_coefficient}: give lr >= 0, 0 <= momentum < 1, "
                "weight_decay >= 0, trust_coefficient > 0."
            )
        for name, value, known in (
            ("denominator", denominator, get_args(Denominator)),
            ("impl", impl, get_args(Impl)),
        ):
            if value not in known:
                raise ValueError(f"LARS got {name} {value!r}: give one of {', '.join(known)}.")
        self._impl: Impl = impl
        if impl in COMPILED:
            _module(impl)
        elif impl == "apex":
            apex.load()
        self._layers: dict[int, torch.Tensor] = {}
        self._table: SegmentTable | None = None
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": adapt,
            "denominator": denominator,
            "rate_inside_momentum": rate_inside_momentum,
            "clip": clip,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults)

    @classmethod
    def for_module(
        cls, module: nn.Module, learning_rate: float, weight_decay: float = 1e-6, **options: Any
    ) -> LARS:
        """Make LARS for a model, with the groups of :func:`parameter_groups`.

        Args:
            module: Model.
            learning_rate: The class's ``lr``.
            weight_decay: Of the weights.
            options: Further arguments of the class.
        """
        return cls(parameter_groups(module, weight_decay), lr=learning_rate, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, and remember its tensors as whole layers."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self._layers[id(parameter)] = parameter

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_impl": self._impl}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy; ``load_state_dict`` passes here too and changes no layer."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)  # of a state saved before there were forms
        if "_layers" not in self.__dict__:
            self._layers = {id(p): p for group in self.param_groups for p in group["params"]}
            self._table = None

    def attach(self, engine: Any) -> None:
        """Learn where the layers lie in a DeepSpeed engine's buffers; every rank calls this.

        Raises:
            ConfigError: If they cannot be told; see :func:`fastclr.optim.segments.read`.
        """
        self._table = segments.read(engine)

    def layer_state(self) -> dict[str, torch.Tensor]:
        """Collect weights and momenta by layer on rank 0; every rank calls this, once attached.

        Together with the learning rates and the model's other buffers, all that the next steps
        depend on, whatever stage and number of ranks goes on from it.
        """
        return layer_state.gather(self._attached(), self.state)

    def load_layer_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what :meth:`layer_state` returned; every rank calls this, with all of it.

        Raises:
            ConfigError: If it was saved from another model.
        """
        layer_state.scatter(self._attached(), self.state, tensors)

    def _attached(self) -> SegmentTable:
        if self._table is None:
            raise RuntimeError(
                "LARS does not know which layers it holds: call optimizer.attach(engine) after "
                "deepspeed.initialize."
            )
        return self._table

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step; returns the closure's loss, if one is given.

        Raises:
            RuntimeError: If a tensor is neither one that LARS was made for nor a known buffer.
            KernelUnavailable: If ``impl`` cannot work where the tensors lie.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters and not self._is_initialisation(parameters):
                kinds: dict[Any, list[torch.Tensor]] = {}
                for p in parameters:
                    kinds.setdefault((p.device, p.dtype), []).append(p)
                for alike in kinds.values():
                    self._update(group, alike)
        return loss

    def _is_initialisation(self, parameters: list[torch.Tensor]) -> bool:
        """Whether this is the step without gradients that DeepSpeed takes before any training.

        It asks for the optimizer's state; weight decay would move the weights.
        """
        known = self._layers.keys() | (self._table.buffers.keys() if self._table else ())
        foreign = [p for p in parameters if id(p) not in known]
        if foreign and any(_gradient(p).any() for p in foreign):
            raise RuntimeError(
                f"LARS was handed a tensor of {foreign[0].numel()} elements that it does not know: "
                "its ratios would not be those of layers. Call optimizer.attach(engine) after "
                "deepspeed.initialize."
            )
        return bool(foreign)

    def _update(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        """Apply the rule of the class docstring to tensors of one group, device and dtype."""
        # A rank that holds none of the group's layers has no pieces, and joins the all-reduce.
        pieces = [piece for p in parameters for piece in self._cut(p)]
        w, g, v = map(list, zip(*pieces, strict=True)) if pieces else ([], [], [])
        kernels = self._kernels(parameters[0])
        inside, rate = (group["lr"], 1.0) if group["rate_inside_momentum"] else (1.0, group["lr"])
        scale: torch.Tensor | float = inside
        if group["adapt"]:
            decay = group["weight_decay"] if group["denominator"] == "decayed_gradient" else 0.0
            sumsq_S2 = kernels.sums_of_squares(w, g, decay) if pieces else torch.zeros(0, 2)
            if self._table is not None and self._table.partitioned:
                sumsq_S2 = _sum_over_ranks(self._table, parameters, sumsq_S2)
            scale = inside * _ratios(sumsq_S2, group)
        if pieces:
            names = ("weight_decay", "momentum", "nesterov")
            kernels.update(w, g, v, scale=scale, rate=rate, **{name: group[name] for name in names})

    def _cut(self, parameter: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield weight, gradient and momentum of each layer, or piece of one; all contiguous."""
        state = self.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        gradient, momentum = _gradient(parameter), state["momentum_buffer"]
        whole = (parameter, gradient, momentum)
        if not all(map(torch.Tensor.is_contiguous, whole)):
            state["momentum_buffer"] = momentum = _laid_out_like(parameter, momentum)
            gradient = _laid_out_like(parameter, gradient)
            whole = (_in_order(parameter), _in_order(gradient), _in_order(momentum))
        if id(parameter) in self._layers:
            yield whole
            return
        for segment in self._attached().buffers[id(parameter)].segments:
            yield tuple(t.view(-1).narrow(0, segment.start, segment.numel) for t in whole)

    def _kernels(self, tensor: torch.Tensor) -> ModuleType:
        """Return the module of ``sums_of_squares`` and ``update`` for tensors like this one."""
        if self._impl != "auto":
            return _module(self._impl)
        impl = FASTEST.get((tensor.device.type, tensor.dtype), "torch")
        try:
            kernels = _module(impl)
            if impl == "triton":
                kernels.check(tensor)
        except KernelUnavailable as error:
            logger.warning("LARS goes on with impl='torch': %s", error)
            self._impl = "torch"
            return lars_torch
        return kernels


def _module(impl: str) -> ModuleType:
    """Return the module of an implementation.

    Raises:
        KernelUnavailable: If what it is built on is not here.
    """
    if impl in ("torch", "apex"):
        return lars_torch if impl == "torch" else apex
    try:
        return importlib.import_module(COMPILED[impl])
    except ImportError as error:
        raise KernelUnavailable(
            f"LARS(impl='{impl}') needs {impl} ({error}): pip install {impl}, or use impl='auto'."
        ) from error


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    """Return the gradient in the parameter's precision."""
    gradient: torch.Tensor = parameter.grad  # pyright: ignore[reportAssignmentType]
    return gradient if gradient.dtype == parameter.dtype else gradient.to(parameter.dtype)


def _laid_out_like(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with its elements in memory in the parameter's order."""
    if tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter).copy_(tensor)


def _in_order(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous view in the order of memory, channels-last or any other."""
    if tensor.is_contiguous():
        return tensor
    ordered = tensor.permute(sorted(range(tensor.ndim), key=lambda dim: -tensor.stride(dim)))
    if not ordered.is_contiguous():
        raise RuntimeError(
            f"LARS was given a weight of shape {tuple(tensor.shape)}, strides {tensor.stride()}: "
            "it is not one block of memory. Make it contiguous before the optimizer."
        )
    return ordered


def _sum_over_ranks(
    table: SegmentTable, flats: list[torch.Tensor], sumsq_S2: torch.Tensor
) -> torch.Tensor:
    """Turn sums over pieces into sums over their layers, in one all-reduce."""
    layer_S = torch.cat([table.buffers[id(flat)].layer_S for flat in flats])
    shape = (len(table.parameters), 2)
    sumsq_L2 = torch.zeros(shape, dtype=torch.float64, device=layer_S.device)
    sumsq_L2[layer_S] = sumsq_S2.to(sumsq_L2)  # a rank holds at most one piece of a layer
    sumsq_L2 = sumsq_L2.to(table.device)  # from the CPU, where optimizers are offloaded
    dist.all_reduce(sumsq_L2, group=table.group)
    return sumsq_L2.to(layer_S.device)[layer_S]


def _ratios(sumsq_S2: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """Return the trust ratio of each piece's layer, float64; NaN where the sums are."""
    w_norm_S, g_norm_S = sumsq_S2.sqrt().unbind(1)
    divisor_S = g_norm_S
    if group["denominator"] == "sum_of_norms":
        divisor_S = g_norm_S + group["weight_decay"] * w_norm_S
    ratio_S = group["trust_coefficient"] * w_norm_S / divisor_S
    if group["clip"]:
        ratio_S = (ratio_S / group["lr"]).clamp(max=1)
    return ratio_S.masked_fill((w_norm_S == 0) | (g_norm_S == 0), 1.0)
