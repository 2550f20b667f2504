"""The spaces of h and z: what stands beside their scores, their spectra, and maps of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fastclr import data_sets
from fastclr.config import Config
from fastclr.evaluation import projection_2d, spectra
from fastclr.evaluation.features import Features, extract_layers
from fastclr.evaluation.layers import Layers
from fastclr.simclr import SimCLR
from fastclr.studies.images import StudyImages
from fastclr.studies.scoring import ends
from fastclr.world import World

JSON = dict[str, Any]

NUM_IMAGES = 1000  # test images of the numbers, and pairs of views
NUM_POINTS = 500  # of a map
PROTOCOL = (
    "Silhouette (cosine distance), alignment and uniformity (two views by the policy): of the "
    f"first {NUM_IMAGES} test images."
)
MAP_PROTOCOL = (
    f"t-SNE of the first {NUM_POINTS}: standardised features, PCA to 50 dimensions, scikit-learn; "
    "in the plane: the share of points whose nearest other point is of their class."
)
_MOST_VALUES = 256  # of a spectrum that are kept
_PLACES = 1000  # of a map's coordinates


def numbers(
    model: SimCLR, images: StudyImages, config: Config, device: torch.device
) -> dict[str, JSON]:
    """Return, under ``h`` and ``z``, ``silhouette``, ``alignment`` and ``uniformity``.

    See :class:`~fastclr.evaluation.spectra.Numbers`. What is not defined is left out.

    Args:
        model: Encoder and head, on ``device``.
        images: The first of its test images are taken.
        config: Its views are drawn as in training, without a variant's changes.
        device: Where the model is.
    """
    seen = ends(model)
    test = extract_layers(seen, images.batches(images.test, NUM_IMAGES), device)
    views = _views(seen, images, config, device)
    found = {}
    for end, name in zip(("h", "z"), (seen.names[0], seen.names[-1]), strict=True):
        of = spectra.numbers(test[name].h_XF, test[name].label_X, views[name])
        kept = {key: getattr(of, key) for key in ("silhouette", "alignment", "uniformity")}
        found[end] = {key: value for key, value in kept.items() if np.isfinite(value)}
    return found


@torch.no_grad()
def _views(
    seen: Layers, images: StudyImages, config: Config, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return features of two views of test images."""
    num_images = min(NUM_IMAGES, len(images.test))
    batch = data_sets.first_batch(config, images.test, "threads", num_images, World())
    parts = [
        seen(part.to(device).float() / 255) for part in batch.views_VBCHW.flatten(0, 1).split(256)
    ]
    return {name: torch.cat([part[name].float().cpu() for part in parts]) for name in seen.names}


def pictured(
    model: SimCLR,
    images: StudyImages,
    seed: int,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[dict[str, float], JSON]:
    """Make maps of h and z, and spectra of them and of the head.

    Args:
        model: Encoder and head, on ``device``.
        images: The first of its test images are the points of a map; spectra are of all.
        seed: Seed of t-SNE.
        device: Where the model is.
        say: Told what is being done.

    Returns:
        For ``h`` and ``z``, the share of points whose nearest other point in the plane is of their
        class; and for the figure ``maps`` (places 0..1000 by ``h`` and ``z``), ``label`` and
        ``spectra``, singular values divided by the largest, by ``h``, ``z`` and layer of the head.
    """
    seen = ends(model)
    test = extract_layers(seen, images.batches(images.test), device)
    layers: dict[str, Features] = {"h": test[seen.names[0]], "z": test[seen.names[-1]]}
    label_N = layers["h"].label_X[:NUM_POINTS]
    shares, maps = {}, {}
    for name, features in layers.items():
        say(f"t-SNE of {name}")
        at_N2 = projection_2d.embed(features.h_XF, "tsne", seed=seed, max_points=NUM_POINTS)
        shares[name] = _same_class(at_N2, label_N)
        maps[name] = _placed(at_N2)
    weights = spectra.weight_spectra(model.projection_head)
    of = {name: spectra.covariance_spectrum(f.h_XF) for name, f in layers.items()}
    kept = {name: _relative(values) for name, values in {**of, **weights}.items()}
    return shares, {"maps": maps, "label": label_N.tolist(), "spectra": kept}


def _same_class(at_N2: np.ndarray, label_N: np.ndarray) -> float:
    """Return the share of points whose nearest other point is of their class."""
    distance_NN = np.square(at_N2[:, None] - at_N2[None]).sum(2)
    np.fill_diagonal(distance_NN, np.inf)
    return float((label_N[distance_NN.argmin(1)] == label_N).mean())


def _placed(at_N2: np.ndarray) -> list[list[int]]:
    """Return positions in a square of whole numbers, each axis scaled by itself."""
    low_2, spread_2 = at_N2.min(0), np.ptp(at_N2, axis=0)
    unit_N2 = (at_N2 - low_2) / np.where(spread_2 > 0, spread_2, 1)
    return np.rint(unit_N2 * _PLACES).astype(int).tolist()


def _relative(spectrum_K: np.ndarray) -> list[float]:
    """Return the largest values of a spectrum, divided by the first; four digits."""
    first = spectrum_K[0] or 1.0
    return [float(f"{value:.4g}") for value in spectrum_K[:_MOST_VALUES] / first]
