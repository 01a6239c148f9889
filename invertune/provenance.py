"""Where a result comes from: file hashes, package versions, the commit, peak memory."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from importlib import metadata

import torch

from invertune.files import REPOSITORY

PACKAGES = ("torch", "torchvision", "open_clip_torch", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that can change a number."""
    found = {package: metadata.version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **found}


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
