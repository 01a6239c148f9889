"""Batches that a thread prepares: the right ones, in any order, errors only where they belong."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import pytest
import torch
from torch import Tensor

from invertune.prefetch import Prefetcher

DATA = torch.arange(12).view(6, 2)


def batch_at(number: int) -> tuple[Tensor, Tensor]:
    rows = torch.arange(2 * number, 2 * number + 2)
    return DATA[rows], rows


@pytest.mark.parametrize("threaded", [False, True])
def test_every_number_gets_its_own_batch(threaded: bool) -> None:
    ahead = Prefetcher(batch_at, "cpu", threaded)
    for number in (0, 1, 2, 0, 2, 1, 1):
        images, rows = ahead(number)
        assert torch.equal(images, DATA[2 * number : 2 * number + 2])
        assert rows.tolist() == [2 * number, 2 * number + 1]


def test_the_next_batch_is_prepared_before_it_is_asked_for() -> None:
    asked: list[int] = []

    def noting(number: int) -> tuple[Tensor, ...]:
        asked.append(number)
        return batch_at(number)

    ahead = Prefetcher(noting, "cpu", threaded=True)
    ahead(0)
    assert isinstance(ahead.thread, ThreadPoolExecutor)
    ahead.thread.shutdown()  # waits for it
    assert asked == [0, 1]


@pytest.mark.parametrize("threaded", [False, True])
def test_an_error_comes_with_the_number_that_has_it(threaded: bool) -> None:
    ahead = Prefetcher(batch_at, "cpu", threaded)
    ahead(2)  # there is no batch 3
    with pytest.raises(IndexError):
        ahead(3)


def test_what_it_holds_and_its_thread_go_with_it() -> None:
    before, payload = set(threading.enumerate()), torch.zeros(3)
    kept = weakref.ref(payload)
    ahead = Prefetcher(lambda number, data=payload: (data + number,), "cpu", threaded=True)
    ahead(0)
    (thread,) = set(threading.enumerate()) - before
    del ahead, payload
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive() and kept() is None


def test_a_thread_sees_the_context_of_the_call() -> None:
    own = ContextVar("own", default=0)
    ahead = Prefetcher(lambda number: (torch.tensor([own.get(), number]),), "cpu", threaded=True)
    seen = []
    for number, value in enumerate((1, 1, 2)):
        token = own.set(value)
        seen.append(ahead(number)[0].tolist())
        own.reset(token)
    assert seen == [[1, 0], [1, 1], [1, 2]]  # the last was prepared during the call before it
