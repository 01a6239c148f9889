"""Universal adversarial perturbations of a suspected model, none of them told a target.

A patch and an L-infinity ball are optimized directly, each to move images away from their own
features or from the text of their own prediction; AdvCLIP's generator and single Fourier waves are
two more kinds.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from invertune import triggers
from invertune.models import Clip, image_features, to_pixels
from invertune.prefetch import with_rows
from invertune.sampling import batch_indices, generator
from invertune.sections import Identification
from invertune.terminal import progress
from invertune.triggers import Trigger


@dataclass(frozen=True)
class View:
    """What the suspected ``clip`` sees in clean ``images`` (uint8 [N, 3, H, W]).

    ``features`` [N, D] are their unit features, ``texts`` [N, D] those of their predicted classes.
    """

    clip: Clip
    images: Tensor
    features: Tensor
    texts: Tensor


def perturb(kind: str, tensor: Tensor, images: Tensor) -> Tensor:
    """Images in [0, 1] under the perturbation ``tensor`` of a kind."""
    return triggers.apply(as_trigger(kind, tensor, images.shape[-1]), images)


def as_trigger(kind: str, tensor: Tensor, size: int) -> Trigger:
    """The perturbation ``tensor`` of a kind as a trigger for images of ``size`` px."""
    if kind == "fourier" or kind.startswith("ball"):
        return Trigger("sinusoid", size, {"wave": tensor}, {})
    start = max(size - round(size * 14 / 224) - tensor.shape[-1], 0)  # as in the released code
    return Trigger("patch", size, {"patch": tensor}, {"row": start, "column": start})


def universal_patch(view: View, anchors: Tensor, settings: Identification, seed: int) -> Tensor:
    """A patch [3, p, p] in [0, 1] that moves all images away from their ``anchors`` [N, D]."""
    start = torch.rand(3, settings.patch_px, settings.patch_px, generator=generator(seed, 3))
    return _move_away(view, anchors, "patch", start, (0, 1), settings, seed)


def universal_ball(view: View, anchors: Tensor, settings: Identification, seed: int) -> Tensor:
    """An additive perturbation [3, H, W] within ``ball_radius`` that does the same."""
    radius, size = settings.ball_radius, view.clip.image_size
    start = (2 * torch.rand(3, size, size, generator=generator(seed, 4)) - 1) * radius
    return _move_away(view, anchors, "ball", start, (-radius, radius), settings, seed)


def _move_away(
    view: View,
    anchors: Tensor,
    kind: str,
    start: Tensor,
    bounds: tuple[float, float],
    settings: Identification,
    seed: int,
) -> Tensor:
    """Minimizes the mean cosine to the anchors; the step is a share of the upper bound."""
    device = view.clip.device
    tensor = start.to(device).requires_grad_(True)
    optimizer = torch.optim.Adam([tensor], lr=settings.lr * bounds[1])
    rows_at = functools.partial(batch_indices, len(view.images), settings.batch, seed)
    batches = with_rows(view.images, rows_at, device)
    for step in progress(range(settings.steps), "universal perturbation"):
        pictures, rows = batches(step)
        features = image_features(view.clip, perturb(kind, tensor, to_pixels(pictures, device)))
        optimizer.zero_grad()
        (features * anchors[rows]).sum(1).mean().backward()
        optimizer.step()
        with torch.no_grad():
            tensor.clamp_(*bounds)
    return tensor.detach()


@torch.no_grad()
def fourier_wave(view: View, settings: Identification, seed: int) -> Tensor:
    """The gray plane wave [3, H, W] that moves one batch furthest from its features.

    The single-Fourier attack (Tsuzuku and Sato, CVPR 2019): of all wave vectors of at most
    ``wave_cycles`` cycles per image, at amplitude ``wave_amplitude`` and one phase, the best one;
    no gradients.
    """
    size, device = view.clip.image_size, view.clip.device
    rows = batch_indices(len(view.images), settings.batch, seed, 0)
    pixels = to_pixels(view.images[rows], device)
    y, x = torch.meshgrid(*[torch.arange(size, device=device) / size] * 2, indexing="ij")
    waves = [
        settings.wave_amplitude * torch.cos(2 * math.pi * (down * y + across * x) - math.pi / 4)
        for down, across in settings.waves
    ]

    def cosine(wave: Tensor) -> float:
        features = image_features(view.clip, triggers.add(pixels, wave))
        return (features * view.features[rows]).sum(1).mean().item()

    found = min(progress(waves, "Fourier waves"), key=cosine)
    return found.expand(3, size, size).contiguous()
