"""The linear probe trained beside the encoder, which does not notice it (stop-gradient)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastclr.evaluation.linear_sgd import MOMENTUM, RATE, zero_linear
from fastclr.optim.schedules import Schedule, scaled_learning_rate

PROTOCOL = (
    "Linear classifier from zero, trained at the same time as the encoder on the same views with "
    f"the gradient stopped before the encoder: SGD with Nesterov momentum {MOMENTUM}, rate {RATE} "
    "* batch / 256, cosine to 0. Chen et al. 2020, B.6."
)


class JointProbe:
    """A classifier with an optimizer of its own; no parameter of it is the model's.

    Source: Chen et al. 2020, B.6, and ``lineareval_while_pretraining`` of the authors' code. It is
    no module, so that no engine, checkpoint or count of parameters takes it for a part of the
    model; :meth:`state_dict` is saved beside it. It sees augmented views and an encoder in training
    mode: its accuracy while training is a hint, its answers to other images a score.

    Args:
        feature_dim: Width F of h.
        num_classes: Classes.
        batch_size: Rows in a step, for the rate.
        total_steps: Steps of the whole training; None for a rate that stays.
        rate: Peak rate for 256 rows.
        device: Where h is.
    """

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        *,
        batch_size: int,
        total_steps: int | None = None,
        rate: float = RATE,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> None:
        self.classifier = zero_linear(feature_dim, num_classes).to(device)
        self._rate = scaled_learning_rate(rate, batch_size, "linear")
        self._schedule, self._total_steps, self._step = Schedule(0, "cosine"), total_steps, 0
        self._optimizer = torch.optim.SGD(
            self.classifier.parameters(), self._rate, momentum=MOMENTUM, nesterov=True
        )

    def step(self, h_NF: torch.Tensor, label_N: torch.Tensor) -> tuple[float, float]:
        """Take a step on representations that a training step has at hand.

        Nothing flows back into h, and its own backward pass touches no gradient but its own, so
        that it may come before or after the model's, also between the parts of an accumulated one.

        Args:
            h_NF: Representations, (N, F), in any floating dtype; with or without a graph.
            label_N: int64 labels of the rows; those below 0 have none and do not count.

        Returns:
            Cross-entropy and accuracy before the step; NaN for both if no row has a label.
        """
        is_known_N = label_N >= 0
        h_NF, label_N = h_NF.detach()[is_known_N].float(), label_N[is_known_N]
        factor = self._schedule.factor(self._step, self._total_steps)
        self._step += 1
        if not len(label_N):
            return float("nan"), float("nan")
        self._optimizer.param_groups[0]["lr"] = self._rate * factor
        # Whatever the caller runs under: autocast and no_grad are not for this.
        with torch.enable_grad(), torch.autocast(h_NF.device.type, enabled=False):
            logits_NC = self.classifier(h_NF)
            loss = F.cross_entropy(logits_NC, label_N)
            parameters = list(self.classifier.parameters())
            for parameter, gradient in zip(
                parameters, torch.autograd.grad(loss, parameters), strict=True
            ):
                parameter.grad = gradient
        self._optimizer.step()
        return loss.item(), (logits_NC.argmax(1) == label_N).double().mean().item()

    @torch.no_grad()
    def answers(self, h_NF: torch.Tensor) -> torch.Tensor:
        """Return the likeliest label of each row, int64 (N,)."""
        return self.classifier(h_NF.float()).argmax(1)

    def state_dict(self) -> dict[str, Any]:
        """Return what a training that goes on needs."""
        return {
            "classifier": self.classifier.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self._step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            RuntimeError: If it is of a classifier of another shape.
        """
        self.classifier.load_state_dict(state["classifier"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._step = state["step"]
