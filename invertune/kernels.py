"""The tensor work of trigger inversion: SSIM against a fixed clean image.

Everything runs on whichever device its inputs are on, in their floating-point type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WINDOW = 11
SIGMA = 1.5
C1 = 0.01**2
C2 = 0.03**2
# On a CPU a block of images is finished while its maps are still in the cache: about 400 kB a map.
CPU_BLOCK_VALUES = 100_000


@dataclass(frozen=True)
class SsimStatistics:
    """Local means and variances [B, 3, H - 10, W - 10] of clean images, for ``ssim_with``."""

    mean: Tensor
    variance: Tensor

    def take(self, index: Tensor) -> SsimStatistics:
        """The statistics of the images at ``index`` [b]."""
        return SsimStatistics(self.mean[index], self.variance[index])


def gaussian_band(side: int, like: Tensor) -> Tensor:
    """The SSIM window along one axis as a band matrix [side - 10, side], rows summing to 1.

    A valid 1-D convolution of a line with the window is one product with it, which at image
    sizes is several times faster than a depthwise convolution on a CPU. Type and device as
    ``like``. Raises ``ValueError`` where the window does not fit.
    """
    if side < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW} x {WINDOW} px; a side is {side}")
    position = torch.arange(side, device=like.device)
    offset = position - position[: side - WINDOW + 1, None] - WINDOW // 2
    weight = torch.exp(-(offset.to(like.dtype) ** 2) / (2 * SIGMA**2))
    weight = weight.where(offset.abs() <= WINDOW // 2, 0)
    return weight / weight.sum(1, keepdim=True)


def ssim_statistics(images: Tensor) -> SsimStatistics:
    """The part of SSIM that depends on the clean ``images`` [B, 3, H, W] alone."""
    rows, columns = (gaussian_band(side, images) for side in images.shape[-2:])
    mean = rows @ (images @ columns.T)
    return SsimStatistics(mean, rows @ (images.square() @ columns.T) - mean.square())


def ssim_with(images_tilde: Tensor, images: Tensor, statistics: SsimStatistics) -> Tensor:
    """SSIM [K, B] of ``images_tilde`` [K, B, 3, H, W] against ``images`` [B, 3, H, W].

    Gaussian 11 x 11 window of sigma 1.5, valid positions, data range 1, K1 = .01, K2 = .03, mean
    over positions and channels (Wang et al. 2004). ``statistics`` are those of ``images``.
    Differentiable, once, in ``images_tilde`` only.
    """
    return _Ssim.apply(images_tilde, images, statistics.mean, statistics.variance)


class _Ssim(torch.autograd.Function):
    """Value and gradient in one pass, so that no intermediate map outlives its block."""

    @staticmethod
    def forward(ctx: Any, tilde: Tensor, images: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        bands = [gaussian_band(side, tilde) for side in tilde.shape[-2:]]
        runs, count = tilde.shape[:2]
        size = max(1, CPU_BLOCK_VALUES // images[0].numel()) if tilde.is_cpu else count
        values = tilde.new_empty(runs, count)
        gradient = torch.empty_like(tilde, memory_format=torch.contiguous_format)
        for run in range(runs):
            for start in range(0, count, size):
                part = slice(start, start + size)
                values[run, part], gradient[run, part] = _ssim_block(
                    tilde[run, part], images[part], mean[part], variance[part], bands
                )
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream[..., None, None, None] * gradient, None, None, None


def _ssim_block(
    tilde: Tensor, images: Tensor, mean: Tensor, variance: Tensor, bands: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """SSIM [b] of images [b, 3, H, W], and its gradient in ``tilde``.

    SSIM is luminance * structure / (energy * spread) at each position, and depends on ``tilde``
    through the local means of tilde, of its square and of its product with the clean image.
    """
    rows, columns = bands
    mean_tilde = rows @ (tilde @ columns.T)
    mean_square = rows @ (tilde.square() @ columns.T)
    mean_product = rows @ ((tilde * images) @ columns.T)
    square, product = mean_tilde.square(), mean * mean_tilde
    luminance = (2 * product).add_(C1)
    structure = mean_product.sub_(product).mul_(2).add_(C2)
    energy = torch.addcmul(square, mean, mean).add_(C1)
    spread = mean_square.sub_(square).add_(variance).add_(C2)
    scale = (energy * spread).reciprocal_()
    by_structure = luminance * scale
    ssim = by_structure * structure
    by_spread = ssim / spread
    by_mean = (structure * scale).sub_(by_structure).mul_(mean)
    by_mean.addcmul_(by_spread.sub(ssim / energy), mean_tilde)
    gradient = rows.T @ (by_mean @ columns)
    gradient.addcmul_(images, rows.T @ (by_structure @ columns))
    gradient.addcmul_(tilde, rows.T @ (by_spread @ columns), value=-1)
    positions = mean[0].numel()
    return ssim.mean((1, 2, 3)), gradient.mul_(2 / positions)
