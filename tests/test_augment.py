"""Image augmentations: ranges, shapes, and that (seed, step) decides everything."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from invertune.augment import augment, auto_augment, noise_and_erase
from invertune.sections import Par
from invertune.settings import load_settings

FILL = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)


def images(count: int = 6, size: int = 32) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), generator=rng, dtype=torch.uint8)


def par(**changes: object) -> Par:
    return Par.model_validate(load_settings("mini").baselines.par.model_dump() | changes)


def erase(pixels: Tensor, seed: int, step: int) -> Tensor:
    return noise_and_erase(pixels, FILL, par(), seed, step)


@pytest.mark.parametrize("function", [augment, auto_augment, erase])
def test_seed_and_step_decide_everything(function) -> None:
    pixels = images() if function is auto_augment else images().float() / 255
    torch.manual_seed(1)
    first = function(pixels, 3, 4)
    torch.manual_seed(2)
    assert torch.equal(first, function(pixels, 3, 4))
    assert first.shape == pixels.shape and first.dtype == pixels.dtype
    assert function is not augment or (first.min() >= 0 and first.max() <= 1)
    assert not torch.equal(first, function(pixels, 3, 5))
    assert not torch.equal(first, function(pixels, 4, 4))


def test_auto_augment_leaves_the_global_generator_alone_and_draws_for_each_image() -> None:
    same = images(1).expand(8, -1, -1, -1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    changed = auto_augment(same, 0, 0)
    assert torch.equal(torch.rand(3), expected)
    assert len({image.numpy().tobytes() for image in changed}) > 4
    assert torch.equal(same[0], images(1)[0])


def test_a_part_of_a_batch_gets_what_it_gets_in_the_whole() -> None:
    whole = auto_augment(images(), 3, 4)
    for first in (0, 1, 4):
        assert torch.equal(auto_augment(images()[first:], 3, 4, first), whole[first:])
    assert torch.equal(auto_augment(images()[2:4], 3, 4, 2), whole[2:4])


class Copies(TorchDispatchMode):
    """Keeps every float tensor of ``size`` values that is made inside, so that none is reused."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.made = size, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        floats = isinstance(result, Tensor) and result.is_floating_point()
        if floats and result.numel() == self.size:
            self.made[result.untyped_storage().data_ptr()] = result
        return result


def test_noise_and_erased_squares_take_one_copy_of_the_images() -> None:
    pixels = images().float() / 255
    before = pixels.clone()
    with Copies(pixels.numel()) as copies:
        erase(pixels, 3, 4)
    assert len(copies.made) == 1 and torch.equal(pixels, before)


@given(st.integers(0, 1000), st.integers(8, 40))
def test_the_erased_square_has_the_stated_area_and_color(seed: int, size: int) -> None:
    pixels = torch.full((4, 3, size, size), 0.9)
    low, high = 0.02, 0.1
    settings = par(noise_probability=0, erase_probability=1, erase_area=(low, high))
    changed = noise_and_erase(pixels, FILL, settings, seed, 0)
    for image in changed:
        rows, columns = (image[0] != pixels[0, 0]).nonzero(as_tuple=True)
        side = int(rows.max() - rows.min()) + 1
        assert len(rows) == side**2 == (int(columns.max() - columns.min()) + 1) ** 2
        assert low**0.5 * size - 0.51 <= side <= high**0.5 * size + 0.51
        assert torch.equal(image[:, rows, columns], FILL[0, :, 0].expand(-1, len(rows)))


def test_noise_is_positive_and_has_the_stated_size() -> None:
    pixels = torch.full((64, 3, 32, 32), 0.25)
    settings = par(noise_probability=1, erase_probability=0, noise_std=0.2)
    noise = noise_and_erase(pixels, FILL, settings, 0, 0) - 0.25
    assert noise.min() >= 0 and (noise == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    expected = 0.2 / (2 * torch.pi) ** 0.5  # the mean of a Gaussian's positive part
    assert noise.mean().item() == pytest.approx(expected, rel=0.01)


def test_about_half_of_the_images_get_noise_and_half_a_square() -> None:
    pixels = torch.full((400, 3, 16, 16), 0.25)
    noisy = noise_and_erase(pixels, FILL, par(erase_probability=0), 0, 0)
    erased = noise_and_erase(pixels, FILL, par(noise_probability=0), 0, 0)
    for changed in (noisy, erased):
        share = (changed != pixels).flatten(1).any(1).float().mean().item()
        assert share == pytest.approx(0.5, abs=0.1)
    nothing = noise_and_erase(pixels, FILL, par(noise_probability=0, erase_probability=0), 0, 0)
    assert torch.equal(nothing, pixels)
