"""Pictures of a run that was never trained."""

from __future__ import annotations

import numpy as np
import pytest

from fastclr.evaluation.picture_file import LayerPictures, Pictures, spread_queries
from fastclr.evaluation.spectra import Numbers

HOSTILE = "<script>undefined_name()</script>"


def make_pictures(num_classes: int = 4, num_images: int = 60) -> Pictures:
    """Return pictures of two layers: classes are clusters in h and none in z."""
    rng = np.random.default_rng(0)
    label_N = rng.permutation(np.arange(num_images) % num_classes)
    query_Q = spread_queries(label_N, 5)
    found_label_M = np.arange(12) % num_classes
    layers = {}
    for name, spread in (("h", 0.1), ("projection_head.fc2", 3.0)):
        centre_C2 = rng.normal(size=(num_classes, 2))
        at_N2 = (centre_C2[label_N] + spread * rng.normal(size=(num_images, 2))).astype(np.float32)
        similarity_QK = np.sort(rng.random((5, 3)).astype(np.float32))[:, ::-1]
        layers[name] = LayerPictures(
            points={"opentsne": at_N2, "umap": at_N2[:, ::-1]},
            near_QK=rng.integers(0, 12, (5, 3)),
            similarity_QK=similarity_QK,
            spectrum_F=np.array([*np.sort(rng.random(7))[::-1], 0.0]),
            numbers=dict(zip(Numbers._fields, (None, 5.5, 6.25, 0.4, -2.5), strict=True)),
        )
    names = [HOSTILE, *(f"class {k} & more" for k in range(1, num_classes))]
    confusion_CC = rng.integers(0, 9, (num_classes, num_classes)) + 20 * np.eye(
        num_classes, dtype=int
    )
    return Pictures(
        facts={
            "checkpoint": "step-0000009",
            "class_names": names,
            "z": "projection_head.fc2",
            "linear": "the probe's protocol",
            "linear_top1": 0.625,
            "num_train": 99,
            "num_test": num_images,
        },
        image_NHWC=rng.integers(0, 256, (num_images, 16, 16, 3), np.uint8),
        label_N=label_N,
        query_Q=query_Q,
        found_MHWC=rng.integers(0, 256, (12, 16, 16, 3), np.uint8),
        found_label_M=found_label_M,
        layers=layers,
        weights={"fc1": np.array([3.0, 2.0, 1.0]), "fc2": np.array([1.0, 0.5])},
        confusion_CC=confusion_CC,
    )


@pytest.fixture(scope="session")
def pictures() -> Pictures:
    """Return pictures of four classes."""
    return make_pictures()


@pytest.fixture(scope="session")
def many_classes() -> Pictures:
    """Return pictures of more classes than cells of a matrix."""
    return make_pictures(num_classes=40, num_images=80)
