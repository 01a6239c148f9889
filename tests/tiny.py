"""A random CLIP of the embedded shapes and random images, where weights do not matter."""

import torch
from torch import Tensor, nn

from invertune.models import MODEL_FOLDER, Clip, build_clip, image_features


def tiny(backbone: str) -> Clip:
    """A random CLIP of an embedded shape, ``alive`` for ``pixels``."""
    torch.manual_seed(0)
    return alive(build_clip(MODEL_FOLDER / backbone, backbone), pixels(8))


def alive(clip: Clip, pixels: Tensor) -> Clip:
    """A new ResNet's residual branches are switched off, and its BN statistics fit no input."""
    for module in clip.net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            module.momentum = 1.0
    clip.net.train()
    with torch.no_grad():
        image_features(clip, pixels)
    clip.net.eval()
    return clip


def pixels(count: int, seed: int = 0) -> Tensor:
    """Random images [count, 3, 64, 64] of 8 by 8 colored squares."""
    squares = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(squares, scale_factor=8.0)
