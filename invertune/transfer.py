"""Batches on their way to the device, so that a GPU need not wait for them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Batch = tuple[Tensor, ...]


class Ahead:
    """``batch_at(number)`` on ``device``; while a GPU works, a thread prepares the next number's.

    Prepared means selected and in pinned memory, which is copied without waiting. An error of
    ``batch_at`` is raised when its number is asked for. ``threaded`` None: on CUDA only.
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
        self.thread = ThreadPoolExecutor(1, initializer=self._start) if wanted else None
        self.waiting: dict[int, Future[Batch]] = {}

    def __call__(self, number: int) -> Batch:
        """The batch, on the device."""
        if self.thread is None:
            batch = self.batch_at(number)
        else:
            found = self.waiting.get(number) or self.thread.submit(self._prepared, number)
            self.waiting = {number + 1: self.thread.submit(self._prepared, number + 1)}
            batch = found.result()
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)

    def _start(self) -> None:
        if self.gpu is not None:
            torch.cuda.set_device(self.gpu)  # a new thread is on the first one

    def _prepared(self, number: int) -> Batch:
        batch = self.batch_at(number)
        return (
            batch if self.gpu is None else tuple(t.pin_memory() if t.is_cpu else t for t in batch)
        )
