"""The hardware and the versions that a result belongs to."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "numpy", "liger-kernel", "tile-kernels", "scikit-learn")
_ROOT = Path(__file__).parents[1]
_SOURCES = ("mhc_compile", "passes", "kernels", "benchmarks/*.py")


def environment(device: str) -> dict[str, Any]:
    """Return the machine as JSON types: hardware, versions, commit, and how busy it was.

    Args:
        device: "cuda" (also ROCm) or "cpu", what the figures were measured on.

    Returns:
        `hardware` is a short name; results of different names are never shown in one table. `load` is the number
        of runnable processes over the last minute, this one included: beyond `cores`, times are noisy.
    """
    return {
        "device": device,
        "hardware": hardware_name(device),
        "gpu": _gpu() if device == "cuda" else None,
        "cpu": {"name": _cpu_name(), "cores": usable_cores(), "memory_bytes": _memory_bytes()},
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "commit": _commit(),
        "threads": torch.get_num_threads(),
        "load": load_average(),
    }


def hardware_name(device: str) -> str:
    """Return a short name of what was measured, such as "NVIDIA H200" or "AMD EPYC, 2 cores, no GPU"."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cores = usable_cores()
    return f"{_cpu_name()}, {cores} core{'s' * (cores != 1)}, CPU only"


def slug(name: str) -> str:
    """Turn a hardware name into the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str]:
    """Return Python's version and those of the packages that decide a result, where installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def load_average() -> float | None:
    """Return the load of the last minute, None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability()),
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "runtime": torch.version.cuda or getattr(torch.version, "hip", None),
    }


def _cpu_name() -> str:
    # platform.processor() is empty on most Linux systems.
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _commit() -> str | None:
    """Return the commit of the sources, marked where they were changed since; None outside a checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", *_SOURCES)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head} with changes" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
