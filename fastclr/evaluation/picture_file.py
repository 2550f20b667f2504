"""What the pictures of a run are drawn from: made once, in one file; the report only draws."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fastclr.config import ConfigError
from fastclr.evaluation.draws import Int64
from fastclr.files import write_shared

FILE = "pictures.npz"
_VERSION = 1

Array: TypeAlias = npt.NDArray[Any]


class LayerPictures(NamedTuple):
    """One layer's part.

    Attributes:
        points: float32 positions (N, 2) of the images by method of
            :data:`~fastclr.evaluation.projection_2d.METHODS`.
        near_QK: int64 places among the found images, the nearest first.
        similarity_QK: float32 cosine similarities of them.
        spectrum_F: float64 singular values of the covariance, falling.
        numbers: :class:`~fastclr.evaluation.spectra.Numbers` by name; None where there is none.
    """

    points: dict[str, Array]
    near_QK: Array
    similarity_QK: Array
    spectrum_F: Array
    numbers: dict[str, float | None]


@dataclass(frozen=True)
class Pictures:
    """Everything that is drawn.

    Attributes:
        facts: What it is of, as JSON: ``checkpoint``, ``class_names``, ``linear_top1``, ``linear``
            (the probe's protocol), ``num_train``, ``num_test``.
        image_NHWC: uint8 thumbnails of N test images.
        label_N: int64 labels of them.
        query_Q: int64 places of the queries among them.
        found_MHWC: uint8 thumbnails of the training images that were found.
        found_label_M: int64 labels of them.
        layers: By name.
        weights: float64 singular values of the head's linear layers, falling, by name.
        confusion_CC: int64 numbers of test images by class and by the linear probe's answer.
    """

    facts: dict[str, Any]
    image_NHWC: Array
    label_N: Int64
    query_Q: Int64
    found_MHWC: Array
    found_label_M: Int64
    layers: dict[str, LayerPictures]
    weights: dict[str, Array]
    confusion_CC: Int64


def confusion(label_X: Int64, answer_X: Int64, num_classes: int) -> Int64:
    """Return how many images of each class (row) got each answer (column)."""
    place_X = label_X * num_classes + answer_X
    return np.bincount(place_X, minlength=num_classes**2).reshape(num_classes, num_classes)


def spread_queries(label_N: Int64, most: int) -> Int64:
    """Return places of images, a class after the other as long as there are some."""
    order = np.argsort(label_N, kind="stable")
    _, first, counts = np.unique(label_N[order], return_index=True, return_counts=True)
    turn_N = np.arange(len(order)) - np.repeat(first, counts)  # of an image within its class
    return order[np.argsort(turn_N, kind="stable")][:most]


def save(run_dir: Path, pictures: Pictures) -> Path:
    """Write the file, whole; return its path."""
    arrays: dict[str, Any] = {
        "image": pictures.image_NHWC,
        "label": pictures.label_N,
        "query": pictures.query_Q,
        "found_image": pictures.found_MHWC,
        "found_label": pictures.found_label_M,
        "confusion": pictures.confusion_CC,
    }
    for name, layer in pictures.layers.items():
        arrays |= {f"point/{name}/{method}": at_N2 for method, at_N2 in layer.points.items()}
        arrays[f"near/{name}"], arrays[f"similarity/{name}"] = layer.near_QK, layer.similarity_QK
        arrays[f"spectrum/{name}"] = layer.spectrum_F
    arrays |= {f"weights/{name}": spectrum_K for name, spectrum_K in pictures.weights.items()}
    contents = {
        "version": _VERSION,
        "facts": pictures.facts,
        "layers": {name: layer.numbers for name, layer in pictures.layers.items()},
        "methods": {name: [*layer.points] for name, layer in pictures.layers.items()},
        "weights": [*pictures.weights],
    }
    stream = io.BytesIO()
    np.savez(stream, contents=np.array(json.dumps(contents)), **arrays)
    write_shared(run_dir / FILE, stream.getvalue())
    return run_dir / FILE


def load(run_dir: Path) -> Pictures | None:
    """Read a run's pictures; None if none were made.

    Raises:
        ConfigError: If the file is damaged, or of another version.
    """
    file = run_dir / FILE
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as arrays:
            contents = json.loads(str(arrays["contents"]))
            if contents["version"] != _VERSION:
                raise ValueError(f"version {contents['version']} instead of {_VERSION}")
            found = _pictures(contents, arrays)
        _check(found)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{file} cannot be drawn ({error}): make it again with `fastclr evaluate "
            "--protocol pictures`, or delete it."
        ) from error
    return found


def _pictures(contents: Mapping[str, Any], arrays: Mapping[str, Array]) -> Pictures:
    """Put together what was saved."""
    layers = {
        name: LayerPictures(
            points={m: arrays[f"point/{name}/{m}"] for m in contents["methods"][name]},
            near_QK=arrays[f"near/{name}"],
            similarity_QK=arrays[f"similarity/{name}"],
            spectrum_F=arrays[f"spectrum/{name}"],
            numbers=numbers,
        )
        for name, numbers in contents["layers"].items()
    }
    return Pictures(
        facts=contents["facts"],
        image_NHWC=arrays["image"],
        label_N=arrays["label"],
        query_Q=arrays["query"],
        found_MHWC=arrays["found_image"],
        found_label_M=arrays["found_label"],
        layers=layers,
        weights={name: arrays[f"weights/{name}"] for name in contents["weights"]},
        confusion_CC=arrays["confusion"],
    )


def _check(pictures: Pictures) -> None:
    """Refuse arrays that do not belong together.

    Raises:
        ValueError: With what is wrong.
    """
    num_images, num_found = len(pictures.image_NHWC), len(pictures.found_MHWC)
    num_classes = len(pictures.facts["class_names"])
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    shapes["label"] = (pictures.label_N.shape, (num_images,))
    shapes["found_label"] = (pictures.found_label_M.shape, (num_found,))
    shapes["confusion"] = (pictures.confusion_CC.shape, (num_classes, num_classes))
    places = {"query": (pictures.query_Q, num_images)}
    places["label"] = (pictures.label_N, num_classes)
    places["found_label"] = (pictures.found_label_M, num_classes)
    for name, layer in pictures.layers.items():
        for method, at_N2 in layer.points.items():
            shapes[f"{name} by {method}"] = (at_N2.shape, (num_images, 2))
        shapes[f"similarity of {name}"] = (layer.similarity_QK.shape, layer.near_QK.shape)
        shapes[f"near of {name}"] = (layer.near_QK.shape[:1], pictures.query_Q.shape)
        places[f"near of {name}"] = (layer.near_QK, num_found)
    for name, (shape, wanted) in shapes.items():
        if shape != wanted:
            raise ValueError(f"{name} has shape {shape} instead of {wanted}")
    for name, (place, end) in places.items():
        if place.size and not 0 <= place.min() <= place.max() < end:
            raise ValueError(f"{name} has places outside of 0..{end - 1}")
