"""Facts of the machine and its software, for reports."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

PACKAGES = (
    "fastclr", "torch", "torchvision", "deepspeed", "timm", "kornia", "numpy", "scikit-learn",
)  # fmt: skip

CONTROL_GROUP = Path("/sys/fs/cgroup")  # of version 2; a container sees its own here

_SECRET = re.compile("(?i)api_?key|token|password|secret|credential")


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of Python and the packages that compute."""
    return dict(_versions())


@functools.cache  # looking them up takes milliseconds, and each save names them
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a folder without installing
            found[name] = "not installed"
    return found


def typed() -> list[str]:
    """Return this process's command as it can be typed again, without what launchers add."""
    program, *words = (word for word in sys.argv if not word.startswith("--local_rank="))
    path = Path(program)
    if path.name == "fastclr" or path.parts[-2:] == ("fastclr", "__main__.py"):
        return ["fastclr", *words]
    return ["python", program, *words]


def redacted(settings: Any) -> Any:
    """Return nested settings without secrets: a monitor's key does not belong in a report."""
    if isinstance(settings, dict):
        return {
            key: "***" if _SECRET.search(str(key)) else redacted(value)
            for key, value in settings.items()
        }
    return [redacted(value) for value in settings] if isinstance(settings, list) else settings


def num_cores() -> int:
    """Return the cores this process may use."""
    return len(os.sched_getaffinity(0))


def free_memory() -> int:
    """Return the bytes this process may still take: of the machine, and of its control group."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    free = kib["MemAvailable"] * 1024
    try:
        limit = (CONTROL_GROUP / "memory.max").read_text(encoding="utf-8").strip()
        used = int((CONTROL_GROUP / "memory.current").read_text(encoding="utf-8"))
        stat = (CONTROL_GROUP / "memory.stat").read_text(encoding="utf-8").split()
        cache = int(stat[stat.index("inactive_file") + 1])  # given back when it is asked for
    except (OSError, ValueError):  # no control groups of version 2 here
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - used + cache))


def hardware(device_name: str) -> dict[str, Any]:
    """Return device, processor and cores."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "device": device_name,
        "processor": names[0] if names else platform.processor(),
        "cores": num_cores(),
    }
