"""The batch that goes from the loader to the trainer; states the view-major order once."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """Views of B images of one rank.

    View-major: all of view 0, then all of view 1. After ``views_VBCHW.flatten(0, 1)`` rows i and
    i + B are views of one image; with two views the positive of row i is row (i + B) mod 2B.

    Attributes:
        views_VBCHW: uint8, each view channels-last in memory, V >= 2.
        label_B: int64 labels, -1 where there is none; never used in training.
        sample_id_B: int64 ids of the images in their shard set.
    """

    views_VBCHW: torch.Tensor
    label_B: torch.Tensor
    sample_id_B: torch.Tensor

    def check(self) -> Batch:
        """Raise ValueError if shapes or dtypes break the contract; return self."""
        views = self.views_VBCHW
        num_views, _, channels = (*views.shape, 0, 0, 0)[:3]
        if views.ndim != 5 or num_views < 2 or channels != 3 or views.dtype != torch.uint8:
            raise ValueError(
                f"views are {views.dtype} {tuple(views.shape)}: give uint8 (V, B, 3, H, W), V >= 2."
            )
        num_images = views.shape[1]
        for name, values in {"label_B": self.label_B, "sample_id_B": self.sample_id_B}.items():
            if values.shape != (num_images,) or values.dtype != torch.int64:
                raise ValueError(
                    f"{name} is {values.dtype} {tuple(values.shape)}: give int64 ({num_images},)."
                )
        return self
