"""LARS in the form of the SimCLR authors."""

# torch exports its foreach functions under private names only.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from fastclr.optim import segments
from fastclr.optim.segments import SegmentTable


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters by role: adapted and decayed, or neither.

    Biases and normalisation layers (every parameter of fewer than 2 dimensions) get no decay and
    no adaptation, by role rather than by name.

    Args:
        module: Model whose parameters are to be optimised.
        weight_decay: Decay of the first group.

    Returns:
        Two groups with keys ``params``, ``weight_decay``, ``adapt`` and ``name``; an empty one is
        left out.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trainable if p.ndim >= 2],
            "weight_decay": weight_decay,
            "adapt": True,
            "name": "weights",
        },
        {
            "params": [p for p in trainable if p.ndim < 2],
            "weight_decay": 0.0,
            "adapt": False,
            "name": "norms_and_biases",
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

    The decayed gradient enters the norm and the rate is inside the buffer; You et al. 2017, apex's
    LARC and lightly do neither, so their hyper-parameters do not carry over.

    Under ZeRO the optimizer is given flat buffers that cut layers across ranks: call
    :meth:`attach` once after ``deepspeed.initialize``. The norms are then summed over ranks, in one
    all-reduce of two numbers a layer, and the ratios are those of whole layers.

    Args:
        params: Parameters or groups; a group may set ``adapt``.
        lr: Learning rate, >= 0.
        momentum: 0 <= momentum < 1.
        weight_decay: L2 decay, >= 0.
        trust_coefficient: eta, > 0.
        adapt: Whether the ratio applies.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust_coefficient: float = 1e-3,
        adapt: bool = True,
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0 or trust_coefficient <= 0:
            raise ValueError(
                f"LARS got lr {lr}, momentum {momentum}, weight_decay {weight_decay}, "
                f"trust_coefficient {trust_coefficient}: give lr >= 0, 0 <= momentum < 1, "
                "weight_decay >= 0, trust_coefficient > 0."
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": adapt,
        }
        self._layers: dict[int, torch.Tensor] = {}
        self._table: SegmentTable | None = None
        super().__init__(params, defaults)

    @classmethod
    def for_module(
        cls,
        module: nn.Module,
        learning_rate: float,
        weight_decay: float = 1e-6,
        momentum: float = 0.9,
        trust_coefficient: float = 1e-3,
    ) -> LARS:
        """Make LARS for a model, biases and normalisation layers excluded from decay and ratio."""
        return cls(
            parameter_groups(module, weight_decay),
            lr=learning_rate,
            momentum=momentum,
            trust_coefficient=trust_coefficient,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, and remember its tensors as whole layers."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self._layers[id(parameter)] = parameter

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy; ``load_state_dict`` passes here too and changes no layer."""
        super().__setstate__(state)
        if "_layers" not in self.__dict__:
            self._layers = {id(p): p for group in self.param_groups for p in group["params"]}
            self._table = None

    def attach(self, engine: Any) -> None:
        """Learn where the layers lie in a DeepSpeed engine's buffers; every rank calls this.

        Raises:
            ConfigError: If they cannot be told; see :func:`fastclr.optim.segments.read`.
        """
        self._table = segments.read(engine)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step; returns the closure's loss, if one is given.

        Raises:
            RuntimeError: If a tensor is neither one that LARS was made for nor a known buffer.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        """Apply the rule of the class docstring to one group."""
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        # A rank that holds none of the group's layers has no pieces, and joins the all-reduce.
        pieces = [piece for p in parameters for piece in self._cut(p)]
        w, g, v = map(list, zip(*pieces, strict=True)) if pieces else ([], [], [])
        if group["weight_decay"]:
            g = list(torch._foreach_add(g, w, alpha=group["weight_decay"])) if g else g
        if group["adapt"]:
            ratios = self._ratios(group["trust_coefficient"], parameters, w, g)
            g = list(torch._foreach_mul(g, ratios)) if g else g
        if pieces:
            torch._foreach_mul_(v, group["momentum"])
            torch._foreach_add_(v, g, alpha=group["lr"])
            torch._foreach_sub_(w, v)

    def _cut(self, parameter: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield weight, gradient and momentum of each layer, or piece of one, in a tensor."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        gradient = cast(torch.Tensor, parameter.grad).to(parameter.dtype)
        whole = (parameter, gradient, state["momentum_buffer"])
        if id(parameter) in self._layers:
            yield whole
        elif self._table is not None and id(parameter) in self._table.buffers:
            for segment in self._table.buffers[id(parameter)].segments:
                yield tuple(t.narrow(0, segment.start, segment.numel) for t in whole)
        else:
            raise RuntimeError(
                f"LARS was handed a flat buffer of {parameter.numel()} elements that it does not "
                "know: its ratios would not be those of layers. Call optimizer.attach(engine) "
                "after deepspeed.initialize."
            )

    def _ratios(
        self,
        trust_coefficient: float,
        parameters: list[torch.Tensor],
        w: list[torch.Tensor],
        g: list[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Return the trust ratio of each piece's layer."""
        norms = (torch._foreach_norm(w), torch._foreach_norm(g)) if w else ((), ())
        if self._table is None:
            w_norm_S, g_norm_S = (torch.stack(list(n)) for n in norms)
        else:
            w_norm_S, g_norm_S = self._sum_over_ranks(parameters, norms)
        ratio_S = trust_coefficient * w_norm_S / g_norm_S
        ratio_S = torch.where((w_norm_S > 0) & (g_norm_S > 0), ratio_S, 1.0)
        return list(ratio_S.unbind())

    def _sum_over_ranks(
        self, flats: list[torch.Tensor], norms: tuple[Sequence[torch.Tensor], ...]
    ) -> Sequence[torch.Tensor]:
        """Turn the norms of pieces into the norms of their layers, in one all-reduce."""
        table = cast(SegmentTable, self._table)
        layer_S = torch.cat([table.buffers[id(flat)].layer_S for flat in flats])
        sumsq_L2 = torch.zeros(table.num_layers, 2, dtype=torch.float64, device=layer_S.device)
        if len(layer_S):
            norm_S2 = torch.stack([torch.stack(list(n)) for n in norms], 1).double()
            sumsq_L2.index_add_(0, layer_S, norm_S2.square())
        dist.all_reduce(sumsq_L2, group=table.group)
        return sumsq_L2.sqrt()[layer_S].to(flats[0].dtype).unbind(1)
