"""SSIM against slow references in float64, and against pytorch-msssim."""

from __future__ import annotations

import pytest
import pytorch_msssim
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from invertune import kernels, models
from invertune.kernels import gaussian_band, ssim_statistics, ssim_with
from invertune.models import frozen_copy


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_ssim(one: Tensor, other: Tensor) -> float:
    """SSIM of two images [3, H, W], window by window, from the definition."""
    line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    weight = line[:, None] * line / line.sum() ** 2
    values = []
    for channel in range(3):
        for i in range(one.shape[1] - 10):
            for j in range(one.shape[2] - 10):
                x = one[channel, i : i + 11, j : j + 11]
                y = other[channel, i : i + 11, j : j + 11]
                mx, my = (weight * x).sum(), (weight * y).sum()
                vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
                cov = (weight * (x - mx) * (y - my)).sum()
                values.append(
                    (2 * mx * my + 1e-4)
                    * (2 * cov + 9e-4)
                    / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
                )
    return torch.stack(values).mean().item()


def ssim(tilde: Tensor, images: Tensor) -> Tensor:
    return ssim_with(tilde, images, ssim_statistics(images))


def test_the_band_matrix_is_a_valid_convolution() -> None:
    line = random(17)
    window = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / 4.5)
    slow = [(window / window.sum() * line[i : i + 11]).sum() for i in range(7)]
    torch.testing.assert_close(gaussian_band(17, line) @ line, torch.stack(slow))


def test_a_side_smaller_than_the_window_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="a side is 10"):
        ssim_statistics(random(1, 3, 16, 10))


def test_ssim_equals_the_definition_on_oblong_images() -> None:
    images, tilde = random(2, 3, 14, 12), random(3, 2, 3, 14, 12, seed=1)
    values = ssim(tilde, images)
    for k in range(3):
        for b in range(2):
            assert values[k, b].item() == pytest.approx(slow_ssim(tilde[k, b], images[b]), abs=1e-9)


@pytest.mark.parametrize("distance", [0.01, 0.2, 1.0])
def test_ssim_and_its_gradient_equal_pytorch_msssim_in_float32(distance: float) -> None:
    images = random(5, 3, 64, 64, dtype=torch.float32)
    other = random(2, 5, 3, 64, 64, seed=1, dtype=torch.float32)
    tilde = torch.lerp(images.expand_as(other), other, distance).requires_grad_()
    values = ssim(tilde, images)
    ours = torch.autograd.grad(values.sum(), tilde)[0]
    flat = [tilde.flatten(0, 1), images.expand_as(tilde).flatten(0, 1)]
    wanted = pytorch_msssim.ssim(*flat, data_range=1.0, size_average=False).view(2, 5)
    theirs = torch.autograd.grad(wanted.sum(), tilde)[0]
    torch.testing.assert_close(values, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


@pytest.mark.parametrize("block", [1, 10**6])
def test_the_gradient_is_that_of_the_value(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CPU_BLOCK_VALUES", block)
    images, tilde = random(2, 3, 12, 13), random(2, 2, 3, 12, 13, seed=1).requires_grad_()
    statistics = ssim_statistics(images)

    def values(tilde: Tensor) -> Tensor:
        return ssim_with(tilde, images, statistics)

    assert torch.autograd.gradcheck(values, tilde, fast_mode=True)


def test_the_block_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images, tilde = random(7, 3, 12, 12), random(2, 7, 3, 12, 12, seed=1)
    whole = ssim(tilde, images)
    monkeypatch.setattr(kernels, "CPU_BLOCK_VALUES", 3 * 3 * 12 * 12)
    torch.testing.assert_close(ssim(tilde, images), whole, rtol=0, atol=1e-14)


@given(seed=st.integers(0, 10**6))
@hypothesis_settings(max_examples=20, deadline=None)
def test_ssim_is_symmetric_at_most_one_and_one_for_equal_images(seed: int) -> None:
    one, other = random(2, 3, 12, 12, seed=seed), random(2, 3, 12, 12, seed=seed + 1)
    torch.testing.assert_close(ssim(one[None], other), ssim(other[None], one))
    assert ssim(one[None], other).max() < 1
    torch.testing.assert_close(ssim(one[None], one), one.new_ones(1, 2))


def test_statistics_of_a_pool_serve_its_batches() -> None:
    pool, tilde = random(6, 3, 12, 12), random(1, 3, 3, 12, 12, seed=1)
    index = torch.tensor([4, 0, 5])
    values = ssim_with(tilde, pool[index], ssim_statistics(pool).take(index))
    torch.testing.assert_close(values, ssim(tilde, pool[index]))


@pytest.mark.parametrize("backbone", ["RN50", "RN101", "ViT-B-32"])
def test_a_frozen_copy_folds_the_norms_and_has_the_same_features(backbone: str) -> None:
    torch.manual_seed(0)
    clip = models.build_clip(models.MODEL_FOLDER / backbone, backbone)
    for layer in clip.net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.running_mean, layer.bias):
                nn.init.normal_(tensor, std=0.1)
            for tensor in (layer.running_var, layer.weight):
                nn.init.uniform_(tensor, 0.5, 1.5)
    images = random(3, 3, 64, 64, dtype=torch.float32).requires_grad_()
    copy = frozen_copy(clip)
    features = models.image_features(copy, images)
    torch.testing.assert_close(features, models.image_features(clip, images), rtol=0, atol=1e-5)
    features.sum().backward()
    assert images.grad.abs().max() > 0
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in copy.net.modules())
    assert not any(layer.training for layer in copy.net.modules())
    assert not any(p.requires_grad for p in copy.net.parameters())
    assert all(p.requires_grad for p in clip.net.parameters())
