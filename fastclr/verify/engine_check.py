"""Two steps of the trainer: the gradients that reach the optimizer, and what LARS does with them.

The engine is looked at where all ZeRO stages and precisions are alike: in the buffers that it gives
to the optimizer, by LARS's own table of which layer lies where. LARS therefore trains here in place
of another optimizer of the JSON: the gradients that an engine hands over are the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from fastclr.batch import Batch
from fastclr.kernels import reference
from fastclr.optim import LARS, layer_state, segments
from fastclr.trainer import Trainer
from fastclr.verify import data
from fastclr.verify.case import Case
from fastclr.verify.loss_checks import dense_loss, rounding
from fastclr.verify.model import OUTPUT_DIM, gradients, make_model, whole
from fastclr.verify.rows import Row, compared, distance, limit_for, worst

NUM_STEPS = 2
Layers = dict[str, torch.Tensor]  # by the model's names


class Watched:
    """Batches for the trainer; before each, and at the end, the engine's state is noted."""

    batches_per_epoch = 1
    wait_seconds = 0.0
    num_views, num_damaged = 2, 0

    def __init__(self, case: Case) -> None:
        self.case, self.micro_batch_size = case, case.images_per_rank
        self.trainer: Trainer | None = None
        self.states: list[Layers] = []  # of LARS, by rank 0; before and after each step
        self.gradients: list[Layers] = []
        self._handed: dict[torch.Tensor, dict[str, Any]] = defaultdict(dict)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; the engine stands when the first is asked for."""
        assert self.trainer and isinstance(self.trainer.optimizer, LARS)
        self.trainer.optimizer.register_step_pre_hook(self._note_gradients)
        for step in range(NUM_STEPS):
            self.look()
            views = data.views(self.case.world.rank, step, self.micro_batch_size)
            nothing = torch.zeros(self.micro_batch_size, dtype=torch.int64)
            yield Batch(views, nothing, nothing).check()

    def look(self) -> None:
        """Note weights and momenta, and the gradients of the step before; every rank."""
        assert self.trainer and isinstance(self.trainer.optimizer, LARS)
        if self.states:
            table = segments.read(self.trainer.engine)
            named = layer_state.gather(table, self._handed)
            self.gradients.append(_part(named, layer_state.MOMENTUM))
            self._handed.clear()
        self.states.append(self.trainer.optimizer.layer_state())

    def _note_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Copy what the engine hands over; under stage 3 it comes in several calls."""
        for group in optimizer.param_groups:
            for buffer in group["params"]:
                if buffer.grad is not None:  # under the name by which layers are gathered
                    self._handed[buffer][layer_state.MOMENTUM] = buffer.grad.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        """Return no position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: this run is never gone on with."""


def measure(case: Case) -> dict[str, Any]:
    """Return weights, momenta and gradients around two steps, whole, from rank 0."""
    watched = Watched(case)
    model = make_model(batch_norm=not no_batch_norm(case))
    optimizer = case.lars(model)
    ds = {k: v for k, v in case.ds.items() if k not in ("optimizer", "scheduler")}
    ds["gradient_clipping"] = 0.0  # it would hide gradients that are all a multiple too large
    watched.trainer = case.trainer(
        model,
        case.scratch / "engine",
        ds,
        optimizer=optimizer,
        warmup_epochs=0,
        schedule="constant",
    )
    watched.trainer.fit(watched, epochs=NUM_STEPS)
    watched.look()
    watched.trainer.engine.destroy()
    found: dict[str, Any] = {}
    for step in range(NUM_STEPS + 1):
        for kind in (layer_state.WEIGHT, layer_state.MOMENTUM):
            found[f"{kind} {step}"] = _lists(_part(watched.states[step], kind))
    for step in range(NUM_STEPS):
        found[f"gradient {step}"] = _lists(watched.gradients[step])
    return found


def no_batch_norm(case: Case) -> str:
    """Return why the JSON allows no BatchNorm; "" if it does."""
    return case.hindrance(make_model(batch_norm=True), Watched(case))


def judge(case: Case, found: list[dict[str, Any]]) -> Iterator[Row]:
    """Compare with one process in float64 that starts from the same weights."""
    seen = {key: _tensors(lists) for key, lists in found[0].items()}
    reason = no_batch_norm(case)
    kinds = ("LayerNorm", "BatchNorm") if reason else ("BatchNorm",)
    for kind in kinds:
        what = f"model with {kind}, every parameter after the engine's averaging"
        if kind == "BatchNorm" and reason:
            yield Row("gradient", what, "not applicable", note=reason)
        else:
            yield _judge_gradients(case, seen, what, batch_norm=not reason)
    if case.uses_lars:
        yield from _judge_lars(case, seen)
    else:
        name = case.config.optimizer.name
        for what in ("trust ratio of each layer", "weights after two steps"):
            note = f"the DeepSpeed JSON trains with {name}"
            yield Row("LARS", what, "not applicable", note=note)


def _judge_gradients(case: Case, seen: dict[str, Layers], what: str, batch_norm: bool) -> Row:
    """Compare the gradients of each step at its weights, a parameter at a time."""

    def model(dtype: torch.dtype, weights: Layers) -> Any:
        made = make_model(batch_norm=batch_norm).to(dtype)
        # The buffers stay as they are made: they matter in evaluation only.
        made.load_state_dict({**dict(made.named_buffers()), **weights})
        return made

    rounded_to = rounding("nt_xent", case.device, OUTPUT_DIM)

    def rounded_loss(*z: torch.Tensor) -> torch.Tensor:
        with torch.autocast(case.device.type, enabled=False):
            return dense_loss("nt_xent", *(x.float() for x in z), rounded_to=rounded_to)

    scale = 2.0**8 if torch.float16 in (case.dtype, case.autocast_dtype) else 1.0
    measured = {}
    for step in range(NUM_STEPS):
        chunks, weights = _chunks(case, step), seen[f"{layer_state.WEIGHT} {step}"]
        exact = model(torch.float64, weights)
        expected = gradients(exact, chunks, lambda *z: dense_loss("nt_xent", *z))
        rounded = model(case.dtype, weights).to(case.device)
        with case.autocast():
            here = [chunk.to(case.device) for chunk in chunks]
            own = gradients(rounded, here, rounded_loss, scale=scale)
        # Of few numbers the error may be small by luck: that of all bounds it from below.
        of_all = distance(whole(own), whole(expected))
        for name, truth in expected.items():
            limit = case.limit_for(max(of_all, distance(own[name], truth)), rounded_to)
            deviation = distance(seen[f"gradient {step}"][name], truth)
            measured[f"{name}, step {step + 1}"] = (deviation, limit)
    return _worst("gradient", what, measured)


def _chunks(case: Case, step: int) -> list[torch.Tensor]:
    """Return the micro-batches of a step over all ranks, whose statistics BatchNorm takes."""
    per_rank = [
        data.views(rank, step, case.images_per_rank).chunk(case.num_chunks, dim=1)
        for rank in range(case.world.num_ranks)
    ]
    return [torch.cat(parts, dim=1) for parts in zip(*per_rank, strict=True)]


def _judge_lars(case: Case, seen: dict[str, Layers]) -> Iterator[Row]:
    """Compare ratios of the first step and weights after both, from the engine's own gradients."""
    weights = [seen[f"{layer_state.WEIGHT} {step}"] for step in range(NUM_STEPS + 1)]
    grads = [seen[f"gradient {step}"] for step in range(NUM_STEPS)]
    exact, alone = (_steps(case, weights[0], grads, d) for d in (torch.float64, torch.float32))
    found = (seen[f"{layer_state.MOMENTUM} 1"], weights[-1])
    adapted = [name for name, w in weights[0].items() if w.ndim >= 2]
    settings = case.lars_settings()

    def ratio(momenta: Layers, name: str) -> float:
        decayed = grads[0][name] + settings["weight_decay"] * weights[0][name]
        inside = settings["learning_rate"] if settings["rate_inside_momentum"] else 1.0
        return (
            momenta[name].flatten() @ decayed.flatten() / decayed.square().sum() / inside
        ).item()

    ratios = {}
    for name in adapted:
        truth, own, engine = (ratio(m[0], name) for m in (exact, alone, found))
        ratios[name] = (abs(engine - truth) / truth, limit_for(abs(own - truth) / truth))
    what = "trust ratio of each layer, as the first step's momentum tells it"
    yield _worst("LARS", what, ratios)
    moved = {}
    for name, start in weights[0].items():
        truth, own, engine = (w[1][name] - start for w in (exact, alone, found))
        moved[name] = (distance(engine, truth), limit_for(distance(own, truth)))
    what = f"weights after {NUM_STEPS} steps, relative to the way they went"
    yield _worst("LARS", what, moved)


def _steps(
    case: Case, weights: Layers, grads: list[Layers], dtype: torch.dtype
) -> tuple[Layers, Layers]:
    """Return momenta after the first step and weights after all, by the reference."""
    settings = case.lars_settings()
    rate, decay = settings.pop("learning_rate"), settings.pop("weight_decay")
    w = {name: x.to(dtype) for name, x in weights.items()}
    v = {name: torch.zeros_like(x) for name, x in w.items()}
    first: Layers = {}
    for grad in grads:
        for name in w:
            role = {"adapt": w[name].ndim >= 2, "weight_decay": decay if w[name].ndim >= 2 else 0.0}
            w[name], v[name] = reference.lars_step(
                w[name], grad[name].to(dtype), v[name], lr=rate, **role, **settings
            )
        first = first or {name: x.double() for name, x in v.items()}
    return first, {name: x.double() for name, x in w.items()}


def _worst(check: str, what: str, measured: dict[str, tuple[float, float]]) -> Row:
    """Return the row of the layer that is nearest to its limit, or farthest beyond it."""
    layer = list(measured)[worst([deviation / limit for deviation, limit in measured.values()])]
    deviation, limit = measured[layer]
    return compared(check, what, deviation, limit, f"most in {layer}")


def _part(named: Layers, kind: str) -> Layers:
    """Return the layers of a kind, the kind cut off their names."""
    return {k.removeprefix(f"{kind}/"): v for k, v in named.items() if k.startswith(f"{kind}/")}


def _lists(layers: Layers) -> dict[str, Any]:
    return {name: tensor.double().tolist() for name, tensor in layers.items()}


def _tensors(lists: dict[str, Any]) -> Layers:
    return {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in lists.items()}
