"""Fused augmentation on a GPU: images go there once, four launches make all views.

The kernels are in :mod:`pipelines.kernels_triton`. Interpreted and compiled ahead of time in the
tests; ``make gpu-check`` runs them on a GPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fastclr.config import ConfigError
from pipelines import kernels_triton as kernels
from pipelines.decode import Pixels
from pipelines.policy import SimCLRPolicy, ViewParams

_ALIGNMENT = 16  # bytes; a row of the table is a multiple of it
# Taps further out weigh less than 4e-6 of the centre, together less than a hundredth of a level.
_SIGMAS = 5.0


# The interpreter exchanges the functions of triton.language while it runs: one thread at a time.
_INTERPRETING = threading.Lock()


@dataclass
class Triton:
    """The back-end; see :class:`~pipelines.backends.Backend`.

    Raises:
        ConfigError: If the device is none that Triton's kernels run on.
    """

    policies: Sequence[SimCLRPolicy]
    device: torch.device
    takes_bytes: bool = False
    chunk: int | None = None

    def __post_init__(self) -> None:
        """Check the device."""
        check_device(self.device)

    def __call__(
        self, images: Sequence[Pixels] | Sequence[bytes], params: Sequence[ViewParams]
    ) -> torch.Tensor:
        """Make the views of n images."""
        with _INTERPRETING if kernels.interpreted() else contextlib.nullcontext():
            return augment(images, params, self.policies, self.device)  # pyright: ignore[reportArgumentType]


def check_device(device: torch.device) -> None:
    """Check that the kernels run on a device.

    Raises:
        ConfigError: If they do not.
    """
    if kernels.interpreted():
        if device.type != "cpu":
            raise ConfigError(
                f"backend 'triton' is interpreted (TRITON_INTERPRET is set), and the device is "
                f"{device}: interpreted kernels run on the CPU. Unset TRITON_INTERPRET."
            )
    elif device.type != "cuda" or not torch.cuda.is_available():
        raise ConfigError(
            f"backend 'triton' was given the device {device}"
            f"{'' if device.type != 'cuda' else ', and torch finds no GPU'}: its kernels run on "
            "CUDA alone. Choose another backend."
        )


def augment(
    images: Sequence[Pixels],
    params: Sequence[ViewParams],
    policies: Sequence[SimCLRPolicy],
    device: torch.device,
    dtype: torch.dtype = torch.uint8,
) -> torch.Tensor:
    """Apply drawn numbers to images: one copy to the device, then three or four launches.

    The reference's pixels: resized in two passes with 8 bit between them, exact but for sums that
    end within single precision of a half. Launched on the device's current stream; nothing waits.

    Args:
        images: n source images, uint8 (H, W, 3) of any sizes.
        params: Numbers of n views, for each of V views.
        policies: One for each of V views, of one size.
        device: Where the work is done and the result lies.
        dtype: ``torch.uint8``, or ``torch.bfloat16`` for levels / 255, as the model divides them.

    Returns:
        (V, n, size, size, 3) of that type, contiguous: channels-last, once permuted.
    """
    size, num_views = policies[0].size, len(params) * len(images)
    table, num_blurred = _table(params, policies)
    packed = _pack(images, params, table, device)
    with _current(device):
        packed = packed.to(device, non_blocking=True)
        table_NC = packed[: table.nbytes].view(torch.int32).view(table.shape)
        crops = torch.empty(num_views, size, size, 3, dtype=torch.uint8, device=device)
        kernels.resize(packed, table_NC, crops)
        views = _finish(crops, table_NC, num_blurred, dtype)
    return views.view(len(params), len(images), size, size, 3)


def colour_and_blur(
    crops_NSS3: torch.Tensor, params: ViewParams, policy: SimCLRPolicy
) -> torch.Tensor:
    """Apply all that comes after crop, resize and flip; two or three launches.

    Args:
        crops_NSS3: uint8 (n, size, size, 3), contiguous, on a GPU; cropped, resized and flipped. It
            stays as it is.
        params: Numbers of the n views.
        policy: Gives the taps of the blur.

    Returns:
        uint8 (n, size, size, 3), on the same device.

    Raises:
        ConfigError: If the device is none that Triton's kernels run on.
    """
    device = crops_NSS3.device
    check_device(device)
    expected = (len(params), policy.size, policy.size, 3)
    assert crops_NSS3.shape == expected and crops_NSS3.dtype == torch.uint8, crops_NSS3.shape
    assert crops_NSS3.is_contiguous()
    table, num_blurred = _table([params], [policy])
    with _current(device):
        table_NC = _to(torch.from_numpy(table), device)
        return _finish(crops_NSS3, table_NC, num_blurred, torch.uint8)


def _finish(
    crops: torch.Tensor, table_NC: torch.Tensor, num_blurred: int, dtype: torch.dtype
) -> torch.Tensor:
    """Launch colour and blur."""
    unblurred = crops.new_empty(num_blurred, *crops.shape[1:])
    out = torch.empty(crops.shape, dtype=dtype, device=crops.device)
    kernels.colour(crops, table_NC, unblurred, out)
    kernels.blur(unblurred, table_NC, out)
    return out


def _table(
    params: Sequence[ViewParams], policies: Sequence[SimCLRPolicy]
) -> tuple[npt.NDArray[np.int32], int]:
    """Write the numbers of all views but for those of crop and flip, view-major; count the blurred.

    Columns and what is in them: see :mod:`pipelines.kernels_triton`.
    """
    taps_N = np.repeat([policy.blur_taps for policy in policies], [len(p) for p in params])
    table = np.zeros((len(taps_N), kernels.COLUMNS.value), np.int32)
    floats = table.view(np.float32)
    table[:, kernels.JITTER.value] = np.concatenate([p.jitter_N for p in params])
    table[:, kernels.GRAY.value] = np.concatenate([p.gray_N for p in params])
    order, factor = kernels.ORDER.value, kernels.FACTOR.value
    table[:, order : order + 4] = np.concatenate([p.order_N4 for p in params])
    floats[:, factor : factor + 4] = np.concatenate([p.factors_N4 for p in params])

    floats[:, kernels.SIGMA.value] = sigma_N = np.concatenate([p.sigma_N for p in params])
    table[:, kernels.RADIUS.value] = np.minimum(taps_N // 2, np.ceil(_SIGMAS * sigma_N))
    rows = np.flatnonzero(np.concatenate([p.blur_N for p in params]) & (taps_N > 1))
    table[:, kernels.BLURRED.value] = -1
    table[rows, kernels.BLURRED.value] = np.arange(len(rows))
    table[: len(rows), kernels.BLURRED_ROW.value] = rows
    return table, len(rows)


def _pack(
    images: Sequence[Pixels],
    params: Sequence[ViewParams],
    table: npt.NDArray[np.int32],
    device: torch.device,
) -> torch.Tensor:
    """Put the table and what any crop sees of each image into one pinned buffer.

    The crops are written into the table, as seen in what is sent.
    """
    boxes_VN4 = np.stack([p.box_N4 for p in params])
    first_N2 = boxes_VN4[..., :2].min(0)
    extent_N2 = (boxes_VN4[..., :2] + boxes_VN4[..., 2:]).max(0) - first_N2
    num_bytes_N = extent_N2.astype(np.int64).prod(1) * 3
    # In units of the alignment 32 bits hold the place of any byte of 32 GB.
    end_N = table.nbytes // _ALIGNMENT + np.cumsum(-(-num_bytes_N // _ALIGNMENT))
    start_N = end_N - -(-num_bytes_N // _ALIGNMENT)
    crops_VN = table.reshape(*boxes_VN4.shape[:2], -1)
    crops_VN[..., kernels.SOURCE.value] = start_N
    crops_VN[..., kernels.PITCH.value] = extent_N2[:, 1]
    top = kernels.TOP.value
    crops_VN[..., top : top + 4] = boxes_VN4
    crops_VN[..., top : top + 2] -= first_N2
    crops_VN[..., kernels.FLIP.value] = np.stack([p.flip_N for p in params])

    packed = torch.empty(
        int(end_N[-1]) * _ALIGNMENT, dtype=torch.uint8, pin_memory=device.type == "cuda"
    )
    buffer = packed.numpy()
    buffer[: table.nbytes] = table.reshape(-1).view(np.uint8)
    for image, (top, left), (height, width), start, num_bytes in zip(
        images, first_N2, extent_N2, start_N * _ALIGNMENT, num_bytes_N, strict=True
    ):
        part = buffer[start : start + num_bytes].reshape(height, width, 3)
        part[:] = image[top : top + height, left : left + width]
    return packed


def _to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device without waiting for it."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU the one that Triton launches on; each thread has its own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
