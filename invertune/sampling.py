"""Which items make up a batch, and random generators: all pure functions of seeds and numbers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

PAIRS = 2**20  # away from every user's seed


class BatchError(ValueError):
    """A data set smaller than a batch, with both sizes."""


def generator(*numbers: int) -> torch.Generator:
    """A CPU random generator that is a pure function of ``numbers``."""
    state = 0
    for number in numbers:
        state = (state * 1_000_003 + number + 1) % (2**63)
    return torch.Generator().manual_seed(state)


def batch_indices(count: int, batch: int, seed: int, step: int) -> Tensor:
    """Indices [batch] of the 0-based ``step``: a new permutation per epoch, last part dropped.

    Raises ``BatchError`` where the data set is smaller than a batch.
    """
    _check_batch(count, batch)
    per_epoch = count // batch
    start = step % per_epoch * batch
    return _order(count, seed, step // per_epoch)[start : start + batch]


def balanced_indices(labels: Tensor, classes: int, seed: int, step: int) -> Tensor:
    """Indices of one batch that shows every class once, so that no caption is a false negative.

    ``labels`` [N] cycle through the classes equally often; each class is reshuffled every epoch.
    """
    per_class = len(labels) // classes
    epoch, turn = divmod(step, per_class)
    by_class = labels.argsort(stable=True).view(classes, per_class)
    order = torch.rand(classes, per_class, generator=generator(seed, epoch)).argsort(1)
    return by_class.gather(1, order[:, turn : turn + 1]).flatten()


def pair_indices(count: int, batch: int, seed: int, step: int, cycled: bool) -> Tensor:
    """Indices [batch] of caption pairs: ``batch_indices``, as CLIP and CleanCLIP shuffle.

    Where the pairs cycle through the classes (``cycled``), runs of consecutive ones, reshuffled
    every epoch: a run repeats no class (up to their number), so the captions of a batch rarely fit
    another image, as among the far more varied captions of web data.
    """
    _check_batch(count, batch)
    if cycled:
        first = batch_indices(count // batch, 1, seed, step) * batch
        return first + torch.arange(batch)
    return batch_indices(count, batch, seed + PAIRS, step)  # not the order that chose the poison


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, epoch))


def _check_batch(count: int, batch: int) -> None:
    if count < batch:
        raise BatchError(f"the data set has {count} items, fewer than one batch of {batch}")
