"""The SimCLR augmentation policy: draws every random number; back-ends only apply them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from fastclr.config import ViewsConfig, raise_all
from pipelines.order import Int64, uniforms

# Additive brightness takes the place of the other in an order; it has its column of the factors.
BRIGHTNESS, CONTRAST, SATURATION, HUE, ADDITION = range(5)
_ORDERS = np.array(list(itertools.permutations(range(4))), np.uint8)
_TRIES = 10  # torchvision's RandomResizedCrop gives up after as many

# Fixed slots of the uniforms of one view: a new operation appends, so that no old number changes.
_AREA, _RATIO, _TOP, _LEFT = (slice(k * _TRIES, (k + 1) * _TRIES) for k in range(4))
_FLIP, _JITTER, _FACTORS, _ORDER, _GRAY, _BLUR, _SIGMA = 40, 41, slice(42, 46), 46, 47, 48, 49
_NUM_SLOTS = 50


@dataclass(frozen=True)
class ViewParams:
    """Numbers of n views, struct of arrays.

    Attributes:
        box_N4: int32 top, left, height, width of the crop in source pixels.
        flip_N: bool; mirror after the crop.
        jitter_N: bool; whether the four colour steps apply.
        factors_N4: float32 brightness, contrast, saturation (multiplicative), hue (turns). Where
            brightness is additive, the first is what is added to colours of 0..1.
        order_N4: uint8; the colour steps in the order they are applied: four of :data:`BRIGHTNESS`
            to :data:`ADDITION`. Step k takes factor k modulo 4.
        gray_N: bool; drop the colour.
        blur_N: bool; blur last.
        sigma_N: float32 standard deviation of the blur in pixels of the view.
    """

    box_N4: npt.NDArray[np.int32]
    flip_N: npt.NDArray[np.bool_]
    jitter_N: npt.NDArray[np.bool_]
    factors_N4: npt.NDArray[np.float32]
    order_N4: npt.NDArray[np.uint8]
    gray_N: npt.NDArray[np.bool_]
    blur_N: npt.NDArray[np.bool_]
    sigma_N: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.flip_N)

    def __getitem__(self, rows: slice | Int64) -> ViewParams:
        return ViewParams(*(getattr(self, f.name)[rows] for f in fields(self)))


@dataclass(frozen=True)
class SimCLRPolicy(ViewsConfig):
    """The augmentation of Chen et al. 2020, appendix A, in torchvision's meaning.

    Crop, resize with antialiased bicubic to ``size`` and round to 8 bit; flip; jitter in the drawn
    order, clipped after each step, HSV hue, contrast around the mean gray; grayscale; round to 8
    bit; blur; round to 8 bit. Additive brightness, where asked for, is the authors' first one.

    Raises:
        ConfigError: If a number is out of range.
    """

    def __post_init__(self) -> None:
        """Check the ranges."""
        raise_all(self.problems())

    def draw(
        self, *, seed: int, epoch: int, positions: Int64, view: int, sizes_N2: npt.NDArray[np.int32]
    ) -> ViewParams:
        """Draw the numbers of one view of n samples; a pure function of its arguments.

        A view depends neither on the batch it is drawn in nor on the rank; sigma, where images
        share it, on the position of the first of them.

        Args:
            seed: Seed of the run.
            epoch: Epoch from 0.
            positions: int64 (n,), places in the epoch's order.
            view: Index of the view.
            sizes_N2: int32 (n, 2), height and width of the source images in pixels.
        """
        # 1 keeps the hash apart from the one that orders the samples.
        u = uniforms(seed, 1, epoch, view, np.asarray(positions)[:, None], np.arange(_NUM_SLOTS))
        group_N = np.asarray(positions) // self.blur_sigma_images
        u_sigma_N = uniforms(seed, 1, epoch, view, group_N, _SIGMA)
        strength = np.array([0.8, 0.8, 0.8, 0.2]) * self.color_strength
        centre = np.array([1.0, 1.0, 1.0, 0.0])
        low, high = centre - strength, centre + strength
        low[:HUE] = np.maximum(low[:HUE], 0)
        order_N4 = _ORDERS[(u[:, _ORDER] * len(_ORDERS)).astype(int)]
        if self.brightness == "additive":
            low[BRIGHTNESS], high[BRIGHTNESS] = -strength[BRIGHTNESS], strength[BRIGHTNESS]
            order_N4 = np.where(order_N4 == BRIGHTNESS, np.uint8(ADDITION), order_N4)
        return ViewParams(
            box_N4=self._boxes(u, sizes_N2),
            flip_N=u[:, _FLIP] < self.flip_prob,
            jitter_N=u[:, _JITTER] < self.jitter_prob,
            factors_N4=(low + (high - low) * u[:, _FACTORS]).astype(np.float32),
            order_N4=order_N4,
            gray_N=u[:, _GRAY] < self.grayscale_prob,
            blur_N=u[:, _BLUR] < self.blur_prob,
            sigma_N=_between(self.blur_sigma, u_sigma_N).astype(np.float32),
        )

    def _boxes(
        self, u: npt.NDArray[np.float64], sizes_N2: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int32]:
        """Crop boxes by torchvision's rule: ten tries, then the largest central crop."""
        height, width = sizes_N2[:, 0].astype(np.float64), sizes_N2[:, 1].astype(np.float64)
        area = _between(self.crop_scale, u[:, _AREA]) * (height * width)[:, None]
        ratio = np.exp(_between(tuple(np.log(self.crop_ratio)), u[:, _RATIO]))
        w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
        row, first = np.arange(len(u)), fits.argmax(1)
        w, h = w[row, first], h[row, first]
        top = np.floor(u[:, _TOP][row, first] * (height - h + 1))
        left = np.floor(u[:, _LEFT][row, first] * (width - w + 1))

        low, high = self.crop_ratio
        central_w = np.maximum(np.minimum(width, np.rint(height * high)), 1)
        central_h = np.maximum(np.minimum(height, np.rint(width / low)), 1)
        central = [(height - central_h) // 2, (width - central_w) // 2, central_h, central_w]
        drawn = np.stack([top, left, h, w], 1)
        accepted = np.any(fits, axis=1, keepdims=True)
        return np.where(accepted, drawn, np.stack(central, 1)).astype(np.int32)


def _between(bounds: tuple[float, ...], u: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Map [0, 1) to [low, high)."""
    low, high = bounds
    return low + (high - low) * u
