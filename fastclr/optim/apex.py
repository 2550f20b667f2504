"""The norms of LARS by NVIDIA apex: all tensors in one launch of its multi-tensor kernel.

apex is built from source, on the machine with the GPU (PyPI's ``apex`` is another project):

    git clone https://github.com/NVIDIA/apex && cd apex
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation .

That makes ``amp_C``; ``LARS(..., impl="apex")`` then takes its norms from
``multi_tensor_l2norm(per_tensor=True)`` and updates with torch's multi-tensor operations. apex sums
in single precision: norms beyond 1e19 or below 1e-19 are not told from infinity and 0. Tested
against a stand-in of the same signature; not yet run on a GPU.
"""

# torch exports its multi-tensor functions under private names only.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import importlib
from typing import Any

import torch

from fastclr.kernels import KernelUnavailable
from fastclr.kernels.lars_torch import update as update  # half of what LARS asks of a module


def load() -> tuple[Any, Any]:
    """Return apex's kernel and its launcher.

    Raises:
        KernelUnavailable: If apex is not there, or is PyPI's.
    """
    try:
        kernel = importlib.import_module("amp_C").multi_tensor_l2norm
        launcher = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    except (ImportError, AttributeError) as error:
        raise KernelUnavailable(
            f"LARS(impl='apex') needs NVIDIA apex with its CUDA extension ({error}): build it as "
            "fastclr/optim/apex.py says, or use impl='auto'."
        ) from error
    return kernel, launcher


def sums_of_squares(
    w: list[torch.Tensor], g: list[torch.Tensor], weight_decay: float
) -> torch.Tensor:
    """Sum the squares of weights and decayed gradients; see :mod:`fastclr.kernels.lars_torch`."""
    kernel, launcher = load()
    d = torch._foreach_add(g, w, alpha=weight_decay) if weight_decay else g
    overflow = torch.zeros(1, dtype=torch.int32, device=w[0].device)  # written to, never read
    norms_S = [launcher(kernel, overflow, [list(x)], True)[1] for x in (w, d)]
    return torch.stack(norms_S, 1).double().square()
