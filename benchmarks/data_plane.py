"""Images a second from files to two views: our loader, lightly's transform, and decoding alone.

python benchmarks/data_plane.py [--images 2048] [--rounds 5] [--only 224-jpeg 32-png]

All rows of a case take the same images (tiles of the embedded photographs, packed, or in folders
for lightly), run in turn in one process and use as many threads or workers. Each starts an
endless stream, lets some batches pass, and is timed over the next ones, so that what is prepared
ahead at the start is also prepared ahead at the end.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from harness import facts, write_rows
from lightly.transforms import SimCLRTransform
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder

from pipelines import ShardSet, SimCLRPolicy, make_loader
from pipelines.decode import Pixels
from pipelines.photos import PHOTOS, load_photo, write_photo_tiles
from pipelines.writer import write_shards

RESULTS = Path(__file__).with_name("results") / "data_plane.jsonl"
TARGETS = {
    "224-jpeg threads": 5,
    "224-jpeg dali": 4,
    "32-png threads": 14,
    "32-png threads, decoded in memory": 25,
}
TILES = 24  # of each photograph, 224 pixels a side

Batches = Callable[[], Iterator[int]]


@dataclass
class Case:
    """Images of one kind, and how they are to be augmented.

    Attributes:
        folder: Class folders of the images.
        shards: The same, packed.
        policy: Ours.
        transform: lightly's, with the same numbers.
        batch: Images in a batch.
    """

    folder: Path
    shards: ShardSet
    policy: SimCLRPolicy
    transform: SimCLRTransform
    batch: int


@dataclass
class Decoded:
    """A data set whose images are decoded once."""

    shards: ShardSet
    images: list[Pixels] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Decode them."""
        self.images = [self.shards[i] for i in range(len(self.shards))]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, sample_id: int) -> Pixels:
        return self.images[sample_id]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.shards, name)


def jpeg_224(root: Path) -> Case:
    """Tiles of 224 pixels, JPEG 4:2:0 at quality 90, to 224 pixels at full strength."""
    rng = np.random.default_rng(0)
    for photo in PHOTOS:
        folder = root / "files" / photo.name
        folder.mkdir(parents=True)
        image = load_photo(photo)
        for k in range(TILES):
            left, top = (int(rng.integers(side - 224 + 1)) for side in image.size)
            tile = image.crop((left, top, left + 224, top + 224))
            tile.save(folder / f"{k:03}.jpg", quality=90, subsampling="4:2:0")
    shards = write_shards(root / "files", root / "packed")
    return Case(root / "files", shards, SimCLRPolicy(size=224), SimCLRTransform(224), 32)


def png_32(root: Path) -> Case:
    """Tiles of 32 pixels, PNG, to 32 pixels as is usual for CIFAR: half the strength, no blur."""
    write_photo_tiles(root / "files", train_per_photo=64, test_per_photo=1)
    folder = root / "files" / "train"
    policy = SimCLRPolicy(size=32, color_strength=0.5, blur_prob=0)
    transform = SimCLRTransform(32, cj_strength=0.5, gaussian_blur=0.0)
    return Case(folder, write_shards(folder, root / "packed"), policy, transform, 256)


CASES = {"224-jpeg": jpeg_224, "32-png": png_32}


def lightly(case: Case, num_threads: int) -> Batches:
    """Take lightly's transform in torch's DataLoader, on Pillow's images."""
    images = ImageFolder(case.folder, case.transform)
    endless = RandomSampler(images, replacement=True, num_samples=10**9)

    def batches() -> Iterator[int]:
        loader = DataLoader(images, case.batch, sampler=endless, num_workers=num_threads)
        for views, _ in loader:
            yield len(views[0])

    return batches


def ours(case: Case, num_threads: int, backend: str, images: Any = None) -> Batches:
    """Take our loader."""

    def batches() -> Iterator[int]:
        loader = make_loader(
            images or case.shards, case.policy, micro_batch_size=case.batch, backend=backend,
            num_threads=num_threads,
        )  # fmt: skip
        for batch in loader:
            yield batch.views_VBCHW.shape[1]

    return batches


def decoding(case: Case, num_threads: int) -> Batches:
    """Read and decode, and nothing else: what no loader of these files can beat."""
    order = np.random.default_rng(0)

    def load(ids: list[int]) -> None:
        for i in ids:
            case.shards[i]

    def batches() -> Iterator[int]:
        with ThreadPoolExecutor(num_threads) as pool:
            while True:
                ids = order.integers(len(case.shards), size=(num_threads, case.batch)).tolist()
                list(pool.map(load, ids))
                yield num_threads * case.batch

    return batches


def rate(batches: Batches, num_images: int) -> float:
    """Return images a second of a stream, after its start."""
    stream = batches()
    for _ in islice(stream, 3):
        pass
    done, before = 0, time.perf_counter()
    while done < num_images:
        done += next(stream)
    seconds = time.perf_counter() - before
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    time.sleep(0.2)  # threads and workers finish what they have begun
    return done / seconds


def measure(name: str, case: Case, num_images: int, rounds: int, num_threads: int) -> list[Any]:
    """Run the rows of a case in turn; return and print their medians."""
    rows: dict[str, tuple[Batches, float]] = {
        "lightly, DataLoader": (lightly(case, num_threads), 0.1),
        "threads": (ours(case, num_threads, "threads"), 1),
        "dali": (ours(case, num_threads, "dali"), 1),
        "threads, decoded in memory": (
            ours(case, num_threads, "threads", Decoded(case.shards)), 1,
        ),
        "reading and decoding alone": (decoding(case, num_threads), 1),
    }  # fmt: skip
    rates: dict[str, list[float]] = {row: [] for row in rows}
    for _ in range(rounds):
        for row, (batches, part) in rows.items():
            rates[row].append(rate(batches, int(part * num_images)))
    base = statistics.median(rates["lightly, DataLoader"])
    found = []
    for row, values in rates.items():
        median = statistics.median(values)
        target = TARGETS.get(f"{name} {row}")
        found.append(
            {"case": name, "row": row, "images_per_second": median, "best": max(values),
             "times_lightly": median / base, "target": target, "threads": num_threads}
        )  # fmt: skip
        wanted = f"  (target {target})" if target else ""
        print(f"{name}  {row:28} {median:9,.0f} {max(values):9,.0f}  {median / base:6.1f}x{wanted}")
    return found


def main(
    images: int = 2048,
    rounds: int = 5,
    threads: int = 2,
    only: tuple[str, ...] = tuple(CASES),
    write: bool = False,
) -> None:
    """Measure and print; exit with 1 where a target is missed.

    Args:
        images: Images a round and row; at 32 pixels 16 times as many, of lightly a tenth.
        rounds: Rounds; each runs every row once.
        threads: Threads of our loader and workers of the DataLoader.
        only: Which cases.
        write: Replace ``results/data_plane.jsonl``.
    """
    found = []
    print(f"{'':38} {'median':>9} {'best':>9}  images a second, two views each")
    for name in only:
        with tempfile.TemporaryDirectory() as root:
            case = CASES[name](Path(root))
            many = images * (16 if name.startswith("32") else 1)
            found += measure(name, case, many, rounds, threads)
    if write:
        write_rows(RESULTS, [{"facts": facts()}, *found])
    missed = [f for f in found if f["target"] and f["times_lightly"] < f["target"]]
    raise SystemExit(f"{len(missed)} targets missed" if missed else 0)


if __name__ == "__main__":
    tyro.cli(main)
