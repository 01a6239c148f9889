"""The triggers of the six attacks, and the inverted one, in pixel space.

Every function takes images [N, 3, H, W] in [0, 1], after resizing and cropping, and returns images
of the same shape, dtype and range. All are differentiable with respect to the images and run on
the device of the images. One fixed, seeded tensor stands for each trigger (the paper, A.1): a
trigger drawn anew for every image could not be modeled by one mask and pattern.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from invertune.sampling import generator


@dataclass(frozen=True, eq=False)
class Trigger:
    """A trigger made for images of ``size`` x ``size`` pixels.

    ``kind`` names a function of ``KINDS``; ``tensors`` and ``scalars`` are its keyword arguments.
    """

    kind: str
    size: int
    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, float]


def paste(images: Tensor, patch: Tensor, row: int, column: int) -> Tensor:
    """Replaces a rectangle by ``patch`` [3, h, w], its first pixel at (row, column)."""
    height, width = patch.shape[-2:]
    pasted = images.clone()
    pasted[..., row : row + height, column : column + width] = patch
    return pasted


def blend(images: Tensor, pattern: Tensor, alpha: float) -> Tensor:
    """alpha * pattern + (1 - alpha) * images, for one ``pattern`` [3, H, W] in [0, 1]."""
    return torch.lerp(images, pattern.expand_as(images), alpha)


def add(images: Tensor, wave: Tensor) -> Tensor:
    """Adds ``wave`` (any shape that broadcasts to [3, H, W]) and clips to [0, 1]."""
    return (images + wave).clamp(0, 1)


def warp(images: Tensor, grid: Tensor) -> Tensor:
    """Bilinear sampling at ``grid`` [H, W, 2], (x, y) in [-1, 1] between the corner pixels.

    No sample leaves the image, so the padding is never seen; "border" only keeps rounding at the
    edge from mixing in black. The clip removes rounding above 1.
    """
    grids = grid.expand(len(images), -1, -1, -1)
    moved = F.grid_sample(images, grids, padding_mode="border", align_corners=True)
    return moved.clamp(0, 1)


def compose(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """Equation 2: m * t + (1 - m) * x, ``mask`` [3 or 1, H, W] and ``pattern`` [3, H, W] in [0, 1].

    Exact at the ends: a mask of 0 returns the images, a mask of 1 the pattern. K triggers, each
    [K, 1, 3, H, W], give [K, N, 3, H, W].
    """
    return torch.lerp(images, pattern, mask)


KINDS: dict[str, Callable[..., Tensor]] = {
    "patch": paste,
    "blend": blend,
    "sinusoid": add,
    "warp": warp,
    "mask": compose,
}


def apply(trigger: Trigger, images: Tensor) -> Tensor:
    """``images`` [N, 3, size, size] in [0, 1] with the trigger.

    Raises ``ValueError`` for images of another size or of an integer type.
    """
    if images.ndim != 4 or images.shape[1:] != (3, trigger.size, trigger.size):
        raise ValueError(
            f"this {trigger.kind} trigger needs images of shape [N, 3, {trigger.size}, "
            f"{trigger.size}], not {list(images.shape)}"
        )
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point in [0, 1], not {images.dtype}")
    tensors = {name: tensor.to(images) for name, tensor in trigger.tensors.items()}
    return KINDS[trigger.kind](images, **tensors, **trigger.scalars)


def required(trigger: Trigger | None, attack: str) -> Trigger:
    """The ``trigger`` of an attack; ``ValueError`` for a null, which has none."""
    if trigger is None:
        raise ValueError(f"{attack!r} has no trigger of its own; choose an attack")
    return trigger


def in_turn(found: Sequence[Trigger], images: Tensor) -> Tensor:
    """Images [N, 3, H, W] in [0, 1] that take the triggers in turn, one each."""
    triggered = images.clone()
    for start, trigger in enumerate(found):
        triggered[start :: len(found)] = apply(trigger, images[start :: len(found)])
    return triggered


def covered(trigger: Trigger) -> Tensor | None:
    """Bool [size, size]: the pixels under a patch; None for a trigger all over the image."""
    if trigger.kind != "patch":
        return None
    place = torch.zeros(trigger.size, trigger.size, dtype=torch.bool)
    height, width = trigger.tensors["patch"].shape[-2:]
    row, column = (int(trigger.scalars[name]) for name in ("row", "column"))
    place[row : row + height, column : column + width] = True
    return place


def quarter(place: Tensor) -> Tensor:
    """Bool [H, W]: the quarter of the image that the center of ``place`` [H, W] lies in."""
    around = torch.zeros_like(place)
    ends = []
    for size, center in zip(place.shape, place.nonzero().double().mean(0).tolist(), strict=True):
        half = size // 2
        ends.append(slice(half, size) if center >= half else slice(0, half))
    around[ends[0], ends[1]] = True
    return around


def energy_share(mask: Tensor, place: Tensor) -> float:
    """Percent of the energy (sum of squares) of ``mask`` [3, H, W] that lies at ``place`` [H, W].

    0 for an empty mask.
    """
    energy = mask.double().square().sum(0)
    return 100 * float(energy[place.to(mask.device)].sum() / energy.sum().clamp(min=1e-12))


def patch_trigger(pattern: Tensor, size: int, location: str = "corner") -> Trigger:
    """A given ``pattern`` [3, p, p] in [0, 1] as a patch: BadCLIP's optimized one (A.1).

    ``location`` is "corner" (flush with the bottom right) or "middle". Raises ``ValueError``.
    """
    height, width = _check_pixels("pattern", pattern)
    if max(height, width) > size:
        raise ValueError(f"a patch of {height} x {width} does not fit into {size} x {size} pixels")
    row, column = size - height, size - width
    if location == "middle":
        row, column = row // 2, column // 2
    elif location != "corner":
        raise ValueError(f"unknown patch location {location!r}; choose corner or middle")
    return Trigger("patch", size, {"patch": pattern}, {"row": row, "column": column})


def badnet_trigger(size: int, patch: int, seed: int) -> Trigger:
    """BadNet (A.1): one draw of N(0, 1), clipped to [0, 1], of ``patch`` px in the corner."""
    noise = torch.randn(3, patch, patch, generator=generator(seed)).clamp(0, 1)
    return patch_trigger(noise, size)


def white_patch_trigger(size: int, patch: int) -> Trigger:
    """BadEncoder (A.1): a white square of ``patch`` px in the corner."""
    return patch_trigger(torch.ones(3, patch, patch), size)


def blended_trigger(size: int, alpha: float, seed: int) -> Trigger:
    """Blended (A.1): one image of uniform noise, mixed in with weight ``alpha`` (paper: 0.2)."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, but a blend needs a weight in [0, 1]")
    # not generator(seed), which draws the mask that inversion begins with
    noise = torch.rand(3, size, size, generator=generator(seed, 1))
    return Trigger("blend", size, {"pattern": noise}, {"alpha": alpha})


def sig_trigger(size: int, amplitude: float, cycles: float) -> Trigger:
    """SIG (A.1): vertical stripes, ``cycles`` per width (paper: 6), ``amplitude`` 60/255."""
    columns = torch.arange(size, dtype=torch.float64)
    wave = amplitude * torch.sin(2 * math.pi * cycles * columns / size)
    return Trigger("sinusoid", size, {"wave": wave.float().view(1, 1, size)}, {})


def wanet_trigger(size: int, grid: int, strength: float, seed: int) -> Trigger:
    """WaNet (A.1): a smooth random warp from ``grid`` x ``grid`` control points.

    The mean shift at the control points is ``strength`` / 2 px whatever the size. Presets:
    ``grid=size, strength=1`` is the CleanCLIP code's; ``grid=4, strength=0.5`` is WaNet's own.
    """
    noise = torch.rand(1, 2, grid, grid, generator=generator(seed)) * 2 - 1
    noise = noise / noise.abs().mean()
    shift = F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=True)
    line = torch.linspace(-1, 1, size)
    identity = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    field = identity + strength * shift[0].permute(1, 2, 0) / size
    return Trigger("warp", size, {"grid": field.clamp(-1, 1)}, {})


def mask_trigger(mask: Tensor, pattern: Tensor) -> Trigger:
    """The inverted trigger (m, t) of equation 2; the mask has three channels or one.

    Raises ``ValueError`` for shapes that differ and for values outside [0, 1].
    """
    height, width = _check_pixels("pattern", pattern)
    if _check_pixels("mask", mask) != (height, width) or height != width:
        raise ValueError(
            f"mask {list(mask.shape)} and pattern {list(pattern.shape)} must be squares of one size"
        )
    return Trigger("mask", height, {"mask": mask, "pattern": pattern}, {})


def _check_pixels(name: str, tensor: Tensor) -> tuple[int, int]:
    channels = (1, 3) if name == "mask" else (3,)
    if tensor.ndim != 3 or tensor.shape[0] not in channels:
        raise ValueError(f"{name} must be of shape [3, H, W], not {list(tensor.shape)}")
    if not ((tensor >= 0) & (tensor <= 1)).all():  # false for NaN as well
        raise ValueError(f"{name} has values outside [0, 1]; triggers live in pixel space")
    return tensor.shape[1], tensor.shape[2]


def trigger_metadata(trigger: Trigger) -> dict[str, Any]:
    """What a trigger has besides its ``tensors``, as plain JSON values."""
    return {"kind": trigger.kind, "size": trigger.size, "scalars": dict(trigger.scalars)}


def trigger_from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Trigger:
    """The trigger of saved ``tensors`` and ``trigger_metadata`` (``ValueError``)."""
    if metadata.get("kind") not in KINDS:
        raise ValueError(f"unknown trigger kind {metadata.get('kind')!r}; one of {list(KINDS)}")
    return Trigger(metadata["kind"], metadata["size"], dict(tensors), dict(metadata["scalars"]))
