"""Whether all ranks still have the same weights: a flipped bit on one is found, and not saved.

Data-parallel ranks begin equal and take the same steps. A bit that memory or a link turned on one
rank stays there unnoticed, and every gradient is wrong from then on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from fastclr.digests import digest
from fastclr.world import World


class RanksDiffer(FloatingPointError):
    """A tensor that must be equal on all ranks is not; nothing of it may be saved."""


def replicas(engine: Any, has_local_statistics: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and tensors that every rank holds whole, and equal.

    Weights below ZeRO stage 3; the optimizer's state without ZeRO; buffers, unless BatchNorm's
    statistics are each rank's own.

    Args:
        engine: DeepSpeed's engine.
        has_local_statistics: Whether buffers may differ.
    """
    module, stage = engine.module, engine.zero_optimization_stage()
    if stage < 3:
        yield from module.named_parameters()
    if not has_local_statistics:
        yield from module.named_buffers()
    if stage == 0:
        names = {parameter: name for name, parameter in module.named_parameters()}
        state: Mapping[Any, Mapping[str, Any]] = engine.optimizer.state
        for parameter, entries in state.items():
            for key, value in entries.items():
                if parameter in names and isinstance(value, torch.Tensor) and value.numel():
                    yield f"{key} of {names[parameter]}", value


def check(engine: Any, step: int, world: World, *, has_local_statistics: bool) -> None:
    """Compare all ranks' copies; every rank calls this. Waits for the device.

    Args:
        engine: DeepSpeed's engine.
        step: Steps taken, for the message.
        world: Which rank of how many.
        has_local_statistics: See :func:`replicas`.

    Raises:
        RanksDiffer: On every rank, if a copy differs in a bit; names the first tensor and the ranks
            whose copy is not that of most (of two ranks nobody knows which is right).
    """
    named = list(replicas(engine, has_local_statistics)) if world.num_ranks > 1 else []
    if not named:  # stage 3 without buffers: nobody has a copy of another's
        return
    digest_T = torch.stack([digest(tensor) for _, tensor in named])
    gathered = [torch.empty_like(digest_T) for _ in range(world.num_ranks)]
    dist.all_gather(gathered, digest_T)
    digest_RT = torch.stack(gathered)
    if (digest_RT == digest_RT[0]).all():
        return
    columns = (digest_RT != digest_RT[0]).any(0).nonzero().flatten().tolist()
    copies = digest_RT[:, columns[0]].tolist()
    most, count = Counter(copies).most_common(1)[0]
    wrong = [rank for rank, copy in enumerate(copies) if copy != most]
    which = f"rank {', '.join(map(str, wrong))} has another copy than the others"
    if 2 * count <= len(copies):
        which = f"ranks 0 to {len(copies) - 1} have different copies"
    raise RanksDiffer(
        f"{which} of {named[columns[0]][0]} after step {step} ({len(columns)} of {len(named)} "
        "tensors differ): a bit was turned in memory or on the way, or the ranks compute "
        "differently. Nothing of it is saved; start the same command again to go on from the last "
        "checkpoint, without that machine if it happens again."
    )
