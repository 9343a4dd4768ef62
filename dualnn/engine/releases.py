"""Which torch releases dualnn has verified torch's own derivatives on, for the tables that rely on them."""

from __future__ import annotations

import functools
import warnings

import torch

TESTED = {(2, 11), (2, 14), (2, 15)}


def release() -> tuple[int, int]:
    """Torch's major and minor version."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


@functools.cache  # once a process
def warn_untested(version: str) -> None:
    """Say once that the tables are empty on this release."""
    known = ", ".join(f"{a}.{b}" for a, b in sorted(TESTED))
    warnings.warn(
        f"torch {version} is not among the releases on which dualnn has verified torch's own derivatives ({known}): "
        "operations that rely on them raise UnsupportedOpError.",
        stacklevel=2,
    )
