"""Processes that share the work of this one, and end with it."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor

import torch


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes(count: int, module: str, threads: int = 1) -> ProcessPoolExecutor:
    """A pool of ``count`` processes of ``threads`` threads each; they end however this one ends.

    ``module`` is imported once for all of them, torch with it.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([module])
    return ProcessPoolExecutor(count, server, _start, (threads,))


def _start(threads: int) -> None:
    """In each process, before its first call."""
    torch.set_num_threads(threads)
    os.environ["INVERTUNE_PROGRESS"] = "0"  # bars of several processes would mix
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
