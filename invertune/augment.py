"""Image augmentations, each a pure function of (seed, step)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import AutoAugment

from invertune.sampling import generator
from invertune.sections import Par


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


def auto_augment(images: Tensor, seed: int, step: int, first: int = 0) -> Tensor:
    """AutoAugment's ImageNet policy on uint8 [N, 3, H, W] (CPU), drawn per image by (seed, step).

    CleanCLIP's second view of the images. Those of a part of a batch, number ``first`` and later,
    get what they would get in the whole. torchvision draws from torch's global generator, whose
    state is put back afterwards.
    """
    policy = AutoAugment()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator(seed, step, 1).initial_seed())
        for _ in range(first):
            policy.get_params(len(policy.policies))
        return torch.stack([policy(image) for image in images])


def noise_and_erase(images: Tensor, fill: Tensor, settings: Par, seed: int, step: int) -> Tensor:
    """PAR's augmentation of [N, 3, H, W] in [0, 1], by (seed, step).

    With ``noise_probability`` an image gets the positive part of Gaussian noise (so it may exceed
    1, as in PAR's code); with ``erase_probability`` a square of ``erase_area`` (shares of the
    image) becomes ``fill`` [1, 3, 1, 1], the mean color: zero once images are normalized. A GPU
    draws the noise itself: one CPU thread draws for 450 images of 224 px a second. In place where
    it can be: PAR's 2,048 images of 224 px are 1.2 GB.
    """
    rng = generator(seed, step, 2)
    n, _, height, width = images.shape
    device = images.device
    source = rng if images.is_cpu else torch.Generator(device).manual_seed(rng.initial_seed())
    noise = torch.randn(images.shape, generator=source, device=device)
    noise.mul_(settings.noise_std).clamp_(0, 1)
    noisy = torch.rand(n, 1, 1, 1, generator=rng) < settings.noise_probability
    low, high = settings.erase_area
    area = torch.empty(n, 1, 1).uniform_(low, high, generator=rng) * height * width
    side = area.sqrt().round()
    top = (torch.rand(n, 1, 1, generator=rng) * (height - side + 1)).floor()
    left = (torch.rand(n, 1, 1, generator=rng) * (width - side + 1)).floor()
    row, column = torch.arange(height).view(1, -1, 1), torch.arange(width).view(1, 1, -1)
    inside = (row >= top) & (row < top + side) & (column >= left) & (column < left + side)
    erased = inside & (torch.rand(n, 1, 1, generator=rng) < settings.erase_probability)
    changed = noise.mul_(noisy.to(device)).add_(images)
    return torch.where(erased[:, None].to(device), fill, changed, out=changed)
