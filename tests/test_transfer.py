"""Batches that a thread prepares: the right ones, in any order, errors only where they belong."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from invertune.transfer import Ahead

DATA = torch.arange(12).view(6, 2)


def batch_at(number: int) -> tuple[Tensor, Tensor]:
    rows = torch.arange(2 * number, 2 * number + 2)
    return DATA[rows], rows


@pytest.mark.parametrize("threaded", [False, True])
def test_every_number_gets_its_own_batch(threaded: bool) -> None:
    ahead = Ahead(batch_at, "cpu", threaded)
    for number in (0, 1, 2, 0, 2, 1, 1):
        images, rows = ahead(number)
        assert torch.equal(images, DATA[2 * number : 2 * number + 2])
        assert rows.tolist() == [2 * number, 2 * number + 1]


def test_the_next_batch_is_prepared_before_it_is_asked_for() -> None:
    asked: list[int] = []

    def noting(number: int) -> tuple[Tensor, ...]:
        asked.append(number)
        return batch_at(number)

    ahead = Ahead(noting, "cpu", threaded=True)
    ahead(0)
    assert isinstance(ahead.thread, ThreadPoolExecutor)
    ahead.thread.shutdown()  # waits for it
    assert asked == [0, 1]


@pytest.mark.parametrize("threaded", [False, True])
def test_an_error_comes_with_the_number_that_has_it(threaded: bool) -> None:
    ahead = Ahead(batch_at, "cpu", threaded)
    ahead(2)  # there is no batch 3
    with pytest.raises(IndexError):
        ahead(3)
