"""Timing side by side: every repeat runs each way once, so that a busy machine slows all alike.

On a CPU the clock counts this process's CPU seconds; on a GPU it is the wall clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from invertune.models import BACKBONES


def common_options(description: str | None, steps: int) -> argparse.ArgumentParser:
    """A parser of the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--backbone", choices=BACKBONES, default="RN50")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--repeats", type=int, default=5)
    return parser


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long ``work`` takes: CPU seconds on a CPU, wall seconds on a GPU."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def side_by_side(
    ways: Mapping[str, Callable[[], object]], units: int, device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds a unit of work for each way and repeat; a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, work in ways.items():
            taken = seconds(work, device) / units
            if repeat:
                times[name].append(1000 * taken)
    return times


def ratios(times: dict[str, list[float]], one: str, other: str) -> list[float]:
    """Ratio of the two times in each repeat."""
    return [a / b for a, b in zip(times[one], times[other], strict=True)]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):8.2f} ({min(values):.2f} to {max(values):.2f})"
