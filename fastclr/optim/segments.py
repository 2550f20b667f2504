"""Where layers lie inside the buffers that DeepSpeed gives to an optimizer.

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
        offset: Place of its first element in the layer.
    """

    layer: int
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class Buffer:
    """A tensor that the engine hands to the optimizer as one parameter of this rank.

    Attributes:
        tensor: Flat and cut across layers, or one whole layer; fp32.
        segments: Pieces of layers in it, in order; what lies between is padding.
        layer_S: int64 on the buffer's device; the layer of each segment.
    """

    tensor: torch.Tensor
    segments: list[Segment]
    layer_S: torch.Tensor


@dataclass(frozen=True)
class SegmentTable:
    """All buffers of this rank.

    Attributes:
        buffers: By ``id`` of the tensor, which the table keeps alive.
        parameters: The model's parameter of each layer, over all buffers and ranks.
        names: The model's name of each layer.
        partitioned: Whether each rank holds a part; else each holds all.
        group: Ranks that share the layers.
        device: Where collectives of the group work.
    """

    buffers: dict[int, Buffer]
    parameters: list[torch.nn.Parameter]
    names: list[str]
    partitioned: bool
    group: dist.ProcessGroup | None
    device: torch.device


def read(engine: Any) -> SegmentTable:
    """Read the table of a DeepSpeed engine and verify it; every rank calls this.

    Args:
        engine: After ``deepspeed.initialize``.

    Raises:
        ConfigError: If the engine wraps the optimizer in a way not known here, or its structures do
            not add up to the layers.
    """
    optimizer = engine.optimizer
    plain = optimizer is engine.basic_optimizer
    kind = "none" if plain else type(optimizer).__name__
    if kind not in _READERS:
        raise ConfigError(
            f"LARS does not know DeepSpeed's {kind}: it cannot tell the layers inside its flat "
            f"buffers. Use ZeRO stage 0, 1, 2 or 3 without wrappers of other makers. {_version()}"
        )
    partitioned = kind in _PARTITIONED
    try:
        found = list(_READERS[kind](optimizer))
        group = optimizer.dp_process_group if partitioned else None
    except AttributeError as error:
        raise ConfigError(
            f"DeepSpeed's {kind} has no longer what LARS reads its layers from ({error}). "
            f"{_version()}"
        ) from error
    buffers: dict[int, Buffer] = {}
    parameters: list[torch.nn.Parameter] = []
    for tensor, held, places in found:
        segments = [Segment(len(parameters) + i, *place) for i, place in enumerate(places) if place]
        layer_S = torch.tensor([s.layer for s in segments], dtype=torch.long, device=tensor.device)
        buffers[id(tensor)] = Buffer(tensor, segments, layer_S)
        parameters += held
    name_of = {id(p): name for name, p in engine.module.named_parameters()}
    names = [name_of[id(p)] for p in parameters]
    table = SegmentTable(buffers, parameters, names, partitioned, group, engine.device)
    _verify(table)
    return table


Place = tuple[int, int, int] | None  # start in the buffer, elements, offset in the layer
Found = tuple[torch.Tensor, list[torch.nn.Parameter], list[Place]]


def _plain(optimizer: Any) -> Iterator[Found]:
    """Read the optimizer itself, which holds the model's parameters (stage 0, fp32)."""
    for group in optimizer.param_groups:
        yield from (_whole(p, p) for p in group["params"])


def _unfused(optimizer: Any) -> Iterator[Found]:
    """Read FP16_UnfusedOptimizer, which DeepSpeed uses for bf16 at stage 0."""
    if optimizer.low_precision_dtype == torch.float16:
        raise ConfigError(
            "fp16 at ZeRO stage 0: DeepSpeed 0.19.8 divides the gradients by a loss scale that it "
            "has not multiplied the loss by (its pull request 8393), so every optimizer steps "
            f"wrongly. Use stage 1, 2 or 3, or bf16. {_version()}"
        )
    for copies, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
        yield from map(_whole, copies, parameters)


def _whole(tensor: torch.Tensor, parameter: torch.nn.Parameter) -> Found:
    """Describe a tensor that is one layer."""
    return tensor, [parameter], [(0, parameter.numel(), 0)]


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
    place = mapping.hp_fragment_address
    return place.start, place.numel, mapping.lp_fragment_address.start


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
            places.append((start, filled, rank * part) if filled > 0 else None)
        yield flat_P, list(parameters), places


_READERS: dict[str, Callable[[Any], Iterator[Found]]] = {
    "none": _plain,
    "FP16_UnfusedOptimizer": _unfused,
    "DeepSpeedZeroOptimizer": _stages_1_and_2,
    "BF16_Optimizer": _bf16,
    "DeepSpeedZeroOptimizer_Stage3": _stage_3,
}
_PARTITIONED = ("DeepSpeedZeroOptimizer", "BF16_Optimizer", "DeepSpeedZeroOptimizer_Stage3")


def numel(parameter: Any) -> int:
    """Elements of a whole layer, also where stage 3 has emptied the parameter."""
    return getattr(parameter, "ds_numel", parameter.numel())


def _verify(table: SegmentTable) -> None:
    """Check that segments do not overlap and add up to the layers over all ranks."""
    covered_L = torch.zeros(len(table.parameters), dtype=torch.long)
    for buffer in table.buffers.values():
        end = 0
        for segment in sorted(buffer.segments, key=lambda s: s.start):
            if segment.start < end or segment.start + segment.numel > buffer.tensor.numel():
                raise ConfigError(
                    f"layer {table.names[segment.layer]} lies at {segment.start} in a buffer of "
                    f"{buffer.tensor.numel()} elements whose last layer ends at {end}: LARS reads "
                    f"DeepSpeed's buffers wrongly. {_version()}"
                )
            end = segment.start + segment.numel
            covered_L[segment.layer] += segment.numel
    if table.partitioned:
        covered_L = covered_L.to(table.device)
        dist.all_reduce(covered_L, group=table.group)
    for layer, covered in enumerate(covered_L.tolist()):
        if covered != (size := numel(table.parameters[layer])):
            raise ConfigError(
                f"layer {table.names[layer]} has {size} elements, the ranks hold {covered} of it: "
                f"LARS reads DeepSpeed's buffers wrongly. {_version()}"
            )


def _version() -> str:
    """Say which DeepSpeed this is, and which is known to fit."""
    import deepspeed

    return f"This is DeepSpeed {deepspeed.__version__}; 0.19.8 is known to fit."
