"""Verifies sound and broken builds on every rank; started once a number of ranks."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine

from fastclr import agreement, batch_norm, checkpointing, collectives, trainer, verify
from fastclr.kernels import reference
from fastclr.kernels.tiles import Keys
from fastclr.losses import NTXent, contrastive, gradient_cache
from fastclr.optim import lars
from fastclr.verify import checks, data_checks, resume_check
from fastclr.verify.data import Images
from pipelines import augment_kornia
from pipelines.backends import BACKENDS, ViewByView
from pipelines.policy import SimCLRPolicy

PATIENCE, LITTLE = 60.0, 4.0  # seconds
STAGE = {stage: {"zero_optimization": {"stage": stage}} for stage in range(4)}
SHARE = batch_norm.share_statistics
nt_xent = sys.modules[NTXent.__module__]  # the function of that name hides the module

SOUND: dict[str, dict[str, Any]] = {
    "fp32": STAGE[0],
    "stage 3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "accumulation 4": {
        **STAGE[2],
        "gradient_accumulation_steps": 4,
        "train_micro_batch_size_per_gpu": 64,
        "gradient_clipping": 0.5,
    },
    "bf16": {**STAGE[1], "bf16": {"enabled": True}},
    "fp16": {**STAGE[2], "fp16": {"enabled": True}},
    "AdamW": {
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3, "warmup_max_lr": 0.02}},
    },
    "LARS of You": {
        **STAGE[1],
        "optimizer": {
            "type": "LARS",
            "params": {
                "lr": 2.0,
                "weight_decay": 0.01,
                "momentum": 0.8,
                "denominator": "sum_of_norms",
                "rate_inside_momentum": False,
            },
        },
    },
    # Last: DeepSpeed remembers that an engine of this process had autocast.
    "autocast": {**STAGE[0], "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}

ON_ONE_RANK = ("fp32", "accumulation 4", "bf16")

# Deliberate errors make ranks differ, which is to be found by what is compared here.
agreement.check = lambda *_, **__: None


def gathered_without_gradient(z0_BD, z1_BD, loss, dense, **options):
    """NT-Xent as libraries have it whose all-gather passes no gradient on."""
    if options.get("exchange") == "ring":
        return contrastive.contrastive_loss(z0_BD, z1_BD, loss, dense, **options)
    z_ND = F.normalize(torch.cat([z0_BD, z1_BD]).float()) * options["temperature"] ** -0.5
    group = options.get("group")
    size, own = collectives.num_ranks(group), collectives.rank(group)
    parts = list(collectives.all_gather(z_ND.detach(), [len(z_ND)] * size, group).chunk(size))
    parts[own] = z_ND
    if options.get("statistics") is not None:
        options["statistics"]["contrastive_accuracy"] = torch.zeros(())
    return reference.nt_xent(z_ND, Keys(torch.cat(parts), [len(z0_BD)] * size, own)).mean()


def loss_by(function):
    """Compute NT-Xent otherwise."""
    return mock.patch.object(nt_xent, "contrastive_loss", function)


def weighted(factors):
    """Make ranks count for other parts of the mean than 1 / R."""

    def loss(*args, **options):
        alone = collectives.num_ranks(options.get("group")) == 1
        factor = 1 if alone else factors(dist.get_rank())
        return contrastive.contrastive_loss(*args, **options) * factor

    return loss_by(loss)


def order_of(change):
    """Change what the ranks after the first are given."""
    original = Images.order

    def order(self, seed):
        found = original(self, seed)
        if dist.get_rank():
            change(found)
        return found

    return mock.patch.object(Images, "order", order)


def without_its_first(order):
    """Let the first id that is asked for of an epoch be its neighbour's, also after a resume."""
    original, begun = order.ids, set()

    def ids(epoch, start, stop):
        found = original(epoch, start, stop).copy()
        if epoch not in begun:
            found[0] = found[1]
        begun.add(epoch)
        return found

    order.ids = ids


def one_batch_fewer(order):
    """Let epochs end early."""
    order.num_positions -= data_checks.BATCH * dist.get_world_size()


def drawn_by(change):
    """Change what the numbers of a view are drawn from."""
    original = SimCLRPolicy.draw

    def draw(self, **coordinates):
        return original(self, **{**coordinates, **change(coordinates)})

    return mock.patch.object(SimCLRPolicy, "draw", draw)


@contextmanager
def momenta_times(factor) -> Iterator[None]:
    """Go on from a checkpoint with other momenta of LARS."""
    original = checkpointing.load

    def load(engine, checkpoint, lars=None, probe=None):
        facts = original(engine, checkpoint, lars, probe)
        for state in lars.state.values():
            state["momentum_buffer"].mul_(factor)
        return facts

    with mock.patch.object(checkpointing, "load", load):
        yield


def without_checkpoints():
    """Lose what the first run saved."""
    original = resume_check._train

    def train(case, run_dir, seed):
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        dist.barrier()
        return original(case, run_dir, seed)

    return mock.patch.object(resume_check, "_train", train)


def everywhere(function, other):
    """Replace a function of ours in all modules that have taken it."""
    ours = [module for name, module in sys.modules.items() if name.startswith("fastclr.")]
    places = [(m, name) for m in ours for name, value in vars(m).items() if value is function]
    return together(*(mock.patch.object(module, name, other) for module, name in places))


def shared_as(function):
    """Replace what makes BatchNorm one over all ranks."""
    return everywhere(SHARE, function)


@contextmanager
def together(*patches) -> Iterator[None]:
    """Enter several patches."""
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def with_another_eps(module, device=None):
    """Share statistics, and add ten times as much to the variance."""
    for norm in module.modules():
        if hasattr(norm, "eps"):
            norm.eps *= 10
    return SHARE(module, device)


def in_bfloat16(z0_BD, z1_BD, *args, **options):
    """Round the projections."""
    rounded = (z.bfloat16().to(z.dtype) for z in (z0_BD, z1_BD))
    return contrastive.contrastive_loss(*rounded, *args, **options)


def no_number(*args, **options):
    """Lose the loss and its gradient, on ranks after the first."""
    value = contrastive.contrastive_loss(*args, **options)
    return value * torch.nan if dist.get_rank() else value


def contrasts_within_chunks(module, project, chunks, loss, backward):
    """Accumulate as if each micro-batch were all there is."""
    for chunk in chunks:
        value = loss(*project(chunk).chunk(2))
        backward(value / len(chunks))
    return value.detach()


def without_new_weights():
    """Step, and leave the model with its old weights."""
    original = trainer.Trainer.train_step

    def train_step(self, *args, **options):
        old = [p.detach().clone() for p in self.model.parameters()]
        loss = original(self, *args, **options)
        for parameter, before in zip(self.model.parameters(), old, strict=True):
            parameter.data.copy_(before)
        return loss

    return mock.patch.object(trainer.Trainer, "train_step", train_step)


def failing(name):
    """Let the last rank break in a check."""
    check = checks.CHECKS[name]

    def measure(case):
        if case.world.rank == case.world.num_ranks - 1:
            raise OSError("no such device")
        return check.measure(case)

    return mock.patch.dict(checks.CHECKS, {name: replace(check, measure=measure)})


def another_pixel(change):
    """Change what the fast back-end makes of images of 32 pixels a side, all or a few of them."""

    def backend(policies, device, num_threads):
        augment = augment_kornia.augment

        def changed(images, params, policy, device):
            views = augment(images, params, policy, device)
            return change(views) if policy.size == 32 else views

        return ViewByView(changed, policies, device)

    return mock.patch.dict(BACKENDS, kornia=backend)


def one_far_off(views):
    """Turn one number of one image round."""
    views = views.clone()
    views[0, 0, 0, 0] += 128
    return views


def only(*names):
    """Leave out other checks."""
    kept = {name: checks.CHECKS[name] for name in names}
    return mock.patch.dict(checks.CHECKS, kept, clear=True)


class Like:
    """A module with another function in place of one."""

    def __init__(self, module, **other):
        self._module, self._other = module, other

    def __getattr__(self, name):
        return self._other[name] if name in self._other else getattr(self._module, name)


def fp16_supported(answer):
    """Let DeepSpeed think that this processor has half precision, or has not."""
    return mock.patch.object(get_accelerator(), "is_fp16_supported", lambda: answer)


LAST = "an error in loss"  # it leaves the ranks out of step
BROKEN = {
    "gather without gradient": (STAGE[0], lambda: loss_by(gathered_without_gradient)),
    "ranks weighted unequally": (STAGE[0], lambda: weighted(lambda rank: 0.5 + rank)),
    "loss summed over ranks": (
        STAGE[0],
        lambda: together(only("loss", "engine"), weighted(lambda rank: dist.get_world_size())),
    ),
    "projections rounded": (
        STAGE[0],
        lambda: together(only("loss", "engine"), loss_by(in_bfloat16)),
    ),
    "no number": (STAGE[0], lambda: together(only("loss"), loss_by(no_number))),
    "mask without offset": (
        STAGE[0],
        lambda: mock.patch.object(
            contrastive, "collectives", Like(collectives, rank=lambda group=None: 0)
        ),
    ),
    "ratios of partitions": (
        STAGE[1],
        lambda: mock.patch.object(lars, "_sum_over_ranks", lambda table, flats, sums: sums),
    ),
    "weights that stay": (STAGE[1], without_new_weights),
    "local BatchNorm": (STAGE[0], lambda: shared_as(lambda module, device=None: module)),
    "BatchNorm's eps": (STAGE[0], lambda: shared_as(with_another_eps)),
    "chunks alone": (
        {"gradient_accumulation_steps": 2},
        lambda: everywhere(gradient_cache, contrasts_within_chunks),
    ),
    "an id twice": (STAGE[0], lambda: order_of(without_its_first)),
    "a batch fewer": (STAGE[0], lambda: together(only("order"), order_of(one_batch_fewer))),
    "views by rank": (
        STAGE[0],
        lambda: drawn_by(lambda at: {"seed": at["seed"] + dist.get_rank()}),
    ),
    "views by place": (
        STAGE[0],
        lambda: drawn_by(lambda at: {"positions": range(len(at["positions"]))}),
    ),
    "a level off": (STAGE[0], lambda: together(only("views"), another_pixel(lambda x: x ^ 1))),
    "a pixel off": (STAGE[0], lambda: together(only("views"), another_pixel(one_far_off))),
    "forgotten momentum": (STAGE[0], lambda: momenta_times(0)),
    "momentum a millionth off": (
        SOUND["bf16"],  # whose own weights are too coarse to tell
        lambda: together(only("resume"), momenta_times(1 + 1e-6)),
    ),
    "a run that starts over": (
        STAGE[0],
        lambda: together(only("resume"), without_checkpoints()),
    ),
    "dropout by a generator": (
        STAGE[0],
        lambda: together(
            only("resume"),
            mock.patch.object(trainer, "torch", Like(torch, manual_seed=lambda seed: None)),
        ),
    ),
    "clipping unasked": (
        STAGE[0],
        lambda: together(
            only("resume"),
            mock.patch.object(DeepSpeedEngine, "gradient_clipping", lambda self: 1.0),
        ),
    ),
    "an error in order": (STAGE[0], lambda: failing("order")),
    "no fp16 here": ({**STAGE[1], "fp16": {"enabled": True}}, lambda: fp16_supported(False)),
    LAST: (STAGE[0], lambda: failing("loss")),
}


def measure(folder: Path) -> dict[str, Any]:
    """Verify everything."""
    found: dict[str, Any] = {}

    def note(name: str, ds: dict[str, Any]) -> None:
        patience = PATIENCE
        if name == LAST:
            patience = LITTLE
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=patience), dist.group.WORLD)
        if name == "AdamW":  # a monitor would write into what is to be left empty
            block = {"enabled": True, "output_path": str(folder), "job_name": "csv"}
            ds = {**ds, "csv_monitor": block}
        started = time.perf_counter()
        rows = verify.verify(ds, scratch=folder, patience_seconds=patience)
        seconds = time.perf_counter() - started
        found[name] = {
            "rows": [asdict(row) for row in rows],
            "seconds": seconds,
            "threads": torch.get_num_threads(),
            "left": [str(path) for path in folder.iterdir()] if dist.get_rank() == 0 else [],
        }
        # Its interpreter takes five seconds for the views of a build: the first's are enough.
        BACKENDS.pop("triton", None)

    many = dist.get_world_size() > 1
    for name, ds in SOUND.items():
        # DeepSpeed refuses fp16 on most CPUs, which torch has learnt meanwhile.
        if many or name in ON_ONE_RANK:
            with fp16_supported(True) if name == "fp16" else nullcontext():
                note(name, ds)
    if many:
        for name, (ds, sabotage) in BROKEN.items():
            with sabotage():
                note(name, ds)
    return found


def main(rendezvous: str, result: str) -> None:
    """Verify everything; rank 0 writes."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=PATIENCE),
    )
    torch.set_num_threads(2)  # to see that it is set back
    found = measure(Path(result).parent / "scratch")
    if rank == 0:
        Path(result).write_text(json.dumps(found))
    os._exit(0)  # the last sabotage leaves a process group that cannot end in order


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
