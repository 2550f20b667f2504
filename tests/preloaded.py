"""What scripts that tests start have imported already; see :mod:`tests.starts`.

Nothing here computes: the process that has imported this is forked, and a fork has no threads.
"""

import gc

import deepspeed
import pytest
import timm
import torch.utils.tensorboard

import fastclr.kernels.lars_numba
import fastclr.runs
import fastclr.train
import pipelines.augment_threads

__all__ = ["deepspeed", "fastclr", "pipelines", "pytest", "timm", "torch"]

gc.freeze()  # a fork's garbage collection need not go through, and copy, all of it
