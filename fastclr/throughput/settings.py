"""What of a run can be tuned without changing what it learns from, and how it is written down."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from fastclr.config import Config
from fastclr.ds_config import JSON

HALF_KEYS = ("torch_autocast", "bf16", "bfloat16", "fp16")
NAMES = {
    "precision": "precision", "chunks": "chunks a batch", "compile": "compile",
    "backend": "back-end", "in_memory": "in memory", "loader_threads": "loader threads",
    "prefetch": "prefetch", "torch_threads": "torch threads", "zero_stage": "ZeRO stage",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is tuned; the recipe and the DeepSpeed JSON have all the rest.

    Attributes:
        precision: ``json``, what the DeepSpeed JSON says, or ``bf16``, autocast to it.
        chunks: Micro-batches that a rank's part of the batch is cut into (gradient caching).
        compile: Whether encoder and head are compiled.
        backend: Of the augmentation, or ``auto``.
        in_memory: Whether all images are decoded before the run.
        loader_threads: Threads that prepare a rank's batches.
        prefetch: Batches prepared ahead.
        torch_threads: Threads of a rank's operations on the CPU.
        zero_stage: Of DeepSpeed.
    """

    precision: str = "json"
    chunks: int = 1
    compile: bool = False
    backend: str = "auto"
    in_memory: bool = False
    loader_threads: int = 1
    prefetch: int = 4
    torch_threads: int = 1
    zero_stage: int = 0


@dataclass(frozen=True)
class Machine:
    """What a setting may ask for.

    Attributes:
        device: ``cpu`` or ``cuda``.
        ranks: Processes, all on this machine.
        cores: Cores of a rank.
        backends: Back-ends that can be imported, without the one that ``auto`` is.
        can_compile: Whether torch.compile finds its compiler.
    """

    device: str
    ranks: int
    cores: int
    backends: tuple[str, ...]
    can_compile: bool


def given(config: Config, ds: JSON, machine: Machine, torch_threads: int) -> Setting:
    """Return the setting that recipe, flags and JSON describe."""
    return Setting(
        chunks=ds.get("gradient_accumulation_steps", 1),
        compile=config.compile,
        backend=config.data.backend,
        in_memory=config.data.in_memory,
        loader_threads=config.data.num_threads or machine.cores,
        prefetch=config.data.prefetch,
        torch_threads=torch_threads,
        zero_stage=ds.get("zero_optimization", {}).get("stage", 0),
    )


def axes(base: Setting, ds: JSON, machine: Machine, images_per_rank: int) -> dict[str, list[Any]]:
    """Return the values that each part of a setting may take, the base's first.

    Memory format is none of them: the trainer takes channels-last wherever DeepSpeed allows it.
    """
    others: dict[str, list[Any]] = {
        "precision": [] if any(key in ds for key in HALF_KEYS) else ["bf16"],
        "torch_threads": _powers(machine.cores) if machine.device == "cpu" else [],
        "chunks": [k for k in (1, 2, 4, 8, 16, 32, 64) if _divides(k, images_per_rank)],
        "zero_stage": [0, 1, 2] if machine.ranks > 1 else [],
        "in_memory": [True] if base.backend != "dali" else [],
        "loader_threads": _powers(machine.cores),
        "backend": list(machine.backends),
        "prefetch": [2, 8],
        "compile": [True] if machine.can_compile else [],
    }
    found = {}
    for name, values in others.items():
        first = getattr(base, name)
        if kept := [value for value in values if value != first]:
            found[name] = [first, *kept]
    return found


def _divides(chunks: int, images: int) -> bool:
    """Whether a batch can be cut so; BatchNorm wants a fair number of rows."""
    return (images % chunks == 0 and images // chunks >= 16) or chunks == 1


def _powers(cores: int) -> list[int]:
    """Return numbers of threads up to the cores."""
    return sorted({cores, max(1, cores // 2), max(1, cores // 4), 1}, reverse=True)


def compiler_is_there(device: str) -> bool:
    """Whether torch.compile finds what it writes programs for: C++ on a CPU, Triton on CUDA."""
    if device == "cuda":
        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def changes(setting: Setting, base: Setting) -> dict[str, Any]:
    """Return what differs from the base."""
    names = [f.name for f in fields(setting)]
    return {n: getattr(setting, n) for n in names if getattr(setting, n) != getattr(base, n)}


def describe(setting: Setting, base: Setting) -> str:
    """Say in words what differs from the base."""
    found = changes(setting, base)
    return ", ".join(f"{NAMES[name]} {value}" for name, value in found.items()) or "as given"


def notes(setting: Setting, base: Setting, images_per_rank: int) -> list[str]:
    """Say what of the differences changes numbers, one sentence each; the rest is speed alone."""
    found = changes(setting, base)
    said = []
    if "precision" in found:
        said.append(
            "precision: products and convolutions are rounded to bfloat16 (8 bits), weights, loss "
            "and optimizer stay float32."
        )
    if "chunks" in found:
        said.append(
            f"micro-batch: the contrastive batch stays as it is, but BatchNorm's statistics are "
            f"those of {images_per_rank // setting.chunks} images a rank."
        )
    if "backend" in found:
        said.append("back-end: the same numbers of each view, pixels equal within its tolerance.")
    if "compile" in found:
        said.append("compile: sums in another order, so other roundings.")
    return said


def apply(setting: Setting, base: Setting, config: Config, ds: JSON) -> tuple[Config, JSON]:
    """Return recipe and JSON with what a setting changes, and nothing else changed."""
    found = changes(setting, base)
    names = {"backend": "backend", "in_memory": "in_memory", "prefetch": "prefetch",
             "loader_threads": "num_threads"}  # fmt: skip
    data = replace(config.data, **{names[n]: v for n, v in found.items() if n in names})
    config = replace(config, data=data, compile=setting.compile)
    ds = dict(ds)
    if "precision" in found:
        ds["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if "chunks" in found:
        micro, steps = ds.pop("train_micro_batch_size_per_gpu", None), base.chunks
        if micro is not None:  # the whole stays what it was
            ds["train_micro_batch_size_per_gpu"] = micro * steps // setting.chunks
        ds["gradient_accumulation_steps"] = setting.chunks
    if "zero_stage" in found:
        ds["zero_optimization"] = {**ds.get("zero_optimization", {}), "stage": setting.zero_stage}
    return config, ds


def flags(setting: Setting, base: Setting) -> list[str]:
    """Return the flags of ``fastclr train`` for what a setting changes of the recipe."""
    found = changes(setting, base)
    lines = []
    for name, flag in (
        ("backend", "data.backend"), ("loader_threads", "data.num-threads"),
        ("prefetch", "data.prefetch"),
    ):  # fmt: skip
        if name in found:
            lines.append(f"--{flag} {found[name]}")
    if "in_memory" in found:
        lines.append("--data.in-memory" if setting.in_memory else "--data.no-in-memory")
    if "compile" in found:
        lines.append("--compile" if setting.compile else "--no-compile")
    return lines


def environment(setting: Setting, base: Setting) -> Mapping[str, str]:
    """Return the variables that a setting needs set."""
    found = changes(setting, base)
    return {"OMP_NUM_THREADS": str(setting.torch_threads)} if "torch_threads" in found else {}
