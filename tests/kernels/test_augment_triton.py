"""The fused augmentation, interpreted or on a GPU, against the reference.

``make gpu-check`` runs it on a GPU. More sizes, and every back-end's common tests:
tests/pipelines/test_augment.py.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastclr.config import ConfigError
from pipelines import augment_triton as fused
from pipelines import kernels_triton as kernels
from pipelines.augment_reference import augment as reference
from pipelines.backends import BACKENDS
from pipelines.policy import SimCLRPolicy, ViewParams
from tests.device import DEVICE


def picture(height, width, seed=0):
    """Colourful waves with noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / a + y / b + c) for a, b, c in rng.uniform(2, 12, (3, 3))]
    pixels = 128 + 95 * np.stack(waves, -1) + rng.normal(0, 10, (height, width, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def plain(images, **changes):
    """Numbers that change nothing but the size, and what is to differ."""
    n = len(images)
    params = ViewParams(
        box_N4=np.array([(0, 0, *image.shape[:2]) for image in images], np.int32),
        flip_N=np.zeros(n, bool),
        jitter_N=np.zeros(n, bool),
        factors_N4=np.array([[1, 1, 1, 0]] * n, np.float32),
        order_N4=np.array([[0, 1, 2, 3]] * n, np.uint8),
        gray_N=np.zeros(n, bool),
        blur_N=np.zeros(n, bool),
        sigma_N=np.full(n, 0.1, np.float32),
    )
    return replace(params, **{k: np.array(v, getattr(params, k).dtype) for k, v in changes.items()})


def drawn(images, policy, view=0, epoch=0):
    sizes_N2 = np.array([image.shape[:2] for image in images], np.int32)
    positions = np.arange(len(images))
    return policy.draw(seed=3, epoch=epoch, positions=positions, view=view, sizes_N2=sizes_N2)


def made(images, params, policy, dtype=torch.uint8):
    """One view, on the host."""
    return fused.augment(images, [params], [policy], DEVICE, dtype)[0].cpu()


def assert_close(found, expected, limits):
    assert found.dtype == expected.dtype == torch.uint8 and found.shape == expected.shape
    difference = (found.int() - expected.int()).abs().numpy()
    errors = difference.mean(), np.percentile(difference, 99), difference.max()
    assert all(e <= limit for e, limit in zip(errors, limits, strict=True)), errors


def test_every_order_of_the_steps():
    orders = [*itertools.permutations(range(4))]
    images = [picture(30, 24, k) for k in range(24)]
    strong = [(1.6, 1.7, 0.4, 0.2), (0.5, 0.3, 1.8, -0.4)] * 12
    params = plain(images, jitter_N=[True] * 24, order_N4=orders, factors_N4=strong)
    policy = SimCLRPolicy(size=20)
    views = made(images, params, policy)
    expected = reference(images, params, policy)
    assert_close(views, expected, (0.03, 1, 4))
    for k in range(24):
        assert_close(views[k], expected[k], (0.2, 2, 4))


def test_brightness_that_is_added():
    images = [picture(30, 24, k) for k in range(4)]
    factors = [(shift, 1.2, 0.8, 0.1) for shift in (-0.7, -0.1, 0.2, 0.8)]
    orders = [(4, 1, 2, 3), (1, 4, 3, 2), (3, 2, 4, 1), (2, 1, 3, 4)]
    params = plain(images, jitter_N=[True] * 4, order_N4=orders, factors_N4=factors)
    policy = SimCLRPolicy(size=20)
    assert_close(made(images, params, policy), reference(images, params, policy), (0.03, 1, 4))


SIZES = [(70, 45), (1, 1), (33, 90), (45, 45)]


def test_two_views_of_ragged_images_on_several_tiles():
    policies = [SimCLRPolicy(size=45, blur_prob=1.0), SimCLRPolicy(size=45, blur_prob=0.3)]
    images = [picture(h, w, k) for k, (h, w) in enumerate(SIZES)]
    images[3][:] = images[3][..., :1]  # a grey one
    params = [drawn(images, policy, view) for view, policy in enumerate(policies)]
    assert params[0].blur_N.all() and 0 < params[1].blur_N.sum() < len(SIZES)
    views = fused.augment(images, params, policies, DEVICE)
    assert views.shape == (2, len(SIZES), 45, 45, 3) and views.is_contiguous()
    for view, p, policy in zip(views.cpu(), params, policies, strict=True):
        assert_close(view, reference(images, p, policy), (0.008, 0, 4))


def test_a_view_does_not_depend_on_its_batch():
    policy = SimCLRPolicy(size=20)
    images = [picture(20 + k, 24 - k, k) for k in range(8)]
    params = drawn(images, policy)
    assert params.blur_N[:4].any() and params.blur_N[4:].any()
    whole = made(images, params, policy)
    halves = [made(images[k : k + 4], params[k : k + 4], policy) for k in (0, 4)]
    assert torch.equal(whole, torch.cat(halves))
    backwards = np.arange(8)[::-1]
    turned = made(images[::-1], params[backwards], policy)
    assert torch.equal(whole.flip(0), turned)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (4, 1500, (0, 200, 4, 1300)),
        (300, 3, (1, 0, 299, 3)),
        (40, 40, (39, 39, 1, 1)),
        (9, 9, (2, 3, 5, 4)),
    ],
)
def test_extreme_crops(height, width, box):
    """Strong shrinking, and enlarging; the crop's edges are those of the filter."""
    images = [picture(height, width, 5)] * 2
    params = plain(images, box_N4=[box] * 2, flip_N=[False, True])
    policy = SimCLRPolicy(size=21)
    views = made(images, params, policy)
    assert_close(views, reference(images, params, policy), (0.01, 0, 1))
    assert torch.equal(views[0], views[1].flip(1))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0, 9.0])
def test_blur(sigma):
    """Taps that matter only; with sigma 9 all there are, far from a whole Gaussian."""
    images = [picture(80, 80, 6)]
    policy = SimCLRPolicy(size=80)
    assert policy.blur_taps == 9
    params = plain(images, blur_N=[True], sigma_N=[sigma])
    assert_close(made(images, params, policy), reference(images, params, policy), (0.001, 0, 1))


def test_flat_and_saturated_colours():
    """Hue and saturation of pixels that have none, and levels at the ends of their range."""
    levels = np.array(list(itertools.product((0, 128, 255), repeat=3)), np.uint8)
    image = np.resize(levels, (27, 27, 3))
    images = [image] * 4
    factors = [(1.8, 1, 1, 0.5), (1, 1.8, 1, -0.5), (1, 0.2, 1.8, 0.3), (0.2, 1, 0.2, 0.0)]
    params = plain(images, jitter_N=[True] * 4, factors_N4=factors, gray_N=[False] * 3 + [True])
    policy = SimCLRPolicy(size=27)
    assert_close(made(images, params, policy), reference(images, params, policy), (0.02, 1, 2))


def test_bf16_is_what_the_model_makes_of_the_levels():
    images = [picture(30, 30, k) for k in range(4)]
    params = plain(images, blur_N=[True, False] * 2, sigma_N=[1.0] * 4)
    policy = SimCLRPolicy(size=30)
    levels = made(images, params, policy)
    found = made(images, params, policy, torch.bfloat16)
    expected = levels.to(torch.bfloat16) / 255  # fastclr/simclr.py
    assert found.dtype == torch.bfloat16
    if kernels.interpreted():  # it cuts where a GPU rounds
        assert (found.view(torch.int16) - expected.view(torch.int16)).abs().max() <= 1
    else:
        assert torch.equal(found, expected)


def test_colour_and_blur_of_ready_crops():
    images = [picture(40, 30, k) for k in range(6)]
    policy = SimCLRPolicy(size=30, blur_prob=0.5)
    params = drawn(images, policy, epoch=4)
    assert 0 < params.blur_N.sum() < 6 and 0 < params.jitter_N.sum() < 6
    nothing = np.zeros(6, bool)
    bare = replace(params, jitter_N=nothing, gray_N=nothing, blur_N=nothing)
    crops = fused.augment(images, [bare], [policy], DEVICE)[0]
    kept = crops.clone()
    views = fused.colour_and_blur(crops, params, policy)
    assert torch.equal(views.cpu(), made(images, params, policy))
    assert torch.equal(crops, kept) and not torch.equal(views, crops)


@pytest.mark.parametrize("blurred", [False, True])
def test_all_views_take_four_launches(monkeypatch, blurred):
    launched = []

    class Counted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("_resize", "_sum_gray", "_colour", "_blur"):
        monkeypatch.setattr(kernels, name, Counted(name, getattr(kernels, name)))
    policy = SimCLRPolicy(size=20, blur_prob=float(blurred))
    images = [picture(20, 20, k) for k in range(2)]
    params = [drawn(images, policy, view) for view in range(2)]
    monkeypatch.setattr(fused, "check_device", lambda _: None)
    fused.augment(images, params, [policy] * 2, DEVICE)
    assert launched == ["_resize", "_sum_gray", "_colour"] + ["_blur"] * blurred


def test_only_what_the_crops_see_is_sent(monkeypatch):
    sent = []
    resize = kernels.resize
    monkeypatch.setattr(kernels, "resize", lambda s, *rest: (sent.append(s), resize(s, *rest)))
    images = [picture(500, 400, 1), picture(30, 30, 2)]
    boxes = [[(100, 50, 40, 20), (0, 0, 10, 10)], [(120, 60, 30, 30), (5, 5, 10, 10)]]
    params = [plain(images, box_N4=b) for b in boxes]
    policy = SimCLRPolicy(size=16)
    views = fused.augment(images, params, [policy] * 2, DEVICE)
    seen = 50 * 40 * 3 + 15 * 15 * 3
    assert seen <= sent[0].numel() < seen + 2 * 16 + 4 * 4 * kernels.COLUMNS.value
    for view, p in zip(views.cpu(), params, strict=True):
        assert_close(view, reference(images, p, policy), (0.01, 0, 1))


def test_without_a_gpu_it_is_refused(monkeypatch):
    policies = [SimCLRPolicy(size=20)] * 2
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    with pytest.raises(ConfigError, match="was given the device cpu: its kernels run on CUDA"):
        BACKENDS["triton"](policies, torch.device("cpu"), 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device cuda, and torch finds no GPU"):
        BACKENDS["triton"](policies, torch.device("cuda"), 1)
    monkeypatch.setattr(kernels, "interpreted", lambda: True)
    with pytest.raises(ConfigError, match="Unset TRITON_INTERPRET"):
        BACKENDS["triton"](policies, torch.device("cuda"), 1)
