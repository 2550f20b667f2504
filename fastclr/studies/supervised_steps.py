"""Supervised training with the augmentation of a contrastive one: cross-entropy on both views."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastclr.batch import Batch
from fastclr.config import ConfigError
from fastclr.heads import SupervisedHead
from fastclr.simclr import SimCLR
from fastclr.trainer import Trainer


class SupervisedTrainer(Trainer):
    """A trainer whose head is a linear classifier; every image needs a label.

    The log's ``contrastive_accuracy`` is the share of training views that were classified right.
    """

    def train_step(
        self, batch: Batch, statistics: dict[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Take one optimizer step on the cross-entropy of all views, in nats; return it detached.

        Raises:
            ConfigError: If an image has no label.
            NonFiniteLoss: If the loss is not finite; nothing was updated.
        """
        if (batch.label_B < 0).any():
            raise ConfigError("a supervised training met an image without a label: label all.")
        self._set_rate()
        torch.manual_seed((self.seed * 2**32 + self.step) % 2**63)
        views_VBCHW = batch.views_VBCHW.to(self.device, non_blocking=True)
        label_N = batch.label_B.to(self.device).repeat(len(views_VBCHW))
        logits_NK = self.engine(views_VBCHW).z_ND
        loss = F.cross_entropy(logits_NK, label_N)
        self._finite.watch(loss)
        self.engine.backward(loss)
        self._finite.check()
        self.engine.step()
        if statistics is not None:
            right = (logits_NK.detach().argmax(1) == label_N).float().mean()
            statistics["contrastive_accuracy"] = right
        self._count(batch)
        return loss.detach()


def classifier(model: SimCLR, feature_dim: int, num_classes: int) -> SimCLR:
    """Put a linear classifier of h in the place of the head."""
    model.projection_head = nn.Sequential()
    model.projection_head.add_module("classifier", SupervisedHead(feature_dim, num_classes))
    return model
