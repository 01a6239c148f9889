"""Time, memory and matrix work of several ways to do the same, side by side in one process.

Every round runs each way once, so that a busy machine slows all alike, in a new order, as a way
inherits the memory that the one before it freed. A first round warms up, and counts memory and
floating-point operations.
"""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

PEAK_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices that measure the matrix peak
PEAK_ROUNDS = 8
OURS = 4  # times as many steps as the others: what is prepared once must not weigh too much
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Contender:
    """One contender: ``run()`` takes ``steps`` steps, which show ``images`` images in all.

    ``ceiling`` names the way that does no more than the mathematics needs.
    """

    run: Callable[[], object]
    steps: int
    images: int
    ceiling: str = "ceiling"


@dataclass(frozen=True)
class Measured:
    """Seconds per image, one per round; memory in MB above the start; operations per image."""

    seconds: list[float]
    peak_mb: float
    operations: float


@dataclass(frozen=True)
class Meter:
    """Where and how to measure: ``clock`` is "wall" or "cpu" (this process's CPU seconds, which
    other programs disturb less; not for CUDA)."""

    device: torch.device
    clock: str
    rounds: int

    def seconds(self, work: Callable[[], object]) -> float:
        """How long ``work`` takes, up to the last kernel on CUDA."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        start = CLOCKS[self.clock]()
        work()
        if cuda:
            torch.cuda.synchronize()
        return CLOCKS[self.clock]() - start

    def matrix_peak(self, dtype: torch.dtype) -> float:
        """Floating-point operations a second of the best of several large matrix products."""
        side = PEAK_SIDE[self.device.type]
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        times = [self.seconds(lambda: a @ b) for _ in range(PEAK_ROUNDS)]
        return 2 * side**3 / min(times)

    def measure(self, ways: Mapping[str, Contender]) -> dict[str, Measured]:
        """Runs all ways in turn, once to warm up and ``rounds`` times to be timed."""
        first = {name: self._first(way) for name, way in ways.items()}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(self.rounds):
            for name in random.Random(number).sample(list(ways), len(ways)):
                times[name].append(self.seconds(ways[name].run) / ways[name].images)
        return {name: Measured(times[name], *first[name]) for name in ways}

    def _first(self, way: Contender) -> tuple[float, float]:
        counter = FlopCounterMode(display=False)
        start = _memory(self.device, reset=True)
        with counter:
            way.run()
        used = (_memory(self.device) - start) / 1e6
        return used, counter.get_total_flops() / way.images


def _memory(device: torch.device, reset: bool = False) -> float:
    """Peak bytes since the last reset; with ``reset``, bytes held now."""
    if device.type == "cuda":
        if reset:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # else freed memory would count as held
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def table(ways: Mapping[str, Contender], found: Mapping[str, Measured], peak: float) -> str:
    """A line per way; ratios of times per image, round by round, as median (quartiles).

    Share of peak: the ceiling's operations per image, in the way's time, over ``peak``. Of the
    ceilings themselves this is the share that the bare network reaches.
    """
    head = f"  {'':20}{'images/s':>10}{'steps/s':>9}{'MB':>7}{'of peak':>9}"
    lines = [f"{head}   {'time / ceiling':24}plain / time"]
    for name, way in ways.items():
        own, bare = found[name], found[way.ceiling]
        rate = 1 / statistics.median(own.seconds)
        share = f"{bare.operations * rate / peak:9.0%}" if bare.operations else f"{'':9}"
        text = f"  {name:20}{rate:10.1f}{rate * way.steps / way.images:9.2f}{own.peak_mb:7.0f}"
        over = ratio(own, bare) if name != way.ceiling else ""
        plain = found["plain"] if name.startswith("ours") and "plain" in found else None
        lines.append(f"{text}{share}   {over:24}{ratio(plain, own) if plain else ''}".rstrip())
    return "\n".join(lines)


def ratio(one: Measured, other: Measured) -> str:
    """The ratio of two ways' times in each round: median (lower to upper quartile)."""
    ratios = [a / b for a, b in zip(one.seconds, other.seconds, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
