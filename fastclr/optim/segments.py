"""Where layers lie inside the flat buffers that ZeRO gives to an optimizer.

ZeRO lays the parameters of a group end to end, cuts the result into equal partitions, one a rank,
and hands each rank's optimizer only its own: a layer can begin on one rank and end on the next. The
table read here says which piece of which layer lies where; norms of layers are then sums over ranks
of sums over pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fastclr.config import ConfigError


class Segment(NamedTuple):
    """A piece of a layer inside this rank's part of a buffer.

    Attributes:
        layer: Index of the layer, the same on all ranks.
        start: Place of its first element in the buffer.
        numel: Elements.
    """

    layer: int
    start: int
    numel: int


@dataclass(frozen=True)
class Buffer:
    """A flat fp32 buffer of this rank.

    Attributes:
        flat_P: What the optimizer sees as one parameter.
        segments: Pieces of layers in it, in order; what lies between is padding.
        layer_S: int64 on the buffer's device; the layer of each segment.
    """

    flat_P: torch.Tensor
    segments: list[Segment]
    layer_S: torch.Tensor


@dataclass(frozen=True)
class SegmentTable:
    """All flat buffers of this rank.

    Attributes:
        buffers: By ``id`` of the flat tensor, which the table keeps alive.
        num_layers: Layers over all buffers and ranks.
        group: Ranks that the buffers are partitioned over.
    """

    buffers: dict[int, Buffer]
    num_layers: int
    group: dist.ProcessGroup | None


def read(engine: Any) -> SegmentTable | None:
    """Read the table of a DeepSpeed engine and verify it; every rank calls this.

    Args:
        engine: After ``deepspeed.initialize``.

    Returns:
        None where the optimizer sees the parameters themselves (stage 0 in fp32).

    Raises:
        ConfigError: If the engine wraps the optimizer in a way not known here, or its structures do
            not add up to the layers.
    """
    optimizer = engine.optimizer
    if optimizer is engine.basic_optimizer:
        return None
    kind = type(optimizer).__name__
    if kind not in _READERS:
        raise ConfigError(
            f"LARS does not know DeepSpeed's {kind}: it cannot tell the layers inside its flat "
            f"buffers. Use ZeRO stage 1, 2 or 3, or stage 0 in fp32. {_version()}"
        )
    try:
        found = list(_READERS[kind](optimizer))
    except AttributeError as error:
        raise ConfigError(
            f"DeepSpeed's {kind} has no longer what LARS reads its layers from ({error}). "
            f"{_version()}"
        ) from error
    buffers: dict[int, Buffer] = {}
    sizes: list[int] = []
    for flat_P, parameters, places in found:
        segments = [Segment(len(sizes) + i, *place) for i, place in enumerate(places) if place]
        layer_S = torch.tensor([s.layer for s in segments], dtype=torch.long, device=flat_P.device)
        buffers[id(flat_P)] = Buffer(flat_P, segments, layer_S)
        sizes += [getattr(p, "ds_numel", p.numel()) for p in parameters]
    table = SegmentTable(buffers, len(sizes), optimizer.dp_process_group)
    _verify(table, sizes)
    return table


Place = tuple[int, int] | None
Found = tuple[torch.Tensor, list[torch.Tensor], list[Place]]


def _stages_1_and_2(optimizer: Any) -> Iterator[Found]:
    """Read DeepSpeedZeroOptimizer."""
    flats, groups = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
    for flat_P, parameters in zip(flats, groups, strict=True):
        yield flat_P, list(parameters), [_fragment(p) for p in parameters]


def _bf16(optimizer: Any) -> Iterator[Found]:
    """Read BF16_Optimizer, which DeepSpeed uses for bf16 at stage 1."""
    flats, groups = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
    for flat_P, parameters in zip(flats, groups, strict=True):
        yield flat_P, list(parameters), [_fragment(p) for p in parameters]


def _fragment(parameter: Any) -> Place:
    """Place of a parameter in this rank's partition; None if it lies on other ranks."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    address = mapping.hp_fragment_address
    return address.start, address.numel


def _stage_3(optimizer: Any) -> Iterator[Found]:
    """Read DeepSpeedZeroOptimizer_Stage3, which cuts every parameter into equal parts.

    The last part is padded with memory that nobody has written: it must not enter a norm.
    """
    rank = dist.get_rank(optimizer.dp_process_group)
    flats, groups = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups
    for flat_P, parameters in zip(flats, groups, strict=True):
        places: list[Place] = []
        for parameter in parameters:
            _, start, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            part = parameter.ds_tensor.numel()
            filled = min(part, parameter.ds_numel - rank * part)
            places.append((start, filled) if filled > 0 else None)
        yield flat_P, list(parameters), places


_READERS: dict[str, Callable[[Any], Iterator[Found]]] = {
    "DeepSpeedZeroOptimizer": _stages_1_and_2,
    "BF16_Optimizer": _bf16,
    "DeepSpeedZeroOptimizer_Stage3": _stage_3,
}


def _verify(table: SegmentTable, sizes: list[int]) -> None:
    """Check that segments do not overlap and add up to the layers over all ranks."""
    device = next(iter(table.buffers.values())).flat_P.device
    covered_L = torch.zeros(len(sizes), dtype=torch.long, device=device)
    for buffer in table.buffers.values():
        end = 0
        for segment in sorted(buffer.segments, key=lambda s: s.start):
            if segment.start < end or segment.start + segment.numel > buffer.flat_P.numel():
                raise ConfigError(
                    f"layer {segment.layer} lies at {segment.start} in a buffer of "
                    f"{buffer.flat_P.numel()} elements whose last layer ends at {end}: LARS reads "
                    f"DeepSpeed's buffers wrongly. {_version()}"
                )
            end = segment.start + segment.numel
            covered_L[segment.layer] += segment.numel
    dist.all_reduce(covered_L, group=table.group)
    for layer, (covered, size) in enumerate(zip(covered_L.tolist(), sizes, strict=True)):
        if covered != size:
            raise ConfigError(
                f"layer {layer} has {size} elements, the ranks hold {covered} of it: LARS reads "
                f"DeepSpeed's buffers wrongly. {_version()}"
            )


def _version() -> str:
    """Say which DeepSpeed this is, and which is known to fit."""
    import deepspeed

    return f"This is DeepSpeed {deepspeed.__version__}; 0.19.8 is known to fit."
