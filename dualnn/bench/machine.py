"""What a table of timings must say about where it comes from: the class of machine and the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from dualnn import __version__
from dualnn.bench.benchmark import Settings

PACKAGES = ("torch", "numpy", "jax", "jaxlib", "optimistix", "diffrax", "casadi")


def versions() -> dict[str, str]:
    """Of Python, dualnn and the peers that are installed."""
    found = {"python": platform.python_version(), "dualnn": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine(settings: Settings) -> dict[str, str]:
    """Processor, cores and load, and the GPU if it is used. Neither names nor paths."""
    found = {"processor": processor(), "cores": str(os.cpu_count()), "threads used": "1", "clock": settings.clock}
    if hasattr(os, "getloadavg"):
        found["load when it began"] = f"{os.getloadavg()[0]:.1f}"
    if settings.device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def processor() -> str:
    """The processor's model, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def header(settings: Settings) -> str:
    """One line for each of the two."""
    return "\n".join(
        ", ".join(f"{name} {value}" for name, value in part.items()) for part in (machine(settings), versions())
    )
