"""Pretraining: balanced batches and augmentation."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from invertune.augment import augment
from invertune.pretraining import balanced_indices


@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 3))
def test_a_balanced_batch_shows_every_class_once(classes: int, per_class: int, seed: int) -> None:
    labels = torch.arange(classes * per_class) * 5 % classes
    if len(labels[:classes].unique()) < classes:
        labels = torch.arange(classes * per_class) % classes
    epoch = [balanced_indices(labels, classes, seed, step) for step in range(per_class)]
    assert all(torch.equal(labels[rows].sort().values, torch.arange(classes)) for rows in epoch)
    assert len(torch.cat(epoch).unique()) == len(labels)


def test_augmentation_is_a_function_of_seed_and_step_and_keeps_the_range() -> None:
    images = torch.rand(4, 3, 16, 16)
    first = augment(images, 0, 3)
    assert torch.equal(first, augment(images, 0, 3))
    assert not torch.equal(first, augment(images, 0, 4))
    assert not torch.equal(first, augment(images, 1, 3))
    assert first.shape == images.shape and first.min() >= 0 and first.max() <= 1
