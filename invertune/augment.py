"""Image augmentation as a pure function of (seed, step)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from invertune.training import generator


def augment(images: Tensor, seed: int, step: int) -> Tensor:
    """Random zoom, shift, flip and color gain of [N, 3, H, W] in [0, 1], by (seed, step)."""
    rng = generator(seed, step)
    n = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=rng)

    zoom = uniform(0.75, 1.15, n)
    flip = torch.where(uniform(0, 1, n) < 0.5, -1.0, 1.0)
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0] = zoom * flip
    affine[:, 1, 1] = zoom * uniform(0.9, 1.1, n)
    affine[:, :, 2] = uniform(-0.15, 0.15, n, 2)
    gain = uniform(0.8, 1.2, n, 3, 1, 1).to(images.device)
    grid = F.affine_grid(affine.to(images.device), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    return (moved * gain).clamp(0, 1)
