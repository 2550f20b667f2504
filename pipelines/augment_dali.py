# pyright: reportAttributeAccessIssue=false
# (DALI makes the names of its types at run time.)
"""Decode, crop, resize and flip by NVIDIA DALI, on CPU or CUDA; the colours by the shared kernels.

One graph function for both devices. It is fed with encoded images from our order and with numbers
from our policy, so that order, resume and faults are those of every other back-end, and it ends at
8-bit crops: DALI's own hue is a rotation in YIQ and its contrast pivots at 128, which is another
jitter. Under ``colour_model="affine"`` alone the graph goes on to the matrices of
:mod:`pipelines.colour_affine`.

On a CPU the graph ends at the decoded images, but for affine views, and the shared kernel makes the
crops: DALI's resize takes eight times as long there, 1 ms for a view of 224 pixels.

Pixels. DALI decodes plain JPEGs (also gray, progressive, with EXIF, whose rotation is not applied)
and PNGs of up to 8 bit to the same levels as :func:`pipelines.decode.decode`. All else (16-bit PNG,
CMYK JPEG, WebP) is decoded by that function and fed as PNM, which is a header before the pixels.

Damage. DALI passes over damage inside a JPEG, so each JPEG is checked by
:func:`pipelines.decode.check_image` first, in half the time of a decode. Whole PNGs are checked by
DALI, which refuses wrong checksums. Where it raises, which ends its pipeline, the images are
decoded by :func:`pipelines.decode.decode`, which either names the damaged ones or gives the pixels
that DALI could not.

On CUDA the graph is the one that is tested on the CPU, with its crops; ``make gpu-check`` runs it.
"""

from __future__ import annotations

import struct
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from pipelines.colour_affine import matrices
from pipelines.decode import MAX_PIXELS, DamagedImage, DamagedImages, Pixels, check_image, decode
from pipelines.policy import SimCLRPolicy, ViewParams

_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
# What nvJPEG works in, bytes a pixel: from NVIDIA's numbers for ImageNet's largest image, 211 and
# 141 MB for 5980 x 6430. Not below DALI's defaults.
_DEVICE_BYTES, _HOST_BYTES = 6, 4
_LEAST_DEVICE_BYTES, _LEAST_HOST_BYTES = 16 << 20, 8 << 20


class Dali:
    """The back-end ``dali``; see :class:`pipelines.backends.Backend`.

    The pipeline is built at the first batch, for its number of images and with memory for its
    largest image, and again when a batch holds more images or after an error. Calls from several
    threads take turns in it; checks and colours run beside it.

    Args:
        policies: A policy for each view; all of one size.
        device: Where decoding and augmentation run and the views lie.
        num_threads: DALI's threads.
    """

    takes_bytes: bool = True
    chunk: int | None = None

    def __init__(
        self, policies: Sequence[SimCLRPolicy], device: torch.device, num_threads: int
    ) -> None:
        self._policies, self._device, self._num_threads = policies, device, num_threads
        self._affine = [policy.colour_model == "affine" for policy in policies]
        # On a CPU a view whose colours are made in the graph is cropped there too.
        self._cropped = [device.type == "cuda" or affine for affine in self._affine]
        self._finish: Finish = _finisher(device)
        self._lock = threading.Lock()
        self._pipeline: Pipeline | None = None

    def __call__(
        self, images: Sequence[Pixels] | Sequence[bytes], params: Sequence[ViewParams]
    ) -> torch.Tensor:
        """Make the views of n encoded images.

        Returns:
            uint8 (V, n, size, size, 3) on the device.

        Raises:
            DamagedImages: If images do not decode; names all of them.
            RuntimeError: If DALI fails for another reason.
        """
        sources: list[bytes] = each(feedable, images)
        try:
            whole, crops = self._run(sources, params)
        except RuntimeError as error:
            sources = each(lambda image: as_pnm(decode(image)), images)
            warnings.warn(f"DALI refused a batch, which Pillow decodes: {error}", stacklevel=2)
            whole, crops = self._run(sources, params)
        size = self._policies[0].size
        like = crops[0] if crops else torch.empty(0, dtype=torch.uint8)
        views_VNHWC = like.new_empty(len(params), len(images), size, size, 3)
        for view, (out_NHWC, policy) in enumerate(zip(views_VNHWC, self._policies, strict=True)):
            p = _without_colours(params[view]) if self._affine[view] else params[view]
            if self._cropped[view]:
                self._finish(crops.pop(0), p, policy, out_NHWC)
            else:
                _crop(whole, p, out_NHWC)
                self._finish(out_NHWC, p, policy, out_NHWC)
        return views_VNHWC

    def _run(
        self, sources: list[bytes], params: Sequence[ViewParams]
    ) -> tuple[list[Pixels], list[torch.Tensor]]:
        """Run the graph.

        Returns:
            The n decoded images, if some views are not made in the graph; and those that are, uint8
            (n, size, size, 3) each, on the device.
        """
        feeds = numbers(params, self._affine, self._cropped)
        feeds["encoded"] = [np.frombuffer(source, np.uint8) for source in sources]
        with self._lock:
            pipeline, self._pipeline = self._pipeline, None  # one that fails is not used again
            if pipeline is None or len(sources) > (pipeline.max_batch_size or 0):
                pipeline = self._build(sources)
            for name, feed in feeds.items():
                pipeline.feed_input(name, feed)
            if self._device.type == "cuda":  # nobody waits: torch's stream does
                outputs = pipeline.run(torch.cuda.current_stream(self._device))
            else:
                outputs = pipeline.run()
            self._pipeline = pipeline
        # DALI keeps a batch's memory until its tensors are gone.
        first = 0 if all(self._cropped) else 1
        whole = [np.asarray(image) for output in outputs[:first] for image in output]
        return whole, [torch.from_dlpack(output.as_tensor()) for output in outputs[first:]]

    def _build(self, sources: list[bytes]) -> Pipeline:
        """Build the pipeline for batches of up to so many images."""
        on_gpu = self._device.type == "cuda"
        index = self._device.index
        if on_gpu and index is None:
            index = torch.cuda.current_device()
        pipeline = Pipeline(
            batch_size=len(sources),
            num_threads=self._num_threads,
            device_id=index if on_gpu else None,
            prefetch_queue_depth=1,
        )
        largest = max((size_of(source) for source in sources), key=lambda hw: hw[0] * hw[1])
        size = self._policies[0].size
        with pipeline:
            nodes = graph("gpu" if on_gpu else "cpu", self._affine, self._cropped, size, largest)
            pipeline.set_outputs(*nodes)
        pipeline.build()
        return pipeline


def graph(
    device: str,
    affine: Sequence[bool],
    cropped: Sequence[bool],
    size: int,
    largest: tuple[int, int],
) -> list[Any]:
    """Describe what DALI does: one decode of the whole image, then a crop and a resize a view.

    Regions are not decoded alone: the hardware decoder knows whole images only, and the views share
    one. A crop is cut out first, so that the resize sees no pixel beside it. The flip is a region
    that ends before it starts.

    Args:
        device: ``cpu`` or ``gpu``; on a GPU the decode is ``mixed`` and nothing comes back to the
            host.
        affine: For each view, whether colours follow, by matrices.
        cropped: For each view, whether it is made here; else the decoded image is given out.
        size: Side of the views in pixels.
        largest: Height and width of the largest image known, a hint for the memory of the decoder.

    Returns:
        The decoded image, uint8 (H, W, 3) a sample, unless all views are made here; then these:
        uint8 (size, size, 3) a sample.
    """
    height, width = largest
    image = fn.decoders.image(
        fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, batch=True),
        device="mixed" if device == "gpu" else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # libjpeg-turbo's chroma
        hw_decoder_load=0.65,  # .9 was 2 % faster on average and twice as slow at worst
        preallocate_height_hint=height,
        preallocate_width_hint=width,
        device_memory_padding=max(_DEVICE_BYTES * height * width, _LEAST_DEVICE_BYTES),
        host_memory_padding=max(_HOST_BYTES * height * width, _LEAST_HOST_BYTES),
    )
    nodes: list[Any] = [] if all(cropped) else [image]
    for view in np.flatnonzero(cropped).tolist():
        start, shape = (_input(f"{name}{view}", types.INT32, 1) for name in ("start", "shape"))
        first, last = (_input(f"{name}{view}", types.FLOAT, 1) for name in ("first", "last"))
        crop = fn.resize(
            fn.slice(image, device=device, start=start, shape=shape, axes=(0, 1)),
            device=device,
            size=(size, size),
            roi_start=first,
            roi_end=last,
            roi_relative=True,
            interp_type=types.INTERP_CUBIC,
            antialias=True,
        )
        nodes.append(_coloured(crop, view, device) if affine[view] else crop)
    return nodes


def _coloured(crop: Any, view: int, device: str) -> Any:
    """Go on to A x + B m, where m is the mean of the crop."""
    a, b = (_input(f"{name}{view}", types.FLOAT, 2) for name in ("A", "B"))
    mean = fn.reductions.mean(crop, device=device, axes=(0, 1), keep_dims=True)
    levels = fn.coord_transform(crop, device=device, M=a, dtype=types.FLOAT)
    offset = fn.coord_transform(mean, device=device, M=b, dtype=types.FLOAT)
    return fn.cast(levels + offset, device=device, dtype=types.UINT8)  # rounds and clips


def _input(name: str, dtype: Any, ndim: int) -> Any:
    """Numbers of a sample, from the host."""
    return fn.external_source(name=name, dtype=dtype, ndim=ndim, batch=True)


def numbers(
    params: Sequence[ViewParams], affine: Sequence[bool], cropped: Sequence[bool]
) -> dict[str, Any]:
    """Turn drawn numbers into what the graph's inputs take: (n, 2), and (n, 3, 3) matrices."""
    feeds: dict[str, npt.NDArray[Any]] = {}
    for view in np.flatnonzero(cropped).tolist():
        p = params[view]
        first = np.stack([np.zeros(len(p)), p.flip_N], 1).astype(np.float32)
        feeds[f"start{view}"] = np.ascontiguousarray(p.box_N4[:, :2], np.int32)
        feeds[f"shape{view}"] = np.ascontiguousarray(p.box_N4[:, 2:], np.int32)
        feeds[f"first{view}"] = first
        feeds[f"last{view}"] = 1 - first
        if affine[view]:
            feeds[f"A{view}"], feeds[f"B{view}"] = matrices(p)
    return feeds


Finish = Callable[[torch.Tensor, ViewParams, SimCLRPolicy, torch.Tensor], object]


def _finisher(device: torch.device) -> Finish:
    """Return what makes views of crops where they lie; each imports its packages when chosen."""
    if device.type == "cpu":
        from pipelines.blur_numba import blur
        from pipelines.colour_numba import colour

        def finish(
            crop: torch.Tensor, params: ViewParams, policy: SimCLRPolicy, out: torch.Tensor
        ) -> None:
            colour(crop.numpy(), params, out.numpy())
            blur(out.numpy(), params, policy.blur_taps)

        return finish
    try:
        from pipelines.augment_triton import colour_and_blur
    except ModuleNotFoundError:  # torch brings Triton on Linux only
        from pipelines.augment_kornia import finish as colour_and_blur
    return lambda crop, params, policy, out: out.copy_(colour_and_blur(crop, params, policy))


def _crop(images: list[Pixels], params: ViewParams, out_NHWC: torch.Tensor) -> None:
    """Crop, resize and flip images of the host."""
    from pipelines.resize_numba import resize  # numba is not needed on a GPU

    resize(images, params.box_N4, params.flip_N, out_NHWC.numpy())


def _without_colours(params: ViewParams) -> ViewParams:
    """Leave nothing but the blur to do."""
    no = np.zeros(len(params), bool)
    return replace(params, jitter_N=no, gray_N=no)


def each(function: Any, images: Sequence[Any]) -> list[Any]:
    """Apply a function to every image; name all damaged ones, not the first alone.

    Raises:
        DamagedImages: If some are.
    """
    made, reasons = [], {}
    for row, image in enumerate(images):
        try:
            made.append(function(image))
        except DamagedImage as error:
            reasons[row] = str(error)
    if reasons:
        raise DamagedImages(reasons)
    return made


def feedable(data: bytes) -> bytes:
    """Return bytes that DALI decodes to the pixels of :func:`pipelines.decode.decode`.

    Raises:
        DamagedImage: If a JPEG, or what is fed as pixels, is damaged. Damage inside a PNG is left
            to DALI.
    """
    if data[:2] == b"\xff\xd8":
        check_image(data)
        if simplejpeg.decode_jpeg_header(data)[2] in ("YCbCr", "RGB", "Gray"):
            return data
    elif data[:8] == _PNG_START and data[12:16] == b"IHDR" and data[-12:] == _PNG_END:
        height, width = size_of(data)
        if height * width <= MAX_PIXELS and data[24] <= 8:
            return data
    return as_pnm(decode(data))


def as_pnm(image: Pixels) -> bytes:
    """Write pixels as a portable pixmap, the format that is read fastest."""
    height, width, _ = image.shape
    return b"P6 %d %d 255\n" % (width, height) + image.tobytes()


def size_of(source: bytes) -> tuple[int, int]:
    """Height and width in pixels of what :func:`feedable` returns."""
    if source[:2] == b"P6":
        width, height = source[:32].split()[1:3]
    elif source[:8] == _PNG_START:
        width, height = struct.unpack(">II", source[16:24])
    else:
        height, width = simplejpeg.decode_jpeg_header(source)[:2]
    return int(height), int(width)
