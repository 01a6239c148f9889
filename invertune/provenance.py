"""Where a result comes from: package versions, the commit, peak memory; and memory left."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil
import torch

from invertune.files import REPOSITORY

PACKAGES = ("torch", "torchvision", "open_clip_torch", "safetensors", "numpy")
CGROUP = Path("/sys/fs/cgroup")  # of a container, e.g. Docker's


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


def free_bytes() -> int:
    """Memory that may still be taken: of the machine, or of a container with a lower limit."""
    free: int = psutil.virtual_memory().available
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no container, or none with a limit
        return free
    cached = dict(line.split() for line in lines)["inactive_file"]  # given back when it is needed
    return min(free, limit - used + int(cached))
