"""Back-ends give the reference's pixels for the same numbers; the reference gives torchvision's.

Limits on the absolute error in 0..255 levels are what was measured, doubled or more. What is left
comes from sums that end near .5 before a rounding to 8 bit; the jitter can enlarge such a level.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as pil_ops
from torchvision.transforms.v2 import functional as tensor_ops

from pipelines import kernels_triton
from pipelines.augment_reference import augment as reference
from pipelines.backends import BACKENDS, Augment
from pipelines.decode import Pixels
from pipelines.policy import SimCLRPolicy, ViewParams
from tests.device import DEVICE

Picture = Callable[..., Pixels]


@pytest.fixture(autouse=True, scope="module")
def large_tiles() -> Iterator[None]:
    """Interpreted, an operation costs the same on any tile; tests/kernels has the real ones."""
    with pytest.MonkeyPatch.context() as patch:
        if kernels_triton.interpreted():
            patch.setattr(kernels_triton, "TILE", {"ROWS": 128, "ACROSS": 512, "AT_ONCE": 64})
        yield


DALI_CROPS = "dali, with the crops of CUDA's graph"
NAMES = [*BACKENDS, DALI_CROPS] if DEVICE.type == "cpu" else [*BACKENDS]


def one_view(name: str) -> Augment:
    """Return a back-end as a function that makes one view of decoded images."""

    def augment(
        images: Sequence[Pixels], params: ViewParams, policy: SimCLRPolicy, device: torch.device
    ) -> torch.Tensor:
        backend = BACKENDS[name.split(",")[0]]([policy], device, 1)
        if name == DALI_CROPS:
            backend._cropped = [True]  # pyright: ignore[reportAttributeAccessIssue]
        source = [png(image) for image in images] if backend.takes_bytes else images
        (views,) = backend(source, [params])
        return views.cpu()

    return augment


def png(image: Pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    """Every registered back-end: a new one is not in use without this proof."""
    return request.param


@pytest.fixture
def augment(backend: str) -> Augment:
    return one_view(backend)


Limits = tuple[float, float, int]

# Back-ends whose resize is not Pillow's to the last bit. DALI neither rounds nor clips between its
# two passes, and beyond the border of a crop it repeats the last pixel where Pillow sees nothing.
RESIZE: dict[str, Limits] = {NAMES[-1] if DEVICE.type == "cpu" else "dali": (0.3, 3, 12)}


def loosened(limits: Limits, backend: str, times: float = 1) -> Limits:
    """Add what the back-end's resize may differ by."""
    mean, p99, largest = (times * limit for limit in RESIZE.get(backend, (0, 0, 0)))
    return limits[0] + mean, limits[1] + p99, limits[2] + int(largest)


def identity(sizes: list[tuple[int, int]]) -> ViewParams:
    """Numbers that leave images as they are, but for the resize."""
    n = len(sizes)
    no = np.zeros(n, bool)
    return ViewParams(
        box_N4=np.array([(0, 0, h, w) for h, w in sizes], np.int32),
        flip_N=no,
        jitter_N=no,
        factors_N4=np.array([[1, 1, 1, 0]] * n, np.float32),
        order_N4=np.array([[0, 1, 2, 3]] * n, np.uint8),
        gray_N=no,
        blur_N=no,
        sigma_N=np.full(n, 0.1, np.float32),
    )


def errors(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float, int]:
    """Mean, 99th percentile and maximum of the absolute difference in levels."""
    difference = (a.int() - b.int()).abs().numpy()
    return float(difference.mean()), float(np.percentile(difference, 99)), int(difference.max())


def assert_close(a: torch.Tensor, b: torch.Tensor, limits: Limits) -> None:
    assert a.dtype == b.dtype == torch.uint8 and a.shape == b.shape
    assert a.is_contiguous()
    found = errors(a, b)
    assert all(f <= limit for f, limit in zip(found, limits, strict=True)), found


RAGGED = [(200, 150), (96, 96), (1, 1), (64, 300), (48, 40), (7, 200), (200, 150), (33, 64)]
CASES = {
    "32 to 32": ([(32, 32)] * 16, 32, (0.008, 0, 4)),
    "224 to 32": ([(224, 224)] * 8, 32, (0.008, 0, 4)),
    "ragged to 96": (RAGGED, 96, (0.008, 0, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_whole_views_equal_the_reference(
    augment: Augment, backend: str, picture: Picture, case: str
) -> None:
    sizes, side, limits = CASES[case]
    policy = SimCLRPolicy(size=side, blur_prob=0.7)
    images = [picture(h, w, k) for k, (h, w) in enumerate(sizes)]
    params = policy.draw(
        seed=1,
        epoch=0,
        positions=np.arange(len(sizes)),
        view=0,
        sizes_N2=np.array(sizes, np.int32),
    )
    for name in ("flip_N", "jitter_N", "blur_N"):
        assert 0 < getattr(params, name).sum() < len(sizes), f"{name} is not tested here"
    views = augment(images, params, policy, DEVICE)
    assert_close(views, reference(images, params, policy), loosened(limits, backend))
    assert torch.equal(views, augment(images, params, policy, DEVICE)), "a repeated call differs"


SIZES = [(40, 40), (64, 48), (100, 80), (40, 40)]
OPERATIONS: dict[str, tuple[dict[str, list[object]], Limits]] = {
    "resize": ({}, (0.01, 0, 1)),
    "crop": (
        {"box_N4": [(3, 5, 20, 31), (0, 0, 1, 1), (9, 0, 91, 7), (39, 39, 1, 1)]},
        (0.01, 0, 1),
    ),
    "flip": ({"flip_N": [True, False, True, True]}, (0.01, 0, 1)),
    "gray": ({"gray_N": [True, True, False, True]}, (0.02, 1, 1)),
    "brightness": ({"factors_N4": [(f, 1, 1, 0) for f in (0.2, 0.7, 1.3, 1.8)]}, (0.02, 1, 2)),
    "additive brightness": (
        {
            "factors_N4": [(s, 1.3, 0.7, 0.1) for s in (-0.8, -0.2, 0.3, 0.8)],
            "order_N4": [(4, 1, 2, 3), (3, 4, 2, 1), (1, 2, 3, 4), (2, 3, 4, 1)],
        },
        (0.04, 1, 4),
    ),
    "contrast": ({"factors_N4": [(1, f, 1, 0) for f in (0.2, 0.7, 1.3, 1.8)]}, (0.06, 1, 2)),
    "saturation": ({"factors_N4": [(1, 1, f, 0) for f in (0.2, 0.7, 1.3, 1.8)]}, (0.02, 1, 2)),
    "hue": ({"factors_N4": [(1, 1, 1, f) for f in (-0.5, -0.2, 0.1, 0.5)]}, (0.02, 1, 2)),
    "order": (
        {
            "factors_N4": [(1.6, 1.7, 0.4, 0.2)] * 4,
            "order_N4": [(0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2), (2, 3, 0, 1)],
        },
        (0.02, 1, 4),
    ),
    "blur": (
        {"blur_N": [True, True, False, True], "sigma_N": [0.1, 0.7, 1.0, 2.0]},
        (0.01, 0, 1),
    ),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_alone(
    augment: Augment, backend: str, picture: Picture, operation: str
) -> None:
    changes, limits = OPERATIONS[operation]
    params = identity(SIZES)
    images = [picture(h, w, k) for k, (h, w) in enumerate(SIZES)]
    policy = SimCLRPolicy(size=40)
    values = {k: np.array(v, getattr(params, k).dtype) for k, v in changes.items()}
    jitters = np.full(4, "factors_N4" in changes)
    changed = replace(params, **{"jitter_N": jitters, **values})
    views = augment(images, changed, policy, DEVICE)
    assert_close(views, reference(images, changed, policy), loosened(limits, backend))
    if changes:
        assert not torch.equal(views, augment(images, params, policy, DEVICE)), "does nothing"


@pytest.mark.parametrize(("source", "side"), [(64, 32), (224, 112), (448, 224)])
def test_halves_round_up_as_in_pillow(
    augment: Augment, backend: str, picture: Picture, source: int, side: int
) -> None:
    """At such scales the weights are dyadic, and many sums end at exactly .5."""
    image = picture(source, source, 13)
    views = augment([image], identity([(source, source)]), SimCLRPolicy(size=side), DEVICE)
    plain = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
    assert (
        errors(views[0], torch.from_numpy(np.array(plain)))[0] < loosened((5e-4, 0, 0), backend)[0]
    )


@settings(max_examples=15, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("backend", NAMES)
def test_any_crop_equals_the_reference(data: st.DataObject, backend: str) -> None:
    height, width = data.draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    h, w = data.draw(st.tuples(st.integers(1, height), st.integers(1, width)))
    top, left = data.draw(st.tuples(st.integers(0, height - h), st.integers(0, width - w)))
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    params = replace(identity([(height, width)]), box_N4=np.array([(top, left, h, w)], np.int32))
    policy = SimCLRPolicy(size=data.draw(st.integers(8, 50)))
    views = one_view(backend)([pixels], params, policy, DEVICE)
    # Noise overshoots, and small crops are all border: twenty times what pictures differ by.
    limits = loosened((0.05, 1, 2), backend, times=20)
    assert_close(views, reference([pixels], params, policy), limits)


def test_one_image_in_two_halves_of_a_batch(augment: Augment, picture: Picture) -> None:
    """8 + 8 equals 16 bit for bit."""
    sizes = [(40, 32), (32, 32)] * 8
    policy = SimCLRPolicy(size=32)
    images = [picture(h, w, k) for k, (h, w) in enumerate(sizes)]
    params = policy.draw(
        seed=2, epoch=1, positions=np.arange(16), view=1, sizes_N2=np.array(sizes, np.int32)
    )
    whole = augment(images, params, policy, DEVICE)
    halves = [augment(images[k : k + 8], params[k : k + 8], policy, DEVICE) for k in (0, 8)]
    assert torch.equal(whole, torch.cat(halves))


def test_the_arguments_stay_as_they_are(augment: Augment, picture: Picture) -> None:
    images = [picture(32, 32, k) for k in range(4)]
    kept = [image.copy() for image in images]
    policy = SimCLRPolicy(size=32)
    sizes_N2 = np.full((4, 2), 32, np.int32)
    params = policy.draw(seed=0, epoch=0, positions=np.arange(4), view=0, sizes_N2=sizes_N2)
    again = policy.draw(seed=0, epoch=0, positions=np.arange(4), view=0, sizes_N2=sizes_N2)
    augment(images, params, policy, DEVICE)
    assert all(np.array_equal(a, b) for a, b in zip(images, kept, strict=True))
    assert all(np.array_equal(vars(params)[k], vars(again)[k]) for k in vars(params))


def test_a_full_box_of_the_right_size_is_the_image(augment: Augment, picture: Picture) -> None:
    image = picture(40, 40, 3)
    views = augment([image, image], identity([(40, 40)] * 2), SimCLRPolicy(size=40), DEVICE)
    assert np.array_equal(views[0].numpy(), image) and np.array_equal(views[1].numpy(), image)


def test_one_pixel_crops_are_flat(augment: Augment, picture: Picture) -> None:
    image = picture(30, 50, 4)
    boxes = np.array([(0, 0, 1, 1), (29, 49, 1, 1), (17, 3, 1, 1)], np.int32)
    params = replace(identity([(30, 50)] * 3), box_N4=boxes)
    views = augment([image] * 3, params, SimCLRPolicy(size=16), DEVICE).numpy()
    for view, (top, left, _, _) in zip(views, boxes, strict=True):
        assert (view == image[top, left]).all()


def test_a_flip_mirrors_left_and_right(augment: Augment, backend: str, picture: Picture) -> None:
    image = picture(30, 50, 5)
    params = replace(identity([(30, 50)] * 2), flip_N=np.array([False, True]))
    plain, flipped = augment([image, image], params, SimCLRPolicy(size=24), DEVICE)
    # DALI sums from the other end.
    assert errors(flipped, plain.flip(1))[2] <= (1 if backend == DALI_CROPS else 0)
    assert errors(flipped, plain)[0] > 5


def test_the_crop_sees_no_pixel_outside(augment: Augment, picture: Picture) -> None:
    image = picture(40, 60, 6)
    other = 255 - image
    other[10:30, 20:45] = image[10:30, 20:45]
    box = np.array([(10, 20, 20, 25)] * 2, np.int32)
    params = replace(identity([(40, 60)] * 2), box_N4=box)
    a, b = augment([image, other], params, SimCLRPolicy(size=16), DEVICE)
    assert torch.equal(a, b)


# The reference against plain calls, one image, every operation spelled out.


def test_reference_resizes_across_first_on_every_pillow(picture: Picture) -> None:
    """Pillow 13 turns the passes round for tall images, and the rounding between them with it."""
    image = picture(90, 40, 12)
    view = reference([image], identity([(90, 40)]), SimCLRPolicy(size=24))[0].numpy()
    across = Image.fromarray(image).resize((24, 90), Image.Resampling.BICUBIC)
    plain = across.resize((24, 24), Image.Resampling.BICUBIC)
    assert np.array_equal(view, np.array(plain))


def test_reference_crop_and_resize_are_pillows(picture: Picture) -> None:
    image = picture(50, 70, 7)
    params = replace(identity([(50, 70)]), box_N4=np.array([(4, 9, 33, 41)], np.int32))
    view = reference([image], params, SimCLRPolicy(size=24))[0].numpy()
    plain = Image.fromarray(image).crop((9, 4, 50, 37)).resize((24, 24), Image.Resampling.BICUBIC)
    assert np.array_equal(view, np.array(plain))


@pytest.mark.parametrize("step", range(4))
def test_reference_jitter_is_torchvisions_on_pil(picture: Picture, step: int) -> None:
    image = picture(32, 32, 8)
    factors = [1.5, 0.4, 1.7, -0.15]
    chosen = np.array([1, 1, 1, 0], np.float32)
    chosen[step] = factors[step]
    params = replace(identity([(32, 32)]), jitter_N=np.array([True]), factors_N4=chosen[None])
    view = reference([image], params, SimCLRPolicy(size=32))[0]
    names = ("brightness", "contrast", "saturation", "hue")
    plain = getattr(pil_ops, f"adjust_{names[step]}")(Image.fromarray(image), factors[step])
    # PIL rounds down and turns the hue in 256 steps; a wrong operation is tens of levels off.
    assert errors(view, torch.from_numpy(np.array(plain)))[0] < (3 if names[step] == "hue" else 1)


def test_reference_gray_and_blur_are_torchvisions(picture: Picture) -> None:
    image = picture(60, 60, 9)
    yes = np.array([True])
    policy = SimCLRPolicy(size=60)
    gray = reference([image], replace(identity([(60, 60)]), gray_N=yes), policy)[0]
    plain = torch.from_numpy(np.array(Image.fromarray(image).convert("L")))
    assert errors(gray, plain[..., None].expand(-1, -1, 3))[2] <= 1

    blurred = replace(identity([(60, 60)]), blur_N=yes, sigma_N=np.array([1.5], np.float32))
    assert policy.blur_taps == 7
    x_CHW = torch.from_numpy(image).permute(2, 0, 1) / 255
    plain = tensor_ops.gaussian_blur(x_CHW, [7, 7], [1.5, 1.5])
    found = reference([image], blurred, policy)[0]
    assert errors(found, (plain * 255).round().permute(1, 2, 0).to(torch.uint8))[2] == 0


def test_reference_applies_the_steps_in_the_stated_order(picture: Picture) -> None:
    image = picture(60, 60, 10)
    yes = np.array([True])
    params = replace(
        identity([(60, 60)]),
        flip_N=yes,
        jitter_N=yes,
        factors_N4=np.array([[1.4, 1.6, 0.5, 0.1]], np.float32),
        order_N4=np.array([[3, 1, 0, 2]], np.uint8),
        blur_N=yes,
        sigma_N=np.array([1.0], np.float32),
    )
    x_CHW = torch.from_numpy(image).permute(2, 0, 1).flip(2) / 255
    x_CHW = tensor_ops.adjust_hue(x_CHW, 0.1)
    x_CHW = tensor_ops.adjust_contrast(x_CHW, 1.6)
    x_CHW = tensor_ops.adjust_brightness(x_CHW, 1.4)
    x_CHW = tensor_ops.adjust_saturation(x_CHW, 0.5)
    x_CHW = tensor_ops.gaussian_blur((x_CHW * 255).round() / 255, [7, 7], [1.0, 1.0])
    plain = (x_CHW * 255).round().permute(1, 2, 0).to(torch.uint8)
    assert errors(reference([image], params, SimCLRPolicy(size=60))[0], plain)[2] <= 1


@pytest.mark.parametrize(("side", "taps"), [(8, 1), (32, 3), (96, 9), (224, 23)])
def test_blur_taps_are_a_tenth_of_the_side_and_odd(side: int, taps: int) -> None:
    assert SimCLRPolicy(size=side).blur_taps == taps


def test_views_below_20_pixels_have_no_blur(augment: Augment, picture: Picture) -> None:
    image = picture(16, 16, 11)
    params = replace(identity([(16, 16)]), blur_N=np.array([True]))
    view = augment([image], params, SimCLRPolicy(size=16), DEVICE)[0]
    assert np.array_equal(view.numpy(), image)


def test_kornias_hue_turned_the_short_way(picture: Picture) -> None:
    from kornia.enhance import adjust_hue

    from pipelines.augment_kornia import _hue

    x_NCHW = torch.from_numpy(np.stack([picture(20, 30, k) for k in range(12)])) / 255
    x_NCHW = x_NCHW.permute(0, 3, 1, 2).contiguous()
    x_NCHW[0], x_NCHW[1], x_NCHW[2] = 0, 1, x_NCHW[2, :1]
    x_NCHW[3] = (x_NCHW[3] * 2).round() / 2  # edges between the sixths
    turns_N = torch.linspace(-0.5, 0.5, 12)
    expected = adjust_hue(x_NCHW, turns_N * 2 * torch.pi)
    assert (_hue(x_NCHW, turns_N) - expected).abs().max() < 3e-6
    assert torch.equal(x_NCHW[1], torch.ones_like(x_NCHW[1])), "the input is kept"
