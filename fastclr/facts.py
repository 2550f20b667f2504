"""Facts of the machine and its software, for reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

PACKAGES = (
    "fastclr", "torch", "torchvision", "deepspeed", "timm", "kornia", "numpy", "scikit-learn",
)  # fmt: skip

_SECRET = re.compile("(?i)api_?key|token|password|secret|credential")


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of Python and the packages that compute."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a folder without installing
            found[name] = "not installed"
    return found


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


def hardware(device_name: str) -> dict[str, Any]:
    """Return device, processor and cores."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "device": device_name,
        "processor": names[0] if names else platform.processor(),
        "cores": num_cores(),
    }
