"""LARS in the form of the SimCLR authors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


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

    For each parameter w with gradient g, none of the norms stopping the device:

        g <- g + weight_decay * w
        ratio = trust_coefficient * |w| / |g|     (1 if either norm is 0, or adapt is False)
        v <- momentum * v + lr * ratio * g
        w <- w - v

    The decayed gradient enters the norm and the rate is inside the buffer; You et al. 2017, apex's
    LARC and lightly do neither, so their hyper-parameters do not carry over.

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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, w: torch.Tensor, group: dict[str, Any]) -> None:
        """Apply the rule of the class docstring to one parameter."""
        g = w.grad.to(w.dtype) + group["weight_decay"] * w  # pyright: ignore[reportOptionalMemberAccess]
        if group["adapt"]:
            w_norm, g_norm = w.norm(), g.norm()
            ratio = group["trust_coefficient"] * w_norm / g_norm
            g = g * torch.where((w_norm > 0) & (g_norm > 0), ratio, 1.0)
        state = self.state[w]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(w)
        v = state["momentum_buffer"].mul_(group["momentum"]).add_(g, alpha=group["lr"])
        w.sub_(v)
