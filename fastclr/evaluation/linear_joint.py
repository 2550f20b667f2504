"""The linear probe trained beside the encoder, which does not notice it (stop-gradient)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fastclr import collectives
from fastclr.config import ConfigError
from fastclr.evaluation.draws import Int64
from fastclr.evaluation.features import Features, check_pair
from fastclr.evaluation.linear_sgd import MOMENTUM, RATE, zero_linear
from fastclr.optim.schedules import Schedule, scaled_learning_rate

PROTOCOL = (
    "Linear classifier from zero, trained at the same time as the encoder on the same views with "
    f"the gradient stopped before the encoder: SGD with Nesterov momentum {MOMENTUM}, rate {RATE} "
    "* batch / 256, cosine to 0. Chen et al. 2020, B.6."
)
_BLOCK = 8192  # rows at a time


class JointProbe:
    """A classifier with an optimizer of its own; no parameter of it is the model's.

    Source: Chen et al. 2020, B.6, and ``lineareval_while_pretraining`` of the authors' code. It is
    no module, so that no engine, checkpoint or count of parameters takes it for a part of the
    model; :meth:`state_dict` is saved beside it. It sees augmented views and an encoder in training
    mode: its accuracy while training is a hint, its answers to other images a score.

    A training step shows it representations as they come (:meth:`see`) and then labels
    (:meth:`learn`); :meth:`step` does both. On several ranks it is one classifier: the gradient is
    that of the mean over all ranks' rows.

    Args:
        feature_dim: Width F of h.
        num_classes: Classes.
        batch_size: Images in a step over all ranks, for the rate.
        rate: Peak rate for 256 images.
        device: Where h is.
    """

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        *,
        batch_size: int,
        rate: float = RATE,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> None:
        self.classifier = zero_linear(feature_dim, num_classes).to(device)
        self._rate = scaled_learning_rate(rate, batch_size, "linear")
        self._schedule, self._step = Schedule(0, "cosine"), 0
        self._seen: list[torch.Tensor] = []
        self._seen_step = -1
        parameters = list(self.classifier.parameters())
        self._optimizer = torch.optim.SGD(parameters, self._rate, momentum=MOMENTUM, nesterov=True)
        for parameter in parameters:  # torch's first buffer is the gradient: that of zeros
            self._optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def see(self, h_NF: torch.Tensor, num_views: int, step: int) -> None:
        """Keep the representations of a chunk of a step's images, view-major, detached.

        What an earlier step has shown that was broken off is forgotten.
        """
        if step != self._seen_step:
            self._seen.clear()
        self._seen_step = step
        self._seen.append(h_NF.detach().unflatten(0, (num_views, -1)))

    def learn(self, label_B: torch.Tensor, total_steps: int | None) -> None:
        """Take a step on what was seen; the chunks together are the images of the labels.

        Args:
            label_B: int64 labels of this rank's images; those below 0 have none and do not count.
            total_steps: Steps of the whole training; None while it is not known.
        """
        h_VBF = torch.cat(self._seen, dim=1)
        self._seen.clear()
        labels = label_B.to(h_VBF.device, non_blocking=True).repeat(len(h_VBF))
        self.step(h_VBF.flatten(0, 1), labels, total_steps)

    def step(
        self, h_NF: torch.Tensor, label_N: torch.Tensor, total_steps: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a step on representations that a training step has at hand; waits for no device.

        Nothing flows back into h, and its own backward pass touches no gradient but its own, so
        that it may come before or after the model's, also between the parts of an accumulated one.

        Args:
            h_NF: Representations, (N, F), in any floating dtype; with or without a graph.
            label_N: int64 labels of the rows; those below 0 have none and do not count.
            total_steps: Steps of the whole training, for the cosine; None for a rate that stays.

        Returns:
            Cross-entropy and accuracy of all ranks' rows before the step, scalars; 0 where no row
            has a label.
        """
        factor = self._schedule.factor(self._step, total_steps)
        self._step += 1
        self._optimizer.param_groups[0]["lr"] = self._rate * factor
        parameters = list(self.classifier.parameters())
        # Whatever the caller runs under: autocast and no_grad are not for this.
        with torch.enable_grad(), torch.autocast(h_NF.device.type, enabled=False):
            logits_NC, label_N = self.classifier(h_NF.detach().float()), label_N.clamp(min=-1)
            loss = F.cross_entropy(logits_NC, label_N, ignore_index=-1, reduction="sum")
            gradients = torch.autograd.grad(loss, parameters)
        is_right_N, is_known_N = logits_NC.argmax(1) == label_N, label_N >= 0
        facts = torch.stack([loss.detach(), is_right_N.sum(), is_known_N.sum()])
        sums = torch.cat([*(gradient.flatten() for gradient in gradients), facts])
        if collectives.num_ranks() > 1:
            dist.all_reduce(sums)
        means = sums / sums[-1].clamp(min=1)
        sizes = [*(parameter.numel() for parameter in parameters), 1, 1, 1]
        *flat, loss, accuracy, _ = means.split(sizes)
        for parameter, gradient in zip(parameters, flat, strict=True):
            parameter.grad = gradient.view_as(parameter)
        self._optimizer.step()
        return loss.squeeze(0), accuracy.squeeze(0)

    @torch.no_grad()
    def answers(self, h_NF: torch.Tensor) -> torch.Tensor:
        """Return the likeliest label of each row, int64 (N,)."""
        return self.classifier(h_NF.to(self.classifier.weight)).argmax(1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what a training that goes on needs; equal on every rank."""
        state = {name: value.detach() for name, value in self.classifier.named_parameters()}
        for name, parameter in self.classifier.named_parameters():
            state[f"momentum.{name}"] = self._optimizer.state[parameter]["momentum_buffer"]
        return {**state, "step": torch.tensor(self._step)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ConfigError: If it is of a classifier of another shape.
        """
        for name, parameter in self.classifier.named_parameters():
            if state[name].shape != parameter.shape:
                raise ConfigError(
                    f"the saved probe's {name} is {tuple(state[name].shape)}, this one's "
                    f"{tuple(parameter.shape)}: go on with the same encoder and classes."
                )
            parameter.copy_(state[name])
            self._optimizer.state[parameter]["momentum_buffer"].copy_(state[f"momentum.{name}"])
        self._step = int(state["step"])


def saved_answers(state: Mapping[str, torch.Tensor], test: Features) -> Int64:
    """Return the answers of a saved probe to images, int64 (X,).

    Args:
        state: Of :meth:`JointProbe.state_dict`.
        test: Features of un-augmented images, of the same encoder.

    Raises:
        ConfigError: If the features have another width, or labels the probe does not know.
        FloatingPointError: If a feature is not finite.
    """
    check_pair(test, test)
    num_classes, width = state["weight"].shape
    if test.h_XF.shape[1] != width or test.label_X.max() >= num_classes:
        raise ConfigError(
            f"the saved probe tells {num_classes} classes from {width} features, the test set has "
            f"labels up to {test.label_X.max()} and {test.h_XF.shape[1]} features: score it on the "
            "classes it was trained with."
        )
    parts = [
        F.linear(torch.from_numpy(np.array(block)), state["weight"], state["bias"]).argmax(1)
        for block in np.array_split(test.h_XF, -(-len(test.h_XF) // _BLOCK))
    ]
    return torch.cat(parts).numpy()
