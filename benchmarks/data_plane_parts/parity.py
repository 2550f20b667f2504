"""How far each back-end's pixels lie from the reference's, and what each makes of damage.

The reference is Pillow's decode and resize and torchvision's functions on floats, one image after
another. Every back-end gets the same encoded images and the same numbers.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.augment_reference import augment as reference
from pipelines.backends import BACKENDS, Backend
from pipelines.decode import DamagedImage, Pixels, check_header, check_image, decode
from pipelines.photos import PHOTOS, load_photo
from pipelines.policy import BRIGHTNESS, CONTRAST, HUE, SATURATION, SimCLRPolicy, ViewParams

CPU = torch.device("cpu")

# Mean, 99th percentile and maximum of the difference in levels of 0..255, per stage.
EXACT, COLOUR = (0.0, 0.0, 0), (0.3, 1.0, 1)
STAGES = ("decode", "crop, resize, flip", "brightness", "contrast", "saturation", "hue", "gray",
          "blur", "whole view")  # fmt: skip
_PILLOWS = {
    "decode": EXACT,
    "crop, resize, flip": (0.01, 1.0, 2),
    **dict.fromkeys(("brightness", "contrast", "saturation", "hue", "gray", "blur"), COLOUR),
    "whole view": (0.4, 1.0, 8),
}
LIMITS: dict[str, dict[str, tuple[float, float, int]]] = {
    "threads": _PILLOWS,
    "kornia": _PILLOWS
    | {"crop, resize, flip": (0.05, 1.0, 3)}
    # Of floats the limits were .05, .1, .5: a rounding to 8 bit makes .5 a level.
    | dict.fromkeys(STAGES[2:8], (0.05, 1.0, 1)),
    "dali": _PILLOWS | {"crop, resize, flip": (0.3, 2.0, 12), "whole view": (0.6, 3.0, 16)},
    "triton": _PILLOWS,
}


def jpeg(image: Image.Image) -> bytes:
    """Encode at quality 90."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def photographs(num_images: int, side: int, mode: str) -> list[bytes]:
    """Cut squares from the embedded photographs and encode them in a mode of Pillow's."""
    rng, found = np.random.default_rng(7), []
    for k in range(num_images):
        image = load_photo(PHOTOS[k % len(PHOTOS)])
        left, top = (int(rng.integers(length - side + 1)) for length in image.size)
        found.append(jpeg(image.crop((left, top, left + side, top + side)).convert(mode)))
    return found


def pillow(data: bytes) -> Pixels:
    """Decode as Pillow does."""
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def identity(n: int, side: int) -> ViewParams:
    """Numbers that leave images of the right size as they are."""
    no = np.zeros(n, bool)
    return ViewParams(
        box_N4=np.array([(0, 0, side, side)] * n, np.int32),
        flip_N=no,
        jitter_N=no,
        factors_N4=np.array([[1, 1, 1, 0]] * n, np.float32),
        order_N4=np.array([[0, 1, 2, 3]] * n, np.uint8),
        gray_N=no,
        blur_N=no,
        sigma_N=np.full(n, 0.1, np.float32),
    )


def stages(policy: SimCLRPolicy, n: int, side: int) -> dict[str, ViewParams]:
    """Return the numbers that show each stage alone, and those of whole views."""
    sizes_N2 = np.full((n, 2), side, np.int32)
    drawn = policy.draw(seed=5, epoch=0, positions=np.arange(n), view=0, sizes_N2=sizes_N2)
    same, yes = identity(n, side), np.ones(n, bool)
    found = {
        "decode": same,
        "crop, resize, flip": replace(same, box_N4=drawn.box_N4, flip_N=drawn.flip_N),
    }
    steps = {
        "brightness": BRIGHTNESS, "contrast": CONTRAST, "saturation": SATURATION, "hue": HUE,
    }  # fmt: skip
    for name, step in steps.items():
        factors_N4 = same.factors_N4.copy()
        factors_N4[:, step] = drawn.factors_N4[:, step]
        found[name] = replace(same, jitter_N=yes, factors_N4=factors_N4)
    found["gray"] = replace(same, gray_N=yes)
    found["blur"] = replace(same, blur_N=yes, sigma_N=drawn.sigma_N)
    found["whole view"] = drawn
    return found


def cases(n: int, side: int) -> Iterator[tuple[str, str, SimCLRPolicy, list[bytes], ViewParams]]:
    """Yield input, stage, policy, images and numbers of every comparison.

    Args:
        n: Images.
        side: Of the views and of most images in pixels.
    """
    policy = SimCLRPolicy(size=side)
    for name, mode in {"colour": "RGB", "grey": "L", "CMYK": "CMYK"}.items():
        images = photographs(n, side, mode)
        for stage, params in stages(policy, n, side).items():
            yield name, stage, policy, images, params
    images, all_stages = photographs(n, side, "RGB"), stages(policy, n, side)
    rng = np.random.default_rng(3)
    box_N4 = np.ones((n, 4), np.int32)
    box_N4[:, :2] = rng.integers(side, size=(n, 2))
    for stage in ("crop, resize, flip", "whole view"):
        params = replace(all_stages[stage], box_N4=box_N4)
        yield "1-pixel crops", stage, policy, images, params
    small, images = SimCLRPolicy(size=32), photographs(n, 224, "RGB")
    all_stages = stages(small, n, 224)
    for stage in ("crop, resize, flip", "whole view"):
        yield "224 to 32", stage, small, images, all_stages[stage]


def measure(backends: Sequence[str], n: int, side: int) -> list[dict[str, Any]]:
    """Compare back-ends with the reference; on one thread, which small tensors are best on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return list(_compare(backends, n, side))
    finally:
        torch.set_num_threads(threads)


def _compare(backends: Sequence[str], n: int, side: int) -> Iterator[dict[str, Any]]:
    """Yield a row an input, stage and back-end."""
    for name, stage, policy, images, params in cases(n, side):
        truth = reference([pillow(image) for image in images], params, policy)
        for backend in backends:
            make = BACKENDS[backend]([policy], CPU, 1)
            (views,) = make(_fed(make, images), [params])
            error = (views.int() - truth.int()).abs().numpy()
            limit = LIMITS[backend][stage]
            values = float(error.mean()), float(np.percentile(error, 99)), int(error.max())
            yield {
                "backend": backend, "input": name, "stage": stage, "images": n,
                "mean": values[0], "p99": values[1], "max": values[2], "limit": limit,
                "met": all(v <= most for v, most in zip(values, limit, strict=True)),
            }  # fmt: skip


def _fed(backend: Backend, images: list[bytes]) -> list[Any]:
    """Give a back-end what it takes."""
    return list(images) if backend.takes_bytes else [decode(image) for image in images]


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table: a line a stage and input, a column a back-end."""
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for r in rows:
        mean, p99, largest = r["limit"]
        cells.setdefault((r["stage"], r["input"]), {})[r["backend"]] = (
            f"{r['mean']:.3f} / {r['p99']:.3g} / {r['max']} (<= {mean:g} / {p99:g} / {largest}) "
            f"{'met' if r['met'] else 'MISSED'}"
        )
    table = [
        "| stage | input | " + " | ".join(backends) + " |",
        "|---|---|" + "---|" * len(backends),
    ]
    for stage in STAGES:
        for (of, name), found in cells.items():
            if of == stage:
                row = " | ".join(found.get(backend, "") for backend in backends)
                table.append(f"| {stage} | {name} | {row} |")
    return table


def _patched(data: bytes, patch: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + patch + data[middle + len(patch) :]


Damage = Callable[[bytes], bytes]
# What is done to a JPEG, and whether it is damage.
DAMAGE: dict[str, tuple[bool, Damage]] = {
    "whole": (False, lambda data: data),
    "bytes appended": (False, lambda data: data + b"by a camera"),
    "cut by half": (True, lambda data: data[: len(data) // 2]),
    "cut by 100 bytes": (True, lambda data: data[:-100]),
    "no end marker": (True, lambda data: data[:-2]),
    "random bytes": (True, lambda data: np.random.default_rng(0).bytes(len(data))),
    "empty": (True, lambda data: b""),
    "a GIF": (True, lambda data: _as(data, "GIF")),
    "start of frame destroyed": (True, lambda data: data.replace(b"\xff\xc0", b"\0\0", 1)),
    "500 bytes zeroed inside": (True, lambda data: _patched(data, bytes(500))),
    "500 bytes of noise inside": (
        True, lambda data: _patched(data, np.random.default_rng(1).bytes(500)),
    ),
}  # fmt: skip


def _as(data: bytes, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(data)).save(stream, kind)
    return stream.getvalue()


def damage(backends: Sequence[str]) -> list[dict[str, Any]]:
    """Show damaged images to ``check_image`` and, as the loader does, to every back-end."""
    good, policy = photographs(1, 224, "RGB")[0], SimCLRPolicy(size=32)
    params = identity(1, 224)
    found = []
    for kind, (is_damaged, change) in DAMAGE.items():
        data = change(good)
        verdicts = {"check_image": _refused([("check_image", lambda d=data: check_image(d))])}
        for name in backends:
            backend = BACKENDS[name]([policy], CPU, 1)
            steps: list[tuple[str, Callable[[], object]]] = [("decode", lambda d=data: decode(d))]
            if backend.takes_bytes:
                steps = [
                    ("header", lambda d=data: check_header(d)),
                    (name, lambda d=data, b=backend: b([d], [params])),
                ]
            verdicts[name] = _refused(steps)
        met = all(bool(by) == is_damaged for by in verdicts.values())
        found.append({"kind": kind, "damaged": is_damaged, "refused_by": verdicts, "met": met})
    return found


def _refused(steps: list[tuple[str, Callable[[], object]]]) -> str:
    """Return the first step that refuses; empty if none does."""
    for name, step in steps:
        try:
            step()
        except DamagedImage:
            return name
    return ""


def damage_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table of who refuses what."""
    names = list(rows[0]["refused_by"]) if rows else []
    return [
        "| a JPEG | " + " | ".join(names) + " | one verdict, and the right one |",
        "|---|" + "---|" * (len(names) + 1),
    ] + [
        f"| {r['kind']} | "
        + " | ".join(f"refused by {by}" if by else "taken" for by in r["refused_by"].values())
        + f" | {'yes' if r['met'] else 'NO'} |"
        for r in rows
    ]
