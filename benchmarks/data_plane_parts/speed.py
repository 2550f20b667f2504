"""Images a second from files to two views: our back-ends, and what others offer.

All rows of a case take the same images (tiles of the embedded photographs: packed for us, in
folders for torch's DataLoader) and as many threads or workers, in turn in one process. Each is
timed after its start, so that what is prepared ahead at the start is also prepared at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import kornia.augmentation as K
import numpy as np
import torch
from peer_parts.simclr import lightly_transform
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from pipelines import ShardSet, SimCLRPolicy, make_loader
from pipelines.decode import Pixels
from pipelines.image_set import ImageSet
from pipelines.memory import InMemory
from pipelines.photos import PHOTOS, load_photo, write_photo_tiles
from pipelines.writer import write_shards

LIGHTLY, KORNIA = "lightly, DataLoader", "Kornia's AugmentationSequential, from memory"
THREADS, MEMORY, DALI = "threads", "threads, from memory", "dali"
OUR_KORNIA = "kornia, from memory"
# Base and least ratio to it.
TARGETS = {
    ("224-jpeg", THREADS): (LIGHTLY, 5),
    ("224-jpeg", DALI): (LIGHTLY, 4),
    ("224-jpeg", OUR_KORNIA): (KORNIA, 2),
    ("32-png", THREADS): (LIGHTLY, 14),
    ("32-png", MEMORY): (LIGHTLY, 25),
}
TILES = 24  # of each photograph, 224 pixels a side

Batches = Callable[[], Iterator[int]]


@dataclass
class Case:
    """Images of one kind, and how they are to be augmented.

    Attributes:
        folder: Class folders of the images.
        shards: The same, packed.
        memory: The same, decoded.
        policy: Ours; the others take its numbers.
        batch: Images in a batch of ours; the others, some of which take seconds for as many, make
            batches of a quarter.
    """

    folder: Path
    shards: ShardSet
    memory: ImageSet
    policy: SimCLRPolicy
    batch: int


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
    return _case(root / "files", root / "packed", SimCLRPolicy(size=224), 32)


def png_32(root: Path) -> Case:
    """Tiles of 32 pixels, PNG, to 32 pixels as is usual for CIFAR: half the strength, no blur."""
    write_photo_tiles(root / "files", train_per_photo=64, test_per_photo=1)
    policy = SimCLRPolicy(size=32, color_strength=0.5, blur_prob=0)
    return _case(root / "files" / "train", root / "packed", policy, 256)


def _case(folder: Path, packed: Path, policy: SimCLRPolicy, batch: int) -> Case:
    shards = write_shards(folder, packed)
    return Case(folder, shards, InMemory(shards), policy, batch)


CASES = {"224-jpeg": jpeg_224, "32-png": png_32}


def torchvision_transform(policy: SimCLRPolicy) -> Any:
    """Return torchvision's second version, on 8-bit tensors as its documentation advises."""
    s = policy.color_strength
    jitter = v2.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s)
    blur = v2.GaussianBlur(policy.blur_taps, policy.blur_sigma)
    one = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(
                policy.size, policy.crop_scale, interpolation=InterpolationMode.BICUBIC
            ),
            v2.RandomHorizontalFlip(policy.flip_prob),
            v2.RandomApply([jitter], policy.jitter_prob),
            v2.RandomGrayscale(policy.grayscale_prob),
            *([v2.RandomApply([blur], policy.blur_prob)] if policy.blur_prob else []),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    return lambda image: (one(image), one(image))


def data_loader(case: Case, num_threads: int, transform: Any) -> Batches:
    """Take a transform in torch's DataLoader, on Pillow's images."""
    images = ImageFolder(case.folder, transform)
    endless = RandomSampler(images, replacement=True, num_samples=10**9)

    def batches() -> Iterator[int]:
        loader = DataLoader(images, case.batch // 4, sampler=endless, num_workers=num_threads)
        for views, _ in loader:
            yield len(views[0])

    return batches


def ours(case: Case, num_threads: int, backend: str, images: ImageSet | None = None) -> Batches:
    """Take our loader; it is made once, and goes on where it was."""
    loader = make_loader(
        images or case.shards, case.policy, micro_batch_size=case.batch, backend=backend,
        num_threads=num_threads,
    )  # fmt: skip
    return lambda: (batch.views_VBCHW.shape[1] for batch in loader)


def kornia_classes(case: Case) -> Batches:
    """Take Kornia's random classes on batches of decoded images, with torch's threads."""
    policy, s = case.policy, case.policy.color_strength
    blur = K.RandomGaussianBlur((policy.blur_taps,) * 2, policy.blur_sigma, p=policy.blur_prob)
    augment = K.AugmentationSequential(
        K.RandomResizedCrop((policy.size,) * 2, policy.crop_scale, resample="BICUBIC"),
        K.RandomHorizontalFlip(policy.flip_prob),
        K.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=policy.jitter_prob),
        K.RandomGrayscale(p=policy.grayscale_prob),
        *([blur] if policy.blur_prob else []),
        data_keys=["input"],
    )
    images_X = np.stack([case.memory[i] for i in range(len(case.memory))])
    rng = np.random.default_rng(0)

    def batches() -> Iterator[int]:
        while True:
            chosen = images_X[rng.integers(len(images_X), size=case.batch // 4)]
            with torch.inference_mode():
                x_BCHW = torch.from_numpy(chosen).permute(0, 3, 1, 2) / 255
                views = augment(x_BCHW), augment(x_BCHW)
            yield len(views[0])

    return batches


def decoding(case: Case, num_threads: int) -> Batches:
    """Read and decode, and nothing else: what no loader of these files can beat."""
    order = np.random.default_rng(0)

    def load(ids: list[int]) -> list[Pixels]:
        return [case.shards[i] for i in ids]

    def batches() -> Iterator[int]:
        with ThreadPoolExecutor(num_threads) as pool:
            while True:
                ids = order.integers(len(case.shards), size=(num_threads, case.batch)).tolist()
                list(pool.map(load, ids))
                yield num_threads * case.batch

    return batches


def rows_of(case: Case, num_threads: int) -> dict[str, Batches]:
    """Return the streams that are compared, by name."""
    return {
        LIGHTLY: data_loader(case, num_threads, lightly_transform(case.policy)),
        "torchvision v2, DataLoader": data_loader(
            case, num_threads, torchvision_transform(case.policy)
        ),
        THREADS: ours(case, num_threads, "threads"),
        MEMORY: ours(case, num_threads, "threads", case.memory),
        DALI: ours(case, num_threads, "dali"),
        OUR_KORNIA: ours(case, num_threads, "kornia", case.memory),
        KORNIA: kornia_classes(case),
        "reading and decoding alone": decoding(case, num_threads),
    }


def rate(batches: Batches, seconds: float) -> float:
    """Return images a second of a stream over some seconds, after its start."""
    stream = batches()
    for _ in islice(stream, 3):
        pass
    done, passed, before = 0, 0.0, time.perf_counter()
    while passed < seconds:
        done += next(stream)
        passed = time.perf_counter() - before
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    time.sleep(0.1)  # threads and workers finish what they have begun
    return done / passed


def ratio(rates: dict[str, list[float]], row: str, base: str) -> float:
    """Return how many times faster a row is: the median of the ratios within a round."""
    return median(a / b for a, b in zip(rates[row], rates[base], strict=True))


def judge(name: str, rates: dict[str, list[float]], num_threads: int) -> list[dict[str, Any]]:
    """Turn the rates of a case's rows, one a round, into results."""
    found = []
    for row, values in rates.items():
        base, least = TARGETS.get((name, row), (LIGHTLY, None))
        times = ratio(rates, row, base)
        found.append(
            {"case": name, "row": row, "images_per_second": median(values), "best": max(values),
             "times_lightly": ratio(rates, row, LIGHTLY), "base": base, "times": times,
             "target": least, "met": least is None or times >= least, "threads": num_threads}
        )  # fmt: skip
    return found


def measure(
    name: str, root: Path, *, rounds: int, seconds: float, num_threads: int
) -> list[dict[str, Any]]:
    """Run the rows of a case in turn."""
    streams = rows_of(CASES[name](root), num_threads)
    rates: dict[str, list[float]] = {row: [] for row in streams}
    for _ in range(rounds):
        for row, batches in streams.items():
            rates[row].append(rate(batches, seconds))
    return judge(name, rates, num_threads)


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table."""
    table = [
        "| images | row | images/s, median | best | x lightly | target |",
        "|---|---|--:|--:|--:|---|",
    ]
    for r in rows:
        target = ""
        if r["target"] is not None:
            beside = (
                "" if r["base"] == LIGHTLY else f" {r['base'].split(',')[0]} ({r['times']:.1f})"
            )
            target = f">= {r['target']}x{beside}: {'met' if r['met'] else 'MISSED'}"
        table.append(
            f"| {r['case']} | {r['row']} | {r['images_per_second']:,.0f} | {r['best']:,.0f} | "
            f"{r['times_lightly']:.1f} | {target} |"
        )
    return table
