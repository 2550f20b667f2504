"""A trainer seen from outside: its stages on a timeline, its steps as a plan wants them.

Nothing of the trainer is copied or changed: its methods, the engine's and the model's hooks are
wrapped on the one object that is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from fastclr.batch import Batch
from fastclr.trainer import Trainer
from pipelines.loader import Loader
from throughput_parts.marks import Marks

WAIT = "next batch"
TO_DEVICE, INPUT = "host to device", "input to float"
ENCODER, HEAD, LOSS = "encoder forward", "head forward", "loss forward"
LOSS_BACK, HEAD_BACK, ENCODER_BACK = "loss backward", "head backward", "encoder backward"
MODEL, MODEL_BACK = "encoder and head forward", "encoder and head backward"  # compiled
ENGINE, OPTIMIZER, FINITE = "DeepSpeed", "optimizer", "finite check"
TRAINER, SIGNALS, LOGGING, LEDGER = "trainer", "signals", "logging", "ledger"
COMMUNICATION = "communication: "
# What a collective is for, by the stage that calls it.
PURPOSES = {
    ENCODER: "BatchNorm", ENCODER_BACK: "BatchNorm", HEAD: "BatchNorm", HEAD_BACK: "BatchNorm",
    MODEL: "BatchNorm", MODEL_BACK: "BatchNorm", LOSS: "projections", LOSS_BACK: "projections",
    ENGINE: "gradients and weights", OPTIMIZER: "norms of layers", FINITE: "finite losses",
    LOGGING: "log rows", SIGNALS: "signals",
}  # fmt: skip
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor",
    "reduce", "broadcast", "all_to_all_single", "barrier", "batch_isend_irecv",
)  # fmt: skip

# Yields what kind each step is and whether its stages are told apart; ends where the run ends.
Plan = Iterator[tuple[str, bool]]


class Source:
    """A loader, or the last of its batches again and again.

    Args:
        loader: What the trainer would be given.
        marks: Timeline.

    Attributes:
        is_resident: Whether the last batch is given again, so that nothing loads beside the step.
    """

    def __init__(self, loader: Loader, marks: Marks) -> None:
        self._loader, self._marks = loader, marks
        self.is_resident = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end."""
        batches = iter(self._loader)
        batch: Batch | None = None
        while True:
            if batch is None or not self.is_resident:
                with self._marks.during(WAIT):
                    batch = next(batches)
            yield batch


def observe(trainer: Trainer, marks: Marks, plan: Plan, save: Callable[..., None]) -> None:
    """Let a trainer's next ``fit`` follow a plan and leave its stages on the timeline.

    Args:
        trainer: Not yet started; its length is given up for the plan's.
        marks: Gets a lap for each step.
        plan: Asked at the beginning of each step; where it ends one more step, ``last``, is taken.
        save: Called in the place of the trainer's saving, with the trainer's and its arguments.
    """
    start_engine, next_batch = trainer._start_engine, trainer._next
    step_or_skip, save_really, loop = trainer._step_or_skip, trainer._save, trainer._loop
    finite = trainer._finite

    def start(loader: Any) -> None:
        start_engine(loader)
        _watch_engine(trainer, marks)

    def loop_marked(*args: Any) -> None:
        ledger = trainer._ledger
        ledger.add = marks.within(LEDGER, ledger.add)
        ledger.write = marks.within(LEDGER, ledger.write)
        loop(*args)

    def next_(batches: Iterator[Batch]) -> Batch | None:
        kind, is_on = next(plan, ("last", False))
        if kind == "last":
            trainer.total_steps = trainer.step + 1
        marks.lap(kind, is_on)
        with marks.during(SIGNALS):
            return next_batch(batches)

    def step(batch: Batch, statistics: dict[str, torch.Tensor] | None) -> torch.Tensor | None:
        loss = step_or_skip(batch, statistics)
        if statistics is not None:
            marks.switch(LOGGING)  # until the next batch is asked for
        return loss

    trainer._start_engine, trainer._loop = start, loop_marked
    trainer._next, trainer._step_or_skip = next_, step
    trainer._save = lambda *args: save(save_really, *args)
    trainer.train_step = marks.within(TO_DEVICE, trainer.train_step)
    finite.watch = marks.within(FINITE, finite.watch)
    finite.check = marks.within(FINITE, finite.check)


def _watch_engine(trainer: Trainer, marks: Marks) -> None:
    """Mark what engine, model, loss and optimizer do."""
    engine, model = trainer.engine, trainer.model
    backward = _Backward(marks)

    def enter_engine(*_: Any) -> None:
        if marks.stage == TO_DEVICE:  # it went over in the lines before the first forward
            marks.switch(TRAINER)
        marks.push(ENGINE)

    engine.register_forward_pre_hook(enter_engine)
    engine.register_forward_hook(lambda *_: marks.pop())
    engine.backward = marks.within(ENGINE, engine.backward)
    engine.step = marks.within(ENGINE, engine.step)
    is_compiled = model.encoder._compiled_call_impl is not None
    # Hooks inside a compiled module would become part of its program: its outside is marked alone.
    model.register_forward_pre_hook(lambda *_: marks.push(MODEL if is_compiled else INPUT))
    model.register_forward_hook(lambda *_: marks.pop())
    if is_compiled:
        model.register_forward_hook(lambda _m, _i, out: backward.at(out.z_ND, MODEL_BACK))
    else:
        _mark_module(model.encoder, marks, ENCODER, backward, ENCODER_BACK)
        _mark_module(model.projection_head, marks, HEAD, backward, HEAD_BACK)
    _mark_module(trainer.loss, marks, LOSS, backward, LOSS_BACK)
    optimizer = engine.basic_optimizer
    optimizer.register_step_pre_hook(lambda *_: marks.push(OPTIMIZER))
    optimizer.register_step_post_hook(lambda *_: marks.pop())


def _mark_module(
    module: torch.nn.Module, marks: Marks, stage: str, backward: _Backward, back: str
) -> None:
    """Mark a module's forward, and the moment its backward begins: its output has a gradient."""
    module.register_forward_pre_hook(lambda *_: marks.push(stage))

    def done(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        marks.pop()
        backward.at(output, back)

    module.register_forward_hook(done)


class _Backward:
    """Cuts a backward pass into stages at the gradients of tensors."""

    def __init__(self, marks: Marks) -> None:
        self._marks, self._is_inside = marks, False

    def at(self, tensor: torch.Tensor, stage: str) -> None:
        """Begin a stage when a tensor's gradient is there."""
        if tensor.requires_grad:
            tensor.register_hook(lambda _: self._enter(stage))

    def _enter(self, stage: str) -> None:
        if self._is_inside:
            self._marks.switch(stage)
            return
        self._is_inside = True
        self._marks.push(stage, traced=False)  # ranges may not end in another thread
        # Called when the graph is done; DDP and DeepSpeed wait for a backward pass in this way.
        torch.autograd.Variable._execution_engine.queue_callback(self._leave)

    def _leave(self) -> None:
        self._is_inside = False
        self._marks.pop()


@contextmanager
def collectives_marked(marks: Marks) -> Iterator[None]:
    """Make every collective a stage, named by what it is for.

    One that runs beside the computation counts where it is waited for.
    """
    plain = {name: getattr(dist, name) for name in COLLECTIVES}

    def marked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if marks.stage.startswith(COMMUNICATION):
                return function(*args, **kwargs)
            purpose = PURPOSES.get(marks.stage, "other")
            with marks.during(COMMUNICATION + purpose):
                return function(*args, **kwargs)

        return call

    for name, function in plain.items():
        setattr(dist, name, marked(function))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)
