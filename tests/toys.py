"""What the commands of the docs meet in a test: toy images and stores on loopback.

Commands run as they stand, but for :data:`INSTEAD` and the flags of :data:`SHORT` behind them.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import shlex
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastclr import train
from pipelines import cifar10, photos
from pipelines.photos import write_photo_tiles
from pipelines.writer import write_shards
from tests.pipelines.flaky import flaky, flaky_s3

ROOT = Path(__file__).resolve().parents[1]
SIZES = shlex.split(
    "--global-batch-size 16 --encoder.name resnet8 --encoder.width 0.125 "
    "--encoder.stem small_stride2 --views.size 32 --head.output-dim 8"
)
TRAIN = [
    *SIZES,
    *shlex.split("--minutes None --epochs 1 --optimizer.warmup-epochs 0 --log-every 1"),
]
SHORT = {
    "train": TRAIN,
    "pretrain": ["--minutes", "0.05"],
    "bench": [*SIZES, "--budget-minutes", "0.6"],
    "evaluate": ["--transfer-steps", "2"],
    "study": shlex.split("--scale toy --seeds 1 --out study --work study/work"),
}
INSTEAD = {
    "fastclr study all": "fastclr study color_histogram",  # tests/studies/ runs each of them
    "{000000..000099}": "{000000..000001}",
    "/shared/": "",
    "/scratch/": "scratch/",
    "=29500": "=$FREE_PORT",
}


def make_toys(folder: Path) -> None:
    """Make ``images``, the packed sets ``train`` and ``test``, and ``run``, trained on them."""
    write_photo_tiles(folder / "images", train_per_photo=6, test_per_photo=2)
    for split in ("train", "test"):
        write_shards(folder / "images" / split, folder / split, num_workers=1)
    words = ["--ds-config", "fp32", "--recipe", "cifar10-cpu", "--data.train"]
    assert train.main([*words, f"{folder}/train", "--run-dir", f"{folder}/run", *TRAIN]) == 0


def shortened(text: str, host: str = "") -> str:
    """Return a block as it is run here, with ``host`` for https://host."""
    for long, short in {**INSTEAD, "https://host": host}.items():
        text = text.replace(long, short)
    return text


@contextlib.contextmanager
def stores(toys: Path) -> Iterator[str]:
    """Serve what docs/remote.md names, by http and as the S3 bucket ``bucket``; yields the http."""
    files = sorted((toys / "images" / "train").glob("*/*.png"))
    packed = sorted((toys / "train").iterdir())
    (tar,) = (toys / "train").glob("*.tar")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as pack:
        for file in files:
            pack.add(file, f"images/{file.parent.name}/{file.name}")
    with flaky_s3("bucket") as bucket, flaky() as server:
        for file in files:
            bucket.put(f"/bucket/images/{file.parent.name}/{file.name}", file.read_bytes())
        for file in packed:
            bucket.put(f"/bucket/mine/train/{file.name}", file.read_bytes())
            bucket.put(f"/bucket/more/{file.name}", file.read_bytes())
        cells = {f"/cells/{file.name}": file.read_bytes() for file in files}
        table = io.BytesIO()
        pq.write_table(pa.table({"path": [server.url(path) for path in cells]}), table)
        server.objects |= {
            **cells,
            "/images.tar.gz": archive.getvalue(),
            "/table.parquet": table.getvalue(),
            **{f"/set-{number:06d}.tar": tar.read_bytes() for number in range(2)},
        }
        yield server.url("")


@contextlib.contextmanager
def small_data_sets() -> Iterator[None]:
    """Make ``fastclr fetch`` write few images, and download nothing."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (120, 32, 32, 3), np.uint8), np.arange(120) % 10
    data = cifar10.Cifar10(images, labels, images[:80], labels[:80])
    tiles = functools.partial(write_photo_tiles, train_per_photo=6, test_per_photo=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "write_photo_tiles", tiles)
        patch.setattr(cifar10, "download_cifar10", lambda folder, **_: folder / "archive")
        patch.setattr(cifar10, "load_cifar10", lambda archive, **_: data)
        yield


def with_toy_flags(script: str) -> str:
    """Return a script whose training has a toy's flags."""
    return re.sub(r"^(exec fastclr train .*)$", rf"\1 {shlex.join(TRAIN)}", script, flags=re.M)
