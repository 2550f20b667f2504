"""A folder of images as two tables: what is trained on, and what is held out for scores."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from PIL import Image

from fastclr.config import ConfigError
from fastclr.files import write_durably
from pipelines.sources.folders import list_folder
from pipelines.sources.images import SourceImage, SourceOptions, check_classes, class_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
HELD_OUT, MOST_HELD_OUT = 0.1, 10_000  # of each class; images of all
LEAST_OF_A_CLASS, LEAST_TRAINED = 3, 20  # images that can be divided; what a linear probe takes
_TRAIN = ("train", "training")
_TEST = ("test", "testing", "val", "valid", "validation")
_MOST_OPENED = 200  # images whose size is looked at


@dataclass(frozen=True)
class Divided:
    """What a folder holds.

    Attributes:
        train: Images to train on, in the order of their names.
        test: Images held out, of the same classes; empty where nothing can be scored.
        num_classes: Classes; 0 without.
        why: How ``test`` came about, or why it is empty; a sentence.
        left_out: Names of files that are no images by their ending.
        digest: Changes when a name, a size in bytes or a time of an image does.
    """

    train: Sequence[SourceImage]
    test: Sequence[SourceImage]
    num_classes: int
    why: str
    left_out: Sequence[str]
    digest: str

    def shorter_side(self) -> int:
        """Return the middle of the images' shorter sides in pixels, of a sample of them.

        Raises:
            ConfigError: If none of the sample can be read.
        """
        step = -(-len(self.train) // _MOST_OPENED)
        sides = [*filter(None, map(_shorter_side, self.train[::step]))]
        if not sides:
            raise ConfigError(
                f"{self.train[0].url} and all others that were looked at cannot be read as images: "
                "they have other contents than their names say."
            )
        return round(median(sides))


def divide(folder: Path) -> Divided:
    """List a folder of class folders, of images, or of ``train`` and ``test``, and hold out a part.

    Of class folders each tenth image is held out, at least one a class, at most 10,000: those whose
    names have the lowest hashes, so that others that join them later change little. Files of other
    endings than :data:`SUFFIXES` are left out; links are followed.

    Raises:
        ConfigError: If it is no folder, has no image, or has images beside class folders.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: give one that holds images, or class folders.")
    left_out: list[str] = []
    folders = [path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    names = {name.lower(): name for name in folders}
    splits = [next((names[n] for n in part if n in names), "") for part in (_TRAIN, _TEST)]
    if splits[0] and names.keys() <= {*_TRAIN, *_TEST}:
        train = _images(folder / splits[0], left_out)
        test = _images(folder / splits[1], left_out) if splits[1] else []
        classes, others = _classes(train), _classes(test)
        why = f"{splits[1]} is held out for scores."
        if len(classes) < 2 or classes.keys() != others.keys() or len(train) < LEAST_TRAINED:
            test, why = [], f"Nothing is scored: {splits[0]} and another folder need two classes."
    else:
        train = _images(folder, left_out)
        classes = _classes(train)
        train, test, why = _held_out(train, classes)
    if not train:
        others = f" ({', '.join(left_out[:3])}, ...)" if left_out else ""
        raise ConfigError(
            f"{folder} has no image: there is no file that ends in {', '.join(SUFFIXES)}{others}. "
            "Archives, tables and data sets of other formats are packed by `fastclr shards`."
        )
    digest = _digest((*train, *test))
    return Divided(train, test, len(classes), why, left_out, digest)


def write_table(images: Iterable[SourceImage], file: Path) -> None:
    """Write images as JSON lines that ``fastclr shards FILE --allow-outside`` packs."""
    rows = ({"image": i.url, "label": i.class_name} for i in images)
    write_durably(file, "".join(json.dumps(row) + "\n" for row in rows))


def _images(folder: Path, left_out: list[str]) -> list[SourceImage]:
    """List a folder's images with their classes; note other files."""
    everything = SourceOptions(labels=False, allow_outside=True)
    labelled = SourceOptions()

    def found() -> Iterator[SourceImage]:
        for image in list_folder(folder, str(folder), everything):
            if image.name.lower().endswith(SUFFIXES):
                yield SourceImage(image.name, class_of(image.name, labelled), image.url)
            else:
                left_out.append(image.name)

    images = found()
    first = next(images, None)  # no image at all is told in words of its own
    return [] if first is None else [*check_classes(str(folder), itertools.chain([first], images))]


def _classes(images: Iterable[SourceImage]) -> dict[str, list[SourceImage]]:
    """Return the images of each class."""
    found: dict[str, list[SourceImage]] = defaultdict(list)
    for image in images:
        if image.class_name is not None:
            found[image.class_name].append(image)
    return found


def _held_out(
    images: list[SourceImage], classes: dict[str, list[SourceImage]]
) -> tuple[list[SourceImage], list[SourceImage], str]:
    """Divide labelled images; return both parts and why."""
    if len(classes) < 2:
        return images, [], "Nothing is scored: that takes two class folders or more."
    name, fewest = min(((n, len(own)) for n, own in classes.items()), key=lambda item: item[1])
    if fewest < LEAST_OF_A_CLASS:
        why = f"class {name} has {fewest} images, and {LEAST_OF_A_CLASS} are needed to hold one out"
        return images, [], f"Nothing is scored: {why}."
    share = min(HELD_OUT, MOST_HELD_OUT / len(images))
    chosen: set[str] = set()
    for own in classes.values():
        by_hash = sorted(i.name for i in own)
        by_hash.sort(key=lambda n: hashlib.sha256(n.encode("utf-8", "surrogateescape")).digest())
        chosen.update(by_hash[: max(1, round(share * len(own)))])
    train = [image for image in images if image.name not in chosen]
    if len(train) < LEAST_TRAINED:
        why = f"{len(images)} images are too few, a linear probe takes {LEAST_TRAINED}"
        return images, [], f"Nothing is scored: {why}."
    test = [image for image in images if image.name in chosen]
    return train, test, f"{len(test)} of them are held out for scores."


def _digest(images: Iterable[SourceImage]) -> str:
    """Hash names, sizes in bytes and times."""
    digest = hashlib.sha256()
    for image in images:
        try:
            status = Path(image.url).stat()
            facts = [image.url, image.class_name, status.st_size, status.st_mtime_ns]
        except OSError:  # a link to nowhere: packing will say so
            facts = [image.url, image.class_name]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


def _shorter_side(image: SourceImage) -> int | None:
    """Read the header of an image."""
    try:
        with Image.open(image.url) as opened:
            return min(opened.size)
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
