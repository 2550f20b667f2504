"""DALI's back-end: pixels of every format, damage by name, threads, memory, and the GPU's graph."""

from __future__ import annotations

import inspect
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from fastclr.config import ConfigError
from fastclr.world import World
from pipelines import augment_dali
from pipelines.augment_dali import Dali, as_pnm, feedable, graph, size_of
from pipelines.backends import BACKENDS
from pipelines.colour_affine import matrices
from pipelines.decode import MAX_PIXELS, DamagedImages, Pixels, decode
from pipelines.loader import make_loader
from pipelines.policy import SimCLRPolicy, ViewParams
from pipelines.shards import ShardSet
from tests.pipelines.test_decode import DAMAGE

CPU = torch.device("cpu")
POLICY = SimCLRPolicy(size=24, blur_prob=0.5)
Picture = Callable[..., Pixels]
Encode = Callable[..., bytes]


@pytest.fixture
def backend() -> Dali:
    return Dali([POLICY, POLICY], CPU, 1)


def as_on_cuda(policies: list[SimCLRPolicy]) -> Dali:
    """A back-end whose graph crops, as on CUDA, though on the CPU."""
    made = Dali(policies, CPU, 1)
    made._cropped = [True] * len(policies)
    return made


def drawn(images: list[bytes], seed: int = 0) -> list[ViewParams]:
    sizes_N2 = np.array([decode(image).shape[:2] for image in images], np.int32)
    positions = np.arange(len(images))
    return [
        POLICY.draw(seed=seed, epoch=0, positions=positions, view=view, sizes_N2=sizes_N2)
        for view in (0, 1)
    ]


@pytest.fixture
def batches(picture: Picture, encode: Encode) -> list[tuple[list[bytes], list[ViewParams]]]:
    """Five batches of 3 to 9 JPEGs and PNGs of many sizes, with the numbers of two views."""
    rng, found = np.random.default_rng(0), []
    for seed, n in enumerate((4, 9, 3, 9, 5)):
        sizes = rng.integers(10, 120, (n, 2))
        kinds = ["JPEG" if k % 3 else "PNG" for k in range(n)]
        images = [encode(picture(*hw, k), kind) for k, (hw, kind) in enumerate(zip(sizes, kinds))]  # noqa: B905
        found.append((images, drawn(images, seed)))
    return found


# Formats.


def every_format(picture: Picture, encode: Encode) -> dict[str, tuple[bytes, bool]]:
    """Images, and whether DALI decodes them itself."""
    pixels = picture(45, 61, 1)
    image = Image.fromarray(pixels)
    gray, clear = image.convert("L"), image.convert("RGBA")
    clear.putalpha(gray)
    deep = Image.fromarray(np.arange(45 * 61, dtype=np.uint16).reshape(45, 61) * 23)
    exif = Image.Exif()
    exif[0x112] = 6  # rotated by 90 degrees
    first = tuple(int(level) for level in pixels[0, 0])
    return {
        "jpeg": (encode(image, "JPEG"), True),
        "jpeg 4:4:4": (encode(image, "JPEG", subsampling=0), True),
        "jpeg 4:2:2": (encode(image, "JPEG", subsampling=1), True),
        "jpeg progressive": (encode(image, "JPEG", progressive=True), True),
        "jpeg gray": (encode(gray, "JPEG"), True),
        "jpeg rgb": (encode(image, "JPEG", keep_rgb=True), True),
        "jpeg rotated": (encode(image, "JPEG", exif=exif), True),
        "jpeg with bytes after it": (encode(image, "JPEG") + b"more", True),
        "jpeg 1x1": (encode(image.crop((0, 0, 1, 1)), "JPEG"), True),
        "jpeg cmyk": (encode(image.convert("CMYK"), "JPEG"), False),
        "png": (encode(image, "PNG"), True),
        "png gray": (encode(gray, "PNG"), True),
        "png palette": (encode(image.quantize(200), "PNG"), True),
        "png palette of 2 bit": (encode(image.quantize(4), "PNG", bits=2), True),
        "png palette with holes": (encode(image.quantize(9), "PNG", transparency=0), True),
        "png black and white": (encode(image.convert("1"), "PNG"), True),
        "png gray alpha": (encode(image.convert("LA"), "PNG"), True),
        "png alpha": (encode(clear, "PNG"), True),
        "png one colour clear": (encode(image, "PNG", transparency=first), True),
        "png rotated": (encode(image, "PNG", exif=exif), True),
        "png 1x1": (encode(image.crop((0, 0, 1, 1)), "PNG"), True),
        "png animated": (encode(image, "PNG", save_all=True, append_images=[clear]), True),
        "png 16 bit": (encode(deep, "PNG"), False),
        "webp": (encode(image, "WEBP"), False),
        "webp alpha": (encode(clear, "WEBP", lossless=True), False),
    }


def test_every_format_has_the_pixels_of_decode(picture: Picture, encode: Encode) -> None:
    """Whole images at their own size, which the resize leaves alone: DALI's decode itself."""
    for name, (data, by_dali) in every_format(picture, encode).items():
        fed, expected = feedable(data), decode(data)
        assert (fed == data) == by_dali, name
        assert size_of(fed) == expected.shape[:2], name
        pipeline = Pipeline(1, 1, device_id=None, prefetch_queue_depth=1)
        with pipeline:
            pipeline.set_outputs(*graph("cpu", [False], [False], 8, (1, 1)))
        pipeline.build()
        pipeline.feed_input("encoded", [np.frombuffer(fed, np.uint8)])
        assert np.array_equal(np.array(pipeline.run()[0].at(0)), expected), name


def test_formats_in_one_batch_have_the_views_of_their_pixels(
    backend: Dali, picture: Picture, encode: Encode
) -> None:
    images = [data for data, _ in every_format(picture, encode).values()]
    params = drawn(images)
    views = backend(images, params)
    assert views.shape == (2, len(images), 24, 24, 3) and views.dtype == torch.uint8
    plain = [encode(decode(image), "PNG") for image in images]
    assert torch.equal(views, backend(plain, params))


# Damage.


def png_damage(data: bytes) -> dict[str, bytes]:
    middle = len(data) // 2
    return {
        "half": data[:middle],
        "end without middle": data[:60] + data[-12:],
        "no more than a start and an end": data[:8] + data[-12:],
        "all but a header": data[:16] + data[-12:],
        "zeroed": data[:middle] + bytes(40) + data[middle + 40 :],
        "one bit": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "header only": data[:8],
    }


@pytest.mark.filterwarnings("error")
def test_damage_is_named_by_image_and_the_next_batch_is_right(
    backend: Dali, picture: Picture, encode: Encode
) -> None:
    good = encode(picture(224, 224, 0), "JPEG")
    other = encode(picture(64, 50, 1), "PNG")
    images = [good, other, good]
    params = drawn(images)
    expected = backend(images, params)
    webp = encode(picture(64, 50, 1), "WEBP")
    bad = {name: damage(good) for name, damage in DAMAGE.items()}
    bad |= png_damage(other) | {"GIF": encode(picture(9, 9), "GIF"), "half of a WebP": webp[:300]}
    for name, data in bad.items():
        with pytest.raises(DamagedImages) as caught:
            backend([data, other, data], params)
        assert list(caught.value.reasons) == [0, 2], name
        assert "image 0" in str(caught.value) and "image 2" in str(caught.value)
        assert torch.equal(backend(images, params), expected), name


def test_what_dali_alone_refuses_gets_the_pixels_of_decode(
    backend: Dali, picture: Picture, encode: Encode
) -> None:
    """A checksum is wrong, not the pixels: Pillow compares those of their own stream alone."""
    plain = encode(picture(30, 40, 2), "PNG")
    odd = plain[:-16] + zlib.crc32(b"other").to_bytes(4, "big") + plain[-12:]
    assert np.array_equal(decode(odd), decode(plain))
    good = encode(picture(30, 40, 3), "JPEG")
    params = drawn([plain, good])
    with pytest.warns(UserWarning, match="DALI refused a batch"):
        views = backend([odd, good], params)
    assert torch.equal(views, backend([plain, good], params))


@pytest.mark.filterwarnings("error")
def test_a_png_without_its_last_bytes_has_all_its_pixels(
    backend: Dali, picture: Picture, encode: Encode
) -> None:
    plain = encode(picture(30, 40, 2), "PNG")
    params = drawn([plain] * 2)
    assert torch.equal(backend([plain[:-12], plain + b"x"], params), backend([plain] * 2, params))


def test_a_size_beyond_the_limit_is_refused_before_any_pixel(backend: Dali, encode: Encode) -> None:
    side = int(MAX_PIXELS**0.5) + 1
    huge = encode(Image.new("1", (side, side)), "PNG")
    small = encode(Image.new("RGB", (8, 8)), "PNG")
    before = psutil.Process().memory_info().rss
    with pytest.raises(DamagedImages, match="more than the limit") as caught:
        backend([small, huge], drawn([small, small]))
    assert list(caught.value.reasons) == [1]
    assert psutil.Process().memory_info().rss - before < side * side


def test_a_failure_that_is_nobodys_damage_is_not_hidden(picture: Picture, encode: Encode) -> None:
    backend = as_on_cuda([POLICY, POLICY])
    images = [encode(picture(20, 20, 1), "JPEG")]
    params = drawn([encode(picture(90, 90, 1), "JPEG")])  # a crop beyond the image
    params[0].box_N4[:] = (0, 0, 90, 90)
    with pytest.raises(RuntimeError), pytest.warns(UserWarning):
        backend(images, params)
    good = drawn(images)
    assert torch.equal(backend(images, good), as_on_cuda([POLICY, POLICY])(images, good))
    with pytest.raises(ValueError, match="a crop must lie inside"):
        Dali([POLICY, POLICY], CPU, 1)(images, params)


# Batches.


def test_batches_of_any_length_from_several_threads(
    backend: Dali, batches: list[tuple[list[bytes], list[ViewParams]]]
) -> None:
    expected = [Dali([POLICY, POLICY], CPU, 1)(*batch) for batch in batches]
    built, build = [], backend._build
    backend._build = lambda sources: built.append(len(sources)) or build(sources)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda k: backend(*batches[k % 5]), range(40)))
    assert all(torch.equal(views, expected[k % 5]) for k, views in enumerate(made))
    assert built == sorted(set(built)), "one pipeline, which grows"


def test_crops_of_the_graph_are_near_those_of_the_shared_kernel(
    batches: list[tuple[list[bytes], list[ViewParams]]],
) -> None:
    for images, params in batches:
        no = np.zeros(len(images), bool)
        params = [replace(p, jitter_N=no, gray_N=no, blur_N=no) for p in params]
        here = Dali([POLICY, POLICY], CPU, 1)(images, params)
        there = as_on_cuda([POLICY, POLICY])(images, params)
        difference = (here.int() - there.int()).abs().float()
        assert 0 < difference.mean() < 0.3 and difference.max() <= 12


def test_views_of_two_policies(picture: Picture, encode: Encode) -> None:
    images = [encode(picture(60, 60, k), "JPEG") for k in range(3)]
    params = drawn(images)
    still = SimCLRPolicy(size=24, jitter_prob=0, grayscale_prob=0, blur_prob=0)
    params.append(
        still.draw(
            seed=0, epoch=0, positions=np.arange(3), view=2, sizes_N2=np.full((3, 2), 60, np.int32)
        )
    )
    three = Dali([POLICY, POLICY, still], CPU, 1)(images, params)
    assert torch.equal(three[:2], Dali([POLICY, POLICY], CPU, 1)(images, params[:2]))
    assert torch.equal(three[2], Dali([still], CPU, 1)(images, params[2:])[0])


def test_memory_stays_flat(
    backend: Dali, batches: list[tuple[list[bytes], list[ViewParams]]]
) -> None:
    def run(n: int) -> int:
        for k in range(n):
            backend(*batches[k % 5])
        return psutil.Process().memory_info().rss

    warm = run(60)
    assert run(600) - warm < 12 << 20


def test_the_loader_makes_the_same_batches_with_any_threads(shard_set: ShardSet) -> None:
    def views(num_threads: int) -> Iterator[torch.Tensor]:
        loader = make_loader(
            shard_set,
            POLICY,
            backend="dali",
            micro_batch_size=4,
            world=World(),
            num_threads=num_threads,
        )
        batches = iter(loader)
        for _ in range(8):  # more than an epoch
            yield next(batches).views_VBCHW

    assert all(torch.equal(a, b) for a, b in zip(views(1), views(3), strict=True))
    assert threading.active_count() < 20


# Colours by matrices.


def test_affine_colours_are_the_matrices_applied_to_the_crops(
    picture: Picture, encode: Encode
) -> None:
    images = [encode(picture(50 + k, 60, k), "JPEG") for k in range(12)]
    params = drawn(images)
    affine = replace(POLICY, colour_model="affine", blur_prob=0)
    plain = [replace(p, blur_N=np.zeros(12, bool)) for p in params]
    views, exact = Dali([affine, POLICY], CPU, 1)(images, plain)
    assert torch.equal(exact, Dali([POLICY, POLICY], CPU, 1)(images, plain)[1])
    no = np.zeros(12, bool)
    (crops,) = as_on_cuda([POLICY])(images, [replace(plain[0], jitter_N=no, gray_N=no)])
    a_N33, b_N33 = matrices(params[0])
    levels = crops.numpy().astype(float)
    expected = np.einsum("nij,nhwj->nhwi", a_N33, levels)
    expected += np.einsum("nij,nj->ni", b_N33, levels.mean((1, 2)))[:, None, None]
    expected = expected.round().clip(0, 255)
    assert np.abs(views.numpy() - expected).max() <= 1
    assert (views.numpy() != expected).mean() < 0.001
    assert np.abs(crops.numpy() - expected).mean() > 10, "no colour was changed"


def test_affine_views_are_blurred_as_others_are(picture: Picture, encode: Encode) -> None:
    images = [encode(picture(60, 60, k), "JPEG") for k in range(6)]
    affine = replace(POLICY, colour_model="affine")
    no = np.zeros(6, bool)
    params = [replace(p, jitter_N=no, gray_N=no) for p in drawn(images)]
    assert params[0].blur_N.any()
    assert torch.equal(
        Dali([affine, affine], CPU, 1)(images, params),
        as_on_cuda([POLICY, POLICY])(images, params),
    )


@pytest.mark.parametrize("name", sorted(BACKENDS.keys() - {"dali"}))
def test_other_backends_refuse_affine_colours(name: str) -> None:
    with pytest.raises(ConfigError, match="colour_model"):
        BACKENDS[name]([POLICY, replace(POLICY, colour_model="affine")], CPU, 1)


def test_an_unknown_colour_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="'linear': choose exact or affine"):
        replace(POLICY, colour_model="linear")  # pyright: ignore[reportArgumentType]


# Without DALI, and without a GPU.


def test_without_dali_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pipelines.augment_dali")
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ConfigError, match=r"pip install 'fastclr\[dali\]'"):
        BACKENDS["dali"]([POLICY, POLICY], torch.device("cuda"), 1)


def described(device: str) -> dict[str, tuple[str, list[str]]]:
    """Operator, inputs and arguments of what DALI was told, by output; nothing is built."""
    pipeline = Pipeline(4, 1, device_id=0 if device == "gpu" else None)
    with pipeline:
        waiting = [
            view.source
            for view in graph(device, [False, False, True], [True] * 3, 64, (3000, 4000))
        ]
    found = {}
    while waiting:
        operator = waiting.pop()
        lines = [line.strip() for line in repr(operator.spec).splitlines()]
        (output,) = operator.outputs
        kept = [line for line in lines if not line.startswith(("_origin", "__"))]
        found[f"{output.name}_{output.device}"] = (lines[0], kept + sorted(lines[2:5]))
        inputs = [node for group in operator.inputs for node in np.ravel(group)]
        waiting += [node.source for node in inputs]
    return found


def test_one_graph_for_both_devices() -> None:
    """DALI checks names and devices of operators when they are named, without a GPU."""
    host, card = described("cpu"), described("gpu")
    assert len(host) == len(card) == 1 + 1 + 3 * (2 + 4) + 7  # the last: those of the affine view
    as_on_host = {
        name.replace("_gpu", "_cpu"): repr(op).replace("gpu", "cpu").replace("mixed", "cpu")
        for name, op in card.items()
    }
    assert as_on_host == {name: repr(op) for name, op in host.items()}


def test_the_gpu_decodes_once_and_stays_there() -> None:
    card = described("gpu")
    decoders = [args for kind, args in card.values() if kind == "OpSpec for decoders__Image:"]
    assert len(decoders) == 1
    assert {
        "device: mixed",
        "adjust_orientation: False",
        "jpeg_fancy_upsampling: True",
        "preallocate_height_hint: 3000",
        "preallocate_width_hint: 4000",
        "device_memory_padding: 72000000",
        "host_memory_padding: 48000000",
    } <= set(decoders[0])
    for kind, args in card.values():
        if "ExternalSource" not in kind and "Image" not in kind:
            assert "device: gpu" in args
    # What lies on the host are the inputs alone, and no image is among them but the encoded one.
    inputs = {name.removesuffix("_cpu").rstrip("012") for name in card if name.endswith("_cpu")}
    assert inputs == {"encoded", "start", "shape", "first", "last", "A", "B"}


def test_on_a_gpu_torchs_stream_waits_and_the_colours_stay_there(
    monkeypatch: pytest.MonkeyPatch, picture: Picture, encode: Encode
) -> None:
    """A double of the pipeline: what is asked of DALI and torch on ``cuda:1``.

    Its ``run`` has DALI's own signature, where a name would be that of an input.
    """
    asked: dict[str, Any] = {"fed": []}
    crop = torch.zeros(2, 24, 24, 3, dtype=torch.uint8)

    class Double:
        max_batch_size = 2

        def __init__(self, **settings: Any) -> None:
            asked.update(settings)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

        def set_outputs(self, *nodes: Any) -> None:
            asked["nodes"] = nodes

        def build(self) -> None: ...

        def feed_input(self, name: str, feed: Any) -> None:
            asked["fed"].append(name)

        def run(self, *args: Any, **how: Any) -> list[Any]:
            asked.update(inspect.signature(Pipeline.run).bind(self, *args, **how).arguments)
            return [SimpleNamespace(as_tensor=lambda: crop)] * 2

    monkeypatch.setattr(augment_dali, "Pipeline", Double)
    monkeypatch.setattr(augment_dali, "graph", lambda device, *_: [device])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    images = [encode(picture(30, 30, k), "JPEG") for k in range(2)]
    Dali([POLICY, POLICY], torch.device("cuda", 1), 3)(images, drawn(images))
    assert asked["device_id"] == 1 and asked["num_threads"] == 3 and asked["nodes"] == ("gpu",)
    assert asked["cuda_stream"] == "stream of cuda:1"
    assert sorted(asked["fed"]) == sorted(
        ["encoded"] + [f"{n}{v}" for n in ("start", "shape", "first", "last") for v in (0, 1)]
    )


def test_pnm_keeps_every_level() -> None:
    pixels = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    assert as_pnm(pixels) == b"P6 16 16 255\n" + pixels.tobytes()
    assert size_of(as_pnm(pixels[:3])) == (3, 16)
