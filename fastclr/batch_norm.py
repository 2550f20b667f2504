"""BatchNorm over the rows of all ranks, on any device; and a model without any.

SimCLR needs global statistics: those of one rank tell which rows belong together, and the model
learns that leak instead of the images (Chen et al. 2020, section 2.2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastclr import collectives


class _Normalize(torch.autograd.Function):
    """Normalise each channel by the statistics of all ranks' rows, with their exact gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_C: torch.Tensor | None,
        bias_C: torch.Tensor | None,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Moments about each rank's own mean, combined as in Chan et al. 1979: plain sums of squares
        # would cancel. C numbers a rank: they travel in float64.
        mean_C, var_C = (moment.double() for moment in _moments(x))
        count_C = torch.full_like(mean_C, x.numel() // x.shape[1])
        mine = torch.stack([count_C, mean_C, var_C * count_C])
        shares = [torch.empty_like(mine) for _ in range(collectives.num_ranks(group))]
        dist.all_gather(shares, mine, group=group)
        count_RC, mean_RC, squares_RC = torch.stack(shares, 1)
        total_C = count_RC.sum(0)
        mean_C = (count_RC * mean_RC).sum(0) / total_C
        squares_C = (squares_RC + count_RC * (mean_RC - mean_C).square()).sum(0)
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean_C, var_C = mean_C.to(dtype), (squares_C / total_C).to(dtype)
        unbiased_C = (squares_C / (total_C - 1)).to(dtype)
        ctx.save_for_backward(x, weight_C, mean_C, var_C, total_C)
        ctx.group, ctx.eps = group, eps
        ctx.bias_dtype = None if bias_C is None else bias_C.dtype
        ctx.mark_non_differentiable(mean_C, unbiased_C)
        return F.batch_norm(x, mean_C, var_C, weight_C, bias_C, eps=eps), mean_C, unbiased_C

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        x, weight_C, mean_C, var_C, total_C = ctx.saved_tensors
        sums_2C = _sums(grad, x, mean_C, var_C, ctx.eps)
        # Of this rank's rows only: the engine averages parameters' gradients over ranks.
        grad_bias_C, grad_weight_C = sums_2C.clone()
        dist.all_reduce(sums_2C, group=ctx.group)
        scale_C = (var_C + ctx.eps).rsqrt()
        factor_C = scale_C if weight_C is None else scale_C * weight_C
        offset_C, slope_C = -factor_C * sums_2C / total_C.to(sums_2C.dtype)
        # What the statistics pass on is an affine function of the normalised rows.
        wide, shape = x.to(mean_C.dtype), [1, -1] + [1] * (x.ndim - 2)
        grad_x = F.batch_norm(wide, mean_C, var_C, slope_C, offset_C, eps=ctx.eps)
        grad_x = grad_x.addcmul_(grad.to(grad_x.dtype), factor_C.view(shape)).to(x.dtype)
        return (
            grad_x,
            None if weight_C is None else grad_weight_C.to(weight_C.dtype),
            None if ctx.bias_dtype is None else grad_bias_C.to(ctx.bias_dtype),
            None,
            None,
        )


def _has_kernels(x: torch.Tensor) -> bool:
    """Whether torch's own kernels for the CPU compute what is needed, in the type of ``x``."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and biased variance (C,) of these rows, at least float32."""
    if _has_kernels(x):  # where channels are last, 25 times faster than var_mean
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = [d for d in range(x.ndim) if d != 1]
    var_C, mean_C = torch.var_mean(wide, dims, correction=0)
    return mean_C, var_C


def _sums(
    grad: torch.Tensor, x: torch.Tensor, mean_C: torch.Tensor, var_C: torch.Tensor, eps: float
) -> torch.Tensor:
    """Return the sums of a gradient, and of it times the normalised rows, (2, C)."""
    if _has_kernels(x):
        _, product_C, plain_C = torch.ops.aten.native_batch_norm_backward(
            grad, x, None, mean_C, var_C, None, None, False, eps, [False, True, True]
        )
        return torch.stack([plain_C, product_C])
    dims = [d for d in range(x.ndim) if d != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)
    wide = grad.to(mean_C.dtype)
    normal = (x.to(mean_C.dtype) - mean_C.view(shape)) * (var_C + eps).rsqrt().view(shape)
    return torch.stack([wide.sum(dims), (wide * normal).sum(dims)])


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm of any number of dimensions with the statistics of all ranks; on any device.

    While training it equals torch's BatchNorm over all ranks' rows in one process: in values, in
    gradients once averaged over ranks, and in running statistics. Every rank calls it equally
    often; ranks may hold unequally many rows, but each at least one.
    """

    group: dist.ProcessGroup | None = None

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"BatchNorm was given shape {tuple(input.shape)}: give (N, C, ...).")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise; in evaluation by the running statistics, like torch's."""
        if self.training and collectives.num_ranks(self.group) > 1:
            self._check_input_dim(input)
            y, *moments = _Normalize.apply(input, self.weight, self.bias, self.eps, self.group)
            self._remember(*moments)
        else:
            y = super().forward(input)
        return _activated(self, y)

    @torch.no_grad()
    def _remember(self, mean_C: torch.Tensor, unbiased_C: torch.Tensor) -> None:
        """Move the running statistics."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(unbiased_C.to(self.running_var.dtype), factor)


class _GroupNorm(nn.GroupNorm):
    """GroupNorm, and then what timm's norm layers do besides."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _activated(self, super().forward(input))


def _activated(norm: nn.Module, y: torch.Tensor) -> torch.Tensor:
    """Apply the dropout and activation that timm's BatchNormAct2d and its like carry."""
    for after in ("drop", "act"):
        y = getattr(norm, after)(y) if hasattr(norm, after) else y
    return y


_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def share_statistics(module: nn.Module, device: torch.device | None = None) -> nn.Module:
    """Make every BatchNorm of a module one over all ranks.

    Where :class:`GlobalBatchNorm` takes over, the class is exchanged and nothing else: parameters,
    buffers and their names stay, and so does the activation that timm's norm layers carry (torch's
    own conversion drops it).

    Args:
        module: Changed in place.
        device: Where it will run. On CUDA torch's SyncBatchNorm is taken, if it does for all.

    Returns:
        The module; another object if it was a BatchNorm itself.

    Raises:
        TypeError: If a BatchNorm computes something else than torch's or timm's.
    """
    norms = [(n, m) for n, m in module.named_modules() if isinstance(m, _BatchNorm)]
    if device is not None and device.type == "cuda" and all(type(m) in _PLAIN for _, m in norms):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, norm in norms:
        _check_known(name, norm)
        norm.__class__ = GlobalBatchNorm
    return module


def has_batch_norm(module: nn.Module) -> bool:
    """Whether there is a BatchNorm in a module."""
    return any(isinstance(m, _BatchNorm) for m in module.modules())


def without_batch_norm(module: nn.Module) -> nn.Module:
    """Put GroupNorm (Wu and He 2018) in the place of every BatchNorm.

    No row's output then depends on another row: nothing leaks from row to row, no rank waits for
    another, gradient caching is exact, and 16 bit works. Names, scales and offsets stay. There are
    as many groups as divide the channels, at most 32.

    Args:
        module: Changed in place; no BatchNorm itself.

    Raises:
        TypeError: If a BatchNorm computes something else than torch's or timm's.
    """
    for parent_name, parent in list(module.named_modules()):
        for name, norm in list(parent.named_children()):
            if not isinstance(norm, _BatchNorm):
                continue
            _check_known(f"{parent_name}.{name}".lstrip("."), norm)
            channels = norm.num_features
            groups = max(g for g in range(1, 33) if channels % g == 0)
            new = _GroupNorm(groups, channels, eps=norm.eps, affine=norm.affine)
            new.weight, new.bias = norm.weight, norm.bias
            for after in ("drop", "act"):
                if hasattr(norm, after):
                    setattr(new, after, getattr(norm, after))
            setattr(parent, name, new)
    return module


def _check_known(name: str, norm: nn.Module) -> None:
    """Raise TypeError for a BatchNorm that does what is not known here."""
    known = type(norm) in (*_PLAIN, GlobalBatchNorm)
    if not known and not (hasattr(norm, "drop") and hasattr(norm, "act")):
        raise TypeError(
            f"{name} is a {type(norm).__name__}: what it computes besides BatchNorm is not "
            "known, so its statistics cannot be shared over ranks, nor can it be replaced. Use "
            "torch's BatchNorm, or train with local statistics."
        )
