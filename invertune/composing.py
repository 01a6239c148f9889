"""Many scenes of the embedded benchmark at once, in several processes where that pays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from invertune.pictograms import Scene
from invertune.processes import cores, processes
from invertune.sprites import load_sprites
from invertune.training import progress

CHUNK = 64
PAYS_PIXELS = 10**8  # half a minute of one core; starting processes takes some seconds


Part = tuple[np.ndarray, list[list[str]], list[tuple[int, ...]]]


def compose_all(
    compose: Callable[..., Scene], count: int, size_px: int, label: str
) -> tuple[Tensor, list[list[str]], Tensor]:
    """Images [N, 3, size, size] uint8, captions, and classes shown [N, 2] (-1: none) of N scenes.

    Scene i is ``compose(index=i, size=, sprites=)``. ``compose`` goes to other processes: a
    function of ``pictograms``, or a partial of one.
    """
    images = np.empty((count, 3, size_px, size_px), np.uint8)
    captions: list[list[str]] = []
    objects: list[tuple[int, ...]] = []
    starts = range(0, count, CHUNK)
    chunk = partial(_chunk, compose, count, size_px)
    with contextlib.ExitStack() as inside:
        parts: Iterator[Part] = map(chunk, starts)
        if count * size_px**2 >= PAYS_PIXELS and cores() > 1:
            parts = inside.enter_context(processes(cores(), __name__)).map(chunk, starts)
        for part in progress(parts, label, total=len(starts)):
            images[len(captions) : len(captions) + len(part[0])] = part[0]
            captions += part[1]
            objects += part[2]
    return torch.from_numpy(images), captions, torch.tensor(objects)


def _chunk(compose: Callable[..., Scene], count: int, size_px: int, start: int) -> Part:
    sprites = load_sprites()
    indices = range(start, min(start + CHUNK, count))
    scenes = [compose(index=i, size=size_px, sprites=sprites) for i in indices]
    images = np.stack([scene.image.transpose(2, 0, 1) for scene in scenes])
    captions = [list(scene.captions) for scene in scenes]
    return images, captions, [(*scene.objects, -1)[:2] for scene in scenes]
