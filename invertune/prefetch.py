"""Batches on their way to the device, so that a GPU need not wait for them."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Batch = tuple[Tensor, ...]


class Prefetcher:
    """``batch_at(number)`` on ``device``; while a GPU works, a thread prepares the next number's.

    Prepared means selected and in pinned memory, which is copied without waiting. An error of
    ``batch_at`` is raised when its number is asked for. ``threaded`` None: on CUDA only. The thread
    sees the caller's context variables, and ends with this object.
    """

    def __init__(
        self,
        batch_at: Callable[[int], Batch],
        device: torch.device | str,
        threaded: bool | None = None,
    ) -> None:
        self.batch_at, self.device = batch_at, torch.device(device)
        self.gpu = torch.cuda.current_device() if self.device.type == "cuda" else None
        wanted = self.gpu is not None if threaded is None else threaded
        start = None if self.gpu is None else functools.partial(torch.cuda.set_device, self.gpu)
        self.thread = ThreadPoolExecutor(1, initializer=start) if wanted else None
        self.waiting: dict[int, Future[Batch]] = {}

    def __call__(self, number: int) -> Batch:
        """The batch, on the device."""
        if self.thread is None:
            batch = self.batch_at(number)
        else:
            found = self.waiting.get(number) or self._submit(self.thread, number)
            self.waiting = {number + 1: self._submit(self.thread, number + 1)}
            batch = found.result()
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)

    def _submit(self, thread: ThreadPoolExecutor, number: int) -> Future[Batch]:
        return thread.submit(contextvars.copy_context().run, self._prepared, number)

    def _prepared(self, number: int) -> Batch:
        batch = self.batch_at(number)
        return (
            batch if self.gpu is None else tuple(t.pin_memory() if t.is_cpu else t for t in batch)
        )


def with_rows(images: Tensor, rows_at: Callable[[int], Tensor], device: torch.device) -> Prefetcher:
    """A ``Prefetcher`` of (``images[rows]``, ``rows``), where rows = ``rows_at(number)``."""
    return Prefetcher(lambda n: (images[(rows := rows_at(n)).to(images.device)], rows), device)
