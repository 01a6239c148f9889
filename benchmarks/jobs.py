"""Fine-tuning of the embedded models in one process, and in several of one thread each.

What ``run_all.sh --jobs`` chooses between on a CPU. Each process trains a model of its own, so
several leave as many models; memory is not measured.
"""

from __future__ import annotations

import functools
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.timing import Contender
from invertune.models import MODEL_FOLDER, Clip, build_clip
from invertune.training import Recipe, finetune

ONE = "one process"


@contextmanager
def ways(backbone: str, precision: str, steps: int, batch: int) -> Iterator[dict[str, Contender]]:
    """One process with all threads and as many processes of one; they live as long as this."""
    threads, images = torch.get_num_threads(), steps * batch
    train = functools.partial(_train, backbone, precision, steps, batch)
    with _processes(1, threads) as one, _processes(threads, 1) as several:
        yield {
            ONE: Contender(_at_once(one, 1, train), steps, images, ONE),
            f"{threads} processes": Contender(
                _at_once(several, threads, train), threads * steps, threads * images, ONE
            ),
        }


def _processes(count: int, threads: int) -> Executor:
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, spawn, torch.set_num_threads, (threads,))


def _at_once(pool: Executor, count: int, work: Callable[[], None]) -> Callable[[], object]:
    return lambda: [done.result() for done in [pool.submit(work) for _ in range(count)]]


@functools.lru_cache(maxsize=1)
def _clip(backbone: str, precision: str) -> Clip:
    clip = build_clip(MODEL_FOLDER / backbone, backbone)
    return replace(clip, precision=getattr(torch, precision))


def _train(backbone: str, precision: str, steps: int, batch: int) -> None:
    clip = _clip(backbone, precision)
    images = torch.zeros(batch, 3, clip.image_size, clip.image_size, dtype=torch.uint8)
    captions = [f"picture {i}" for i in range(batch)]
    with tempfile.TemporaryDirectory() as work:
        finetune(clip, images, captions, Recipe(steps, 1e-6), batch, 0, Path(work), cycled=False)
