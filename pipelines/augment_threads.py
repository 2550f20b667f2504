"""The back-end of the CPU: numba kernels over a chunk of images, in the loader's threads.

Three calls a view (crop, resize and flip; colours; blur) do a whole chunk without the GIL and
without torch, so threads of the loader share the cores and nothing starts threads of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pipelines.blur_numba import blur
from pipelines.colour_numba import colour
from pipelines.policy import SimCLRPolicy, ViewParams
from pipelines.resize_numba import resize

CHUNK_PIXELS = 2**18  # of a view's images in a chunk: some milliseconds of work


class Threads:
    """Makes the views of decoded images on the CPU; see :class:`~pipelines.backends.Backend`.

    Args:
        policies: One a view, all of one size.

    Attributes:
        takes_bytes: False: it is given decoded images.
        chunk: Images it is given in one call.
    """

    takes_bytes = False

    def __init__(self, policies: Sequence[SimCLRPolicy]) -> None:
        self.policies = policies
        self.chunk: int | None = min(max(CHUNK_PIXELS // policies[0].size ** 2, 4), 128)

    def __call__(self, images: Sequence[Any], params: Sequence[ViewParams]) -> torch.Tensor:
        """Make the views of n images; on the host, whatever the run's device.

        Args:
            images: n source images, uint8 (H, W, 3) of any sizes.
            params: Numbers of n views, for each of V views.

        Returns:
            uint8 (V, n, size, size, 3).
        """
        size = self.policies[0].size
        views_VNHWC = np.empty((len(params), len(images), size, size, 3), np.uint8)
        for views_NHWC, numbers, policy in zip(views_VNHWC, params, self.policies, strict=True):
            resize(images, numbers.box_N4, numbers.flip_N, views_NHWC)
            colour(views_NHWC, numbers, views_NHWC)
            blur(views_NHWC, numbers, policy.blur_taps)
        return torch.from_numpy(views_VNHWC)
