"""Weights and momenta by the names of layers: what survives a change of stage and of ranks.

DeepSpeed's universal checkpoints know the two moments of Adam and no other state (0.19.8,
``ds_to_universal.py``), so LARS collects its layers whole and hands each rank its pieces back.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
import torch.distributed as dist

from fastclr.config import ConfigError
from fastclr.optim.segments import Segment, SegmentTable, numel

WEIGHT, MOMENTUM = "weight", "momentum_buffer"
State = MutableMapping[Any, dict[str, Any]]  # of an optimizer, by tensor


def gather(table: SegmentTable, state: State) -> dict[str, torch.Tensor]:
    """Collect whole layers on rank 0; every rank calls this.

    Returns:
        On rank 0 the fp32 weights ``weight/NAME`` and momenta ``momentum_buffer/NAME``, on the CPU;
        elsewhere nothing.
    """
    found: dict[str, torch.Tensor] = {}
    for kind, sources in (_sources(table, state)).items():
        for layer, name in enumerate(table.names):
            pieces = [(t, s) for t, s in sources if s.layer == layer]
            dtype = torch.float32 if table.partitioned else pieces[0][0].dtype
            size = numel(table.parameters[layer])
            whole = torch.zeros(size, dtype=dtype, device=table.device)
            for tensor, segment in pieces:
                whole.narrow(0, segment.offset, segment.numel).copy_(_read(tensor, segment))
            if table.partitioned:
                dist.all_reduce(whole, group=table.group)
            if not dist.is_initialized() or dist.get_rank() == 0:
                found[f"{kind}/{name}"] = whole.view(_shape(table.parameters[layer])).cpu()
    return found


def scatter(table: SegmentTable, state: State, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give this rank its pieces of what :func:`gather` returned; the model's copies follow.

    Raises:
        ConfigError: If a layer is missing or has another shape.
    """
    for kind in (WEIGHT, MOMENTUM):
        for name, parameter in zip(table.names, table.parameters, strict=True):
            found = tensors.get(f"{kind}/{name}")
            if found is None or found.shape != _shape(parameter):
                has = "nothing" if found is None else f"shape {tuple(found.shape)}"
                raise ConfigError(
                    f"{kind}/{name} of the checkpoint has {has}, the model "
                    f"{tuple(_shape(parameter))}: it was saved from another model. Build the one "
                    "it was saved from."
                )
    for kind, sources in (_sources(table, state)).items():
        for tensor, segment in sources:
            whole = tensors[f"{kind}/{table.names[segment.layer]}"].flatten()
            part = whole.narrow(0, segment.offset, segment.numel)
            _write(tensor, segment, part)
            if kind == WEIGHT and hasattr(table.parameters[segment.layer], "ds_tensor"):
                sharded: Any = table.parameters[segment.layer]
                sharded.ds_tensor.data.view(-1).narrow(0, 0, segment.numel).copy_(part)
    for name, parameter in zip(table.names, table.parameters, strict=True):
        if parameter.numel() == numel(parameter):  # not one that stage 3 has emptied
            parameter.data.copy_(tensors[f"{WEIGHT}/{name}"])


def _sources(table: SegmentTable, state: State) -> dict[str, list[tuple[torch.Tensor, Segment]]]:
    """List this rank's pieces of weights and momenta."""
    sources: dict[str, list[tuple[torch.Tensor, Segment]]] = {WEIGHT: [], MOMENTUM: []}
    for buffer in table.buffers.values():
        own = state[buffer.tensor]
        if MOMENTUM not in own:
            own[MOMENTUM] = torch.zeros_like(buffer.tensor)
        sources[WEIGHT] += [(buffer.tensor, segment) for segment in buffer.segments]
        sources[MOMENTUM] += [(own[MOMENTUM], segment) for segment in buffer.segments]
    return sources


def _read(tensor: torch.Tensor, segment: Segment) -> torch.Tensor:
    """Return the elements of a piece, in the layer's order whatever that in memory."""
    return tensor.detach().reshape(-1).narrow(0, segment.start, segment.numel)


def _write(tensor: torch.Tensor, segment: Segment, part: torch.Tensor) -> None:
    """Set the elements of a piece."""
    if tensor.is_contiguous():
        tensor.detach().view(-1).narrow(0, segment.start, segment.numel).copy_(part)
    else:  # channels-last: a whole layer
        tensor.detach().copy_(part.view(tensor.shape))


def _shape(parameter: Any) -> torch.Size:
    """Return the shape of a whole layer."""
    return getattr(parameter, "ds_shape", parameter.shape)
