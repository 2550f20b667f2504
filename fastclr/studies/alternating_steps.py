"""The head as a part of the objective, trained in steps of its own.

The title idea of Gupta et al. 2022 (arXiv 2212.11491); the paper's text and code could not be had,
so this is our own formulation and none of its numbers are repeated. With h = f(x) and the loss L:

    lower level: K steps of the head on L(g(h)) with h held fixed
    upper level: one step of the encoder on L(g(h)) with g held fixed

Both levels have the same loss, so at a solved lower level the encoder's gradient through the fixed
head is the whole gradient (envelope theorem), and no second-order term is needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fastclr.batch import Batch
from fastclr.config import ConfigError, OptimizerConfig
from fastclr.contracts import BatchSource
from fastclr.files import write_shared
from fastclr.optim import LARS, parameter_groups
from fastclr.simclr import SimCLR
from fastclr.studies.study import Alternating
from fastclr.trainer import Trainer

Statistics = dict[str, torch.Tensor]

_EARLIER = "earlier-{}.safetensors"  # of a step


def two_rate_optimizer(
    model: SimCLR, config: OptimizerConfig, head_rate: float
) -> torch.optim.Optimizer:
    """Make one optimizer object with a rate and state for the encoder, and others for the head.

    Args:
        model: Encoder and head.
        config: Resolved; its rate is the encoder's.
        head_rate: The head's rate as a multiple of it.

    Raises:
        ConfigError: If the optimizer is not one of LARS, SGD, Adam and AdamW.
    """
    rate, decay = config.learning_rate or 0.0, config.weight_decay or 0.0
    groups: list[dict[str, Any]] = []
    for module, factor in ((model.encoder, 1.0), (model.projection_head, head_rate)):
        groups += [{**g, "lr": rate * factor} for g in parameter_groups(module, decay)]
    if config.name == "LARS":
        return LARS(groups, lr=rate, momentum=config.momentum or 0.0)
    groups = [{k: g[k] for k in ("params", "weight_decay", "lr")} for g in groups]
    if config.name == "SGD":
        return torch.optim.SGD(groups, lr=rate, momentum=config.momentum or 0.0)
    if config.name in ("Adam", "AdamW"):
        return torch.optim.AdamW(groups, lr=rate)  # what DeepSpeed makes of either name
    raise ConfigError(
        f"optimizer {config.name!r} cannot alternate: choose LARS, SGD, Adam or AdamW."
    )


class AlternatingTrainer(Trainer):
    """A trainer whose head takes steps of its own; one rank, single precision, ZeRO stage 0.

    Args:
        model: Encoder and head.
        alternating: How.
        renewed_steps: Steps after which the head is drawn anew; 0 for never.
        fresh_head: Draws the n-th new head.
        **settings: Of :class:`~fastclr.trainer.Trainer`, with an optimizer object.
    """

    def __init__(
        self,
        model: SimCLR,
        *,
        alternating: Alternating,
        renewed_steps: int = 0,
        fresh_head: Callable[[int], nn.Module] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, **settings)
        if self.optimizer is None or self.world.num_ranks > 1:
            raise ConfigError(
                f"alternating steps got {self.world.num_ranks} ranks and optimizer "
                f"{self.optimizer}: they need one rank and an optimizer object."
            )
        if alternating.head_steps < 1 or alternating.earlier_batches < 0:
            raise ConfigError(
                f"alternating.head_steps is {alternating.head_steps} and earlier_batches "
                f"{alternating.earlier_batches}: give 1 or more, and 0 or more."
            )
        self._how, self._renewed_steps, self._fresh_head = alternating, renewed_steps, fresh_head
        # Representations of earlier batches, kept beside the checkpoints.
        self._earlier: deque[torch.Tensor] = deque(maxlen=alternating.earlier_batches or 1)
        self._head = list(model.projection_head.parameters())

    def train_step(self, batch: Batch, statistics: Statistics | None = None) -> torch.Tensor:
        """Take K steps of the head and one of the encoder on a batch; see the module.

        Returns:
            The loss that the encoder's gradient is of, detached.

        Raises:
            NonFiniteLoss: If it is not finite; the encoder was not updated.
        """
        self._set_rate()
        torch.manual_seed((self.seed * 2**32 + self.step) % 2**63)
        if self._renewed_steps and self.step and self.step % self._renewed_steps == 0:
            self._renew(self.step // self._renewed_steps - 1)
        views_VBCHW = batch.views_VBCHW.to(self.device, non_blocking=True)
        model: SimCLR = self.engine.module
        images_NCHW = views_VBCHW.flatten(0, 1).to(next(model.parameters()).dtype) / 255
        h_NF = model.encoder(images_NCHW)
        self._earlier.append(h_NF.detach())
        kept = list(self._earlier) if self._how.earlier_batches else [h_NF.detach()]
        steps = [kept[k % len(kept)] for k in range(self._how.head_steps)]
        if self._how.order == "head_first":
            first, *_ = [self._head_step(h) for h in steps]
            loss = self._encoder_gradient(model, h_NF, statistics)
            if statistics is not None and not self._how.earlier_batches:
                statistics["head_gain"] = (first - loss).detach()
            self._step()
        else:
            loss = self._encoder_gradient(model, h_NF, statistics)
            self._head_step(steps[0])  # one step with both gradients, taken at the same weights
            for h in steps[1:]:
                self._head_step(h)
        self._count(batch)
        return loss.detach()

    def _save(self, position: dict[str, Any], is_best: bool = False) -> None:
        """Write earlier representations, then the checkpoint that they belong to."""
        name = _EARLIER.format(self.step)
        if self._how.earlier_batches:
            kept = {f"{place:04d}": h.cpu() for place, h in enumerate(self._earlier)}
            write_shared(self.run_dir / name, safetensors.torch.save(kept))
        super()._save(position, is_best)
        for file in self.run_dir.glob(_EARLIER.format("*")):
            if file.name != name:  # of the checkpoint before, which is deleted too
                file.unlink()

    def _resume(self, loader: BatchSource) -> None:
        """Load what there is to go on from, earlier representations too."""
        super()._resume(loader)
        if not self.step or not self._how.earlier_batches:
            return
        file = self.run_dir / _EARLIER.format(self.step)
        try:
            kept = load_file(file, device=str(self.device))
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{file} cannot be read ({error}), and the head's steps go through the batches in "
                f"it: delete {self.run_dir} and train anew."
            ) from error
        self._earlier.extend(kept[place] for place in sorted(kept))

    def _head_step(self, h_NF: torch.Tensor) -> torch.Tensor:
        """Take a step of the head on fixed representations; return the loss before it."""
        head = self.engine.module.projection_head
        with _statistics_held(head):
            loss = self.loss(*head(h_NF).chunk(2))
        for parameter, gradient in zip(
            self._head, torch.autograd.grad(loss, self._head), strict=True
        ):
            parameter.grad = gradient
        self._step()
        return loss.detach()

    def _encoder_gradient(
        self, model: SimCLR, h_NF: torch.Tensor, statistics: Statistics | None
    ) -> torch.Tensor:
        """Put the encoder's gradient through the fixed head in place; return the loss."""
        with _fixed(self._head):
            loss = self._watched_loss(*model.projection_head(h_NF).chunk(2), statistics=statistics)
            loss.backward()
        self._finite.check()
        return loss

    def _step(self) -> None:
        """Let the optimizer step where there are gradients."""
        self.engine.optimizer.step()
        self.engine.optimizer.zero_grad(set_to_none=True)

    def _renew(self, number: int) -> None:
        """Draw the head anew and forget what the optimizer knows of it."""
        assert self._fresh_head is not None
        head = self.engine.module.projection_head
        head.load_state_dict(self._fresh_head(number).state_dict())
        for parameter in self._head:
            self.engine.optimizer.state.pop(parameter, None)


@contextmanager
def _fixed(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Let no gradient reach parameters."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def _statistics_held(head: nn.Module) -> Iterator[None]:
    """Keep BatchNorm's running statistics out of the head's own steps."""
    norms = [m for m in head.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
