"""BatchNorm over parts of a batch: in one process what ranks with their own statistics do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastclr.config import ConfigError


class PartialBatchNorm(_BatchNorm):
    """BatchNorm whose training statistics are those of parts of the batch.

    A part is a slice of the images with both of their views, as a rank's. The running statistics
    are the first part's, as those of rank 0 are the ones that are kept.
    """

    num_parts: int

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Take any number of dimensions."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise view-major rows; in evaluation by the running statistics."""
        if not self.training:
            return super().forward(input)
        parts = []
        for number, part in enumerate(input.unflatten(0, (2, self.num_parts, -1)).unbind(1)):
            rows = part.flatten(0, 1)
            if number == 0:
                y = super().forward(rows)
            else:
                y = F.batch_norm(
                    rows, None, None, self.weight, self.bias, training=True, eps=self.eps
                )
            parts.append(y.unflatten(0, (2, -1)))
        return torch.stack(parts, 1).flatten(0, 2)


def divide(model: nn.Module, num_parts: int, num_images: int) -> None:
    """Give the parts of a batch statistics of their own; names and weights stay.

    Args:
        model: Changed in place.
        num_parts: Parts.
        num_images: Images of a batch.

    Raises:
        ConfigError: If they are not equal parts, or a BatchNorm does more than torch's.
    """
    if num_parts < 1 or num_images % num_parts:
        raise ConfigError(
            f"a batch of {num_images} images has no {num_parts} equal parts: change one of them."
        )
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d):
            raise ConfigError(
                f"{name} is a {type(module).__name__}, whose statistics are not divided here: take "
                "a ResNet."
            )
        module.__class__ = PartialBatchNorm
        module.num_parts = num_parts  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
