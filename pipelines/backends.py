"""The augmentation back-ends: what one is, and where each is found."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fastclr.config import ConfigError
from pipelines.decode import Pixels
from pipelines.policy import SimCLRPolicy, ViewParams


class Backend(Protocol):
    """Applies drawn numbers to images. It draws none, so all make comparable pixels.

    Attributes:
        takes_bytes: Whether it is given encoded images, checked by their headers, and decodes them
            itself; else decoded ones.
        chunk: Images it is given in one call; None for all of a batch. Calls come from several
            threads at once.
    """

    takes_bytes: bool
    chunk: int | None

    def __call__(
        self, images: Sequence[Pixels] | Sequence[bytes], params: Sequence[ViewParams]
    ) -> torch.Tensor:
        """Make the views of n images.

        Args:
            images: n source images: uint8 (H, W, 3) of any sizes, or encoded.
            params: Numbers of n views, for each of V views.

        Returns:
            uint8 (V, n, size, size, 3), on the device that the work is done on.

        Raises:
            DamagedImages: If encoded images do not decode; names all of them.
        """
        ...


Augment = Callable[[Sequence[Pixels], ViewParams, SimCLRPolicy, torch.device], torch.Tensor]


@dataclass
class ViewByView:
    """A back-end that makes one view after the other with a function."""

    augment: Augment
    policies: Sequence[SimCLRPolicy]
    device: torch.device
    takes_bytes: bool = False
    chunk: int | None = None

    def __call__(
        self, images: Sequence[Pixels] | Sequence[bytes], params: Sequence[ViewParams]
    ) -> torch.Tensor:
        """Make the views of n images; see :class:`Backend`."""
        pairs = zip(params, self.policies, strict=True)
        return torch.stack([self.augment(images, p, policy, self.device) for p, policy in pairs])  # pyright: ignore[reportArgumentType]


# A policy for each view, the device of the views, and the threads of a back-end that has its own.
Make = Callable[[Sequence[SimCLRPolicy], torch.device, int], Backend]


def _exact_colours(backend: str, policies: Sequence[SimCLRPolicy]) -> None:
    """Refuse a policy whose colours the back-end does not make."""
    if any(policy.colour_model != "exact" for policy in policies):
        raise ConfigError(
            f"backend {backend!r} makes exact colours only, views.colour_model asks for others: "
            "set it to exact, or choose the back-end dali."
        )


def _dali(policies: Sequence[SimCLRPolicy], device: torch.device, num_threads: int) -> Backend:
    try:
        from pipelines.augment_dali import Dali
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("nvidia"):
            raise
        raise ConfigError(
            "backend 'dali' needs NVIDIA DALI, which is not installed: pip install 'fastclr[dali]' "
            "(CUDA 13) or 'fastclr[dali-cuda12]', or choose another back-end."
        ) from error
    return Dali(policies, device, num_threads)


def _kornia(policies: Sequence[SimCLRPolicy], device: torch.device, num_threads: int) -> Backend:
    _exact_colours("kornia", policies)
    from pipelines.augment_kornia import augment

    return ViewByView(augment, policies, device)


def _reference(policies: Sequence[SimCLRPolicy], device: torch.device, num_threads: int) -> Backend:
    _exact_colours("reference", policies)
    from pipelines.augment_reference import augment

    return ViewByView(augment, policies, device, chunk=16)


def _triton(policies: Sequence[SimCLRPolicy], device: torch.device, num_threads: int) -> Backend:
    _exact_colours("triton", policies)
    try:
        from pipelines.augment_triton import Triton
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"backend 'triton' needs a package that is not here ({error}): torch brings it "
            "on Linux, with CUDA. Choose another backend."
        ) from error
    return Triton(policies, device)


def _threads(policies: Sequence[SimCLRPolicy], device: torch.device, num_threads: int) -> Backend:
    _exact_colours("threads", policies)
    from pipelines.augment_threads import Threads

    return Threads(policies)


# Each imports its packages when it is chosen: they need not be installed to use another.
BACKENDS: dict[str, Make] = {
    "threads": _threads,
    "kornia": _kornia,
    "dali": _dali,
    "triton": _triton,
    "reference": _reference,
}

# How far whole views may lie from the reference's: mean and largest difference in levels of 0..255.
# What is left comes from sums that end near .5 before a rounding to 8 bit; a jitter can enlarge it.
# DALI's resize, on CUDA, neither rounds nor clips between its passes, and beyond a crop's border it
# repeats the last pixel where Pillow sees nothing. On a CPU dali crops as threads does.
TOLERANCE: dict[str, tuple[float, float]] = {
    "threads": (0.008, 4),
    "kornia": (0.008, 4),
    "dali": (0.6, 16),
    "triton": (0.008, 4),
}
# Decode themselves, so that decoded images in memory are nothing to them.
TAKE_BYTES = ("dali",)


def resolve_backend(
    name: str,
    device: torch.device,
    in_memory: bool = False,
    policies: Sequence[SimCLRPolicy] = (),
) -> str:
    """Return the back-end that a name means on a device; only ``auto`` means another.

    ``auto`` is ``threads`` on a CPU and ``triton`` on CUDA, which was seen to make the reference's
    pixels there; ``kornia`` where these are not. For colours that only ``dali`` makes it is
    ``dali`` on both.

    Args:
        name: Key of :data:`BACKENDS`, or ``auto``.
        device: Where the views are to lie.
        in_memory: Whether the images are decoded already.
        policies: What the views are to be.

    Raises:
        ConfigError: If there is none of that name, or it needs encoded images and gets none.
    """
    if name == "auto" and any(policy.colour_model != "exact" for policy in policies):
        if in_memory or not _has_dali():
            why, what = "DALI is not installed", "pip install 'fastclr[dali]'"
            if in_memory:
                why, what = "it takes no images in memory", "leave data.in_memory out"
            raise ConfigError(
                "views.colour_model asks for colours that only the back-end dali makes, and "
                f"{why}: set it to exact, or {what}."
            )
        return "dali"
    if name == "auto":
        best = "threads" if device.type == "cpu" else "triton"
        return best if best in BACKENDS and (best == "threads" or _has_triton()) else "kornia"
    if name not in BACKENDS:
        raise ConfigError(
            f"backend {name!r} is unknown: choose from {', '.join(BACKENDS)}, or auto."
        )
    if in_memory and name in TAKE_BYTES:
        raise ConfigError(
            f"backend {name!r} decodes images itself, and data.in_memory holds decoded ones: leave "
            "data.in_memory out, or choose another back-end."
        )
    return name


def _has_dali() -> bool:
    """Whether DALI is installed; found without importing it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no package nvidia at all
        return False


def _has_triton() -> bool:
    """Whether Triton is installed; found without importing it."""
    return importlib.util.find_spec("triton") is not None
