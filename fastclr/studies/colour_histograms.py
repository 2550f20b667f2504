"""The colour shortcut as a number: crops of an image found again by their histograms alone.

Source: Chen et al. 2020, figure 6, which shows histograms and gives no number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastclr import data_sets
from fastclr.config import Config
from fastclr.studies.images import StudyImages
from pipelines.loader import make_loader

BINS = 16  # a channel
CANDIDATES = 256  # images among which the right one is sought; chance is 1 / CANDIDATES
NUM_PICTURED, NUM_CROPS = 2, 4
_MOST_BATCHES = 16

JSON = dict[str, Any]


def matching(config: Config, images: StudyImages) -> dict[str, float]:
    """Find each crop's partner among crops of other images by the distance of histograms.

    Args:
        config: Its views and seed.
        images: Crops of its test images are drawn.

    Returns:
        ``found``, the share of crops whose nearest histogram is their partner's, half of it (to be
        compared with), and ``chance``.
    """
    num_images = min(CANDIDATES, len(images.test))
    loader = make_loader(
        images.test,
        data_sets.policies_of(config),
        micro_batch_size=num_images,
        seed=config.seed,
        backend="threads",
    )
    num_batches = min(_MOST_BATCHES, loader.batches_per_epoch)
    batches = iter(loader)
    right = []
    for _ in range(num_batches):
        views_VNCHW = next(batches).views_VBCHW.numpy()
        first_NK, second_NK = histograms(views_VNCHW[0]), histograms(views_VNCHW[1])
        distance_NN = np.abs(first_NK[:, None] - second_NK[None]).sum(2)
        right.append(distance_NN.argmin(1) == np.arange(num_images))
    found = float(np.concatenate(right).mean())
    return {"found": found, "found_half": found / 2, "chance": 1 / num_images}


def pictured(config: Config, images: StudyImages) -> JSON:
    """Return histograms of some crops of the first test images of an epoch, for the figure.

    Returns:
        ``histograms``: for each image and each crop the shares of :data:`BINS` bins, over all
        channels.
    """
    policies = data_sets.policies_of(config)[:1] * NUM_CROPS
    loader = make_loader(
        images.test,
        policies,
        micro_batch_size=NUM_PICTURED,
        seed=config.seed,
        backend="threads",
    )
    views_VNCHW = next(iter(loader)).views_VBCHW.numpy()
    share_VNK = np.stack([histograms(v).reshape(len(v), 3, BINS).mean(1) for v in views_VNCHW])
    return {"histograms": share_VNK.transpose(1, 0, 2).round(4).tolist()}


def histograms(views_NCHW: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return the shares of pixels in :data:`BINS` equal bins of each channel, (n, 3 * BINS)."""
    num_views, num_channels = views_NCHW.shape[:2]
    bin_NCX = views_NCHW.reshape(num_views, num_channels, -1).astype(np.int64) * BINS // 256
    place = np.arange(num_views * num_channels)[:, None] * BINS
    counts = np.bincount(
        (place + bin_NCX.reshape(num_views * num_channels, -1)).ravel(),
        minlength=num_views * num_channels * BINS,
    )
    return (counts / bin_NCX.shape[2]).reshape(num_views, -1).astype(np.float32)
