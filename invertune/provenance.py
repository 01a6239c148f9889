"""Where a result comes from: package versions, the commit, peak memory."""

from __future__ import annotations

import contextlib
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "open_clip_torch", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that can change a number."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str | None:
    """The repository's commit; None outside git or before the first commit."""
    if not (REPOSITORY / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(REPOSITORY), "rev-parse", "--verify", "--quiet", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def peak_mb(cuda: bool) -> int:
    """Peak memory in MB: since the last reset on CUDA, else of this process since it started."""
    if cuda:
        return torch.cuda.max_memory_allocated() // 10**6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 10**6
