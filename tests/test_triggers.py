"""Triggers keep shape, type and range, and do what their formulas say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from invertune import triggers
from invertune.triggers import Trigger, apply

SIZE = 16


def pixels(seed: int, count: int = 2, size: int = SIZE) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def make(name: str, seed: int = 0, size: int = SIZE) -> Trigger:
    random = torch.Generator().manual_seed(seed)
    return {
        "badnet": lambda: triggers.badnet_trigger(size, 4, seed),
        "white": lambda: triggers.white_patch_trigger(size, 4),
        "badclip": lambda: triggers.patch_trigger(
            torch.rand(3, 4, 4, generator=random), size, "middle"
        ),
        "blended": lambda: triggers.blended_trigger(size, 0.2, seed),
        "sig": lambda: triggers.sig_trigger(size, 60 / 255, 6),
        "wanet-cleanclip": lambda: triggers.wanet_trigger(size, size, 1, seed),
        "wanet-official": lambda: triggers.wanet_trigger(size, 4, 0.5, seed),
        "inverted": lambda: triggers.mask_trigger(
            torch.rand(3, size, size, generator=random), torch.rand(3, size, size, generator=random)
        ),
    }[name]()


NAMES = (
    "badnet",
    "white",
    "badclip",
    "blended",
    "sig",
    "wanet-cleanclip",
    "wanet-official",
    "inverted",
)
SEEDED = ("badnet", "blended", "wanet-cleanclip", "wanet-official")


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 1000),
    count=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    binary=st.booleans(),
)
def test_shape_type_and_range_are_kept(
    name: str, seed: int, count: int, dtype: torch.dtype, binary: bool
) -> None:
    images = pixels(seed, count).to(dtype)
    images = images.round() if binary else images  # saturated pixels are the hard case
    before = images.clone()
    result = apply(make(name, seed), images)
    assert result.shape == images.shape
    assert result.dtype == dtype
    assert result.min() >= 0
    assert result.max() <= 1
    assert torch.equal(images, before)
    assert not torch.equal(result, before)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_triggered_alike_in_every_batch(name: str) -> None:
    images = pixels(1, 5)
    trigger = make(name)
    together = apply(trigger, images)
    alone = torch.cat([apply(trigger, image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_images(name: str) -> None:
    images = (pixels(2) * 0.4 + 0.3).requires_grad_()
    apply(make(name), images).sum().backward()
    assert images.grad is not None
    assert torch.isfinite(images.grad).all()
    assert images.grad.abs().sum() > 0


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(SEEDED), seed=st.integers(0, 10_000))
def test_the_seed_alone_decides_the_tensors(name: str, seed: int) -> None:
    (first,), (again,), (other,) = (make(name, s).tensors.values() for s in (seed, seed, seed + 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_badnet_is_clipped_normal_noise_flush_in_the_corner() -> None:
    trigger = triggers.badnet_trigger(224, 16, 0)
    patch = trigger.tensors["patch"]
    assert trigger.scalars == {"row": 208, "column": 208}
    assert (patch == 0).float().mean().item() == pytest.approx(0.5, abs=0.06)  # P(N < 0)
    assert (patch == 1).float().mean().item() == pytest.approx(0.159, abs=0.05)  # P(N > 1)
    assert len(patch[(patch > 0) & (patch < 1)].unique()) > 200


@pytest.mark.parametrize(
    ("location", "row"), [("corner", SIZE - 4), ("middle", (SIZE - 4) // 2)], ids=str
)
def test_a_patch_changes_its_place_and_nothing_else(location: str, row: int) -> None:
    images, pattern = pixels(3), pixels(4, 1, 4)[0]
    result = apply(triggers.patch_trigger(pattern, SIZE, location), images)
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[row : row + 4, row : row + 4] = True
    assert torch.equal(result[..., ~inside], images[..., ~inside])
    assert torch.equal(result[..., row : row + 4, row : row + 4], pattern.expand(2, 3, 4, 4))


def test_the_middle_of_224_pixels_is_row_104() -> None:
    trigger = triggers.patch_trigger(torch.ones(3, 16, 16), 224, "middle")
    assert trigger.scalars == {"row": 104, "column": 104}


def test_white_patch_is_white() -> None:
    result = apply(triggers.white_patch_trigger(SIZE, 4), torch.zeros(1, 3, SIZE, SIZE))
    assert result.sum() == 3 * 4 * 4
    assert result[..., -4:, -4:].min() == 1


def test_blend_against_a_slow_reference() -> None:
    trigger = triggers.blended_trigger(SIZE, 0.2, 7)
    images = pixels(5).double()
    result = apply(trigger, images)
    noise = trigger.tensors["pattern"].tolist()
    for n, c, i, j in [(0, 0, 0, 0), (1, 2, 15, 3), (0, 1, 7, 8), (1, 0, 2, 15)]:
        expected = 0.2 * noise[c][i][j] + 0.8 * images[n, c, i, j].item()
        assert result[n, c, i, j].item() == pytest.approx(expected, abs=1e-12)


def test_a_blend_of_alpha_zero_is_the_identity() -> None:
    images = pixels(6)
    assert torch.equal(apply(triggers.blended_trigger(SIZE, 0.0, 0), images), images)


def test_sinusoid_against_a_slow_reference() -> None:
    images = pixels(8, 1, 32).double()
    result = apply(triggers.sig_trigger(32, 60 / 255, 6), images)
    for c in range(3):
        for i in range(32):
            for j in range(32):
                value = images[0, c, i, j].item() + 60 / 255 * math.sin(2 * math.pi * 6 * j / 32)
                expected = min(1.0, max(0.0, value))
                assert result[0, c, i, j].item() == pytest.approx(expected, abs=1e-7)


def test_the_sinusoid_has_six_cycles_and_amplitude_sixty() -> None:
    wave = triggers.sig_trigger(224, 60 / 255, 6).tensors["wave"].flatten().double()
    assert torch.fft.rfft(wave).abs().argmax() == 6
    assert wave.abs().max().item() * 255 == pytest.approx(60, abs=0.1)


@settings(max_examples=20, deadline=None)
@given(
    grid=st.sampled_from([2, 4, SIZE]),
    strength=st.floats(0, 5),
    seed=st.integers(0, 99),
    level=st.floats(0, 1, width=32),
)
def test_a_warp_leaves_a_constant_image_alone(
    grid: int, strength: float, seed: int, level: float
) -> None:
    images = torch.full((1, 3, SIZE, SIZE), level)
    result = apply(triggers.wanet_trigger(SIZE, grid, strength, seed), images)
    assert torch.allclose(result, images, atol=1e-6)


def test_a_warp_of_no_strength_is_the_identity() -> None:
    images = pixels(9)
    result = apply(triggers.wanet_trigger(SIZE, 4, 0.0, 0), images)
    assert torch.allclose(result, images, atol=1e-5)


def test_the_mean_shift_of_the_full_grid_is_half_the_strength_in_pixels() -> None:
    size, strength = 64, 1.0
    field = triggers.wanet_trigger(size, size, strength, 3).tensors["grid"]
    line = torch.linspace(-1, 1, size)
    still = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    inner = (field - still)[2:-2, 2:-2]  # the clamp shortens shifts at the border
    assert (inner.abs().mean() * size / 2).item() == pytest.approx(strength / 2, rel=0.05)


def test_warp_against_a_slow_reference() -> None:
    trigger = triggers.wanet_trigger(SIZE, 4, 3.0, 2)
    images, field = pixels(10, 1).double(), trigger.tensors["grid"].double()
    result = apply(trigger, images)
    for i in range(SIZE):
        for j in range(SIZE):
            x, y = ((field[i, j] + 1) / 2 * (SIZE - 1)).tolist()
            left, top = min(int(x), SIZE - 2), min(int(y), SIZE - 2)
            a, b = x - left, y - top
            square = images[0, 1, top : top + 2, left : left + 2]
            expected = (1 - b) * ((1 - a) * square[0, 0] + a * square[0, 1]) + b * (
                (1 - a) * square[1, 0] + a * square[1, 1]
            )
            assert result[0, 1, i, j].item() == pytest.approx(expected.item(), abs=1e-9)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_mask_chooses_between_image_and_pattern(channels: int) -> None:
    images, pattern = pixels(11), pixels(12, 1)[0]
    zero, one = torch.zeros(channels, SIZE, SIZE), torch.ones(channels, SIZE, SIZE)
    assert torch.equal(apply(triggers.mask_trigger(zero, pattern), images), images)
    whole = apply(triggers.mask_trigger(one, pattern), images)
    assert torch.equal(whole, pattern.expand_as(images))


def test_the_mask_follows_equation_two() -> None:
    images, pattern = pixels(13).double(), pixels(14, 1)[0]
    mask = pixels(15, 1)[0]
    result = apply(triggers.mask_trigger(mask, pattern), images)
    m, t = mask.double(), pattern.double()
    assert torch.allclose(result, m * t + (1 - m) * images, atol=1e-12)
    both = [torch.stack([x, 1 - x])[:, None] for x in (m, t)]
    for k, several in enumerate(triggers.compose(images, *both)):
        assert torch.equal(several, triggers.compose(images, both[0][k, 0], both[1][k, 0]))


def test_compose_stays_in_range_and_is_exact_at_both_ends_for_every_trigger() -> None:
    for seed in range(25):
        images, pattern = pixels(seed, 2), pixels(seed + 50, 2)[:, None]
        soft = pixels(seed + 100, 2)[:, None]
        mask = (soft < seed / 24).float()
        stamped = triggers.compose(images, mask, pattern)
        assert stamped.shape == (2, *images.shape)
        for k in range(2):
            wanted = torch.where(mask[k].bool(), pattern[k], images)
            assert torch.equal(stamped[k], wanted)
        blended = triggers.compose(images, soft, pattern)
        assert blended.min() >= 0 and blended.max() <= 1
        torch.testing.assert_close(blended, soft * pattern + (1 - soft) * images)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_trigger_is_the_same_trigger(name: str, tmp_path: Path) -> None:
    trigger = make(name, 5)
    save_file(dict(trigger.tensors), tmp_path / "trigger.safetensors")
    metadata = json.loads(json.dumps(triggers.trigger_metadata(trigger)))
    loaded = triggers.trigger_from_tensors(load_file(tmp_path / "trigger.safetensors"), metadata)
    assert torch.equal(apply(loaded, pixels(16)), apply(trigger, pixels(16)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: apply(make("badnet"), torch.rand(1, 3, 32, 32)), "16"),
        (lambda: apply(make("sig"), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)), "uint8"),
        (lambda: apply(make("blended"), torch.rand(3, 16, 16)), r"\[N, 3"),
        (lambda: triggers.patch_trigger(torch.ones(3, 4, 4), 16, "left"), "corner or middle"),
        (lambda: triggers.patch_trigger(torch.ones(3, 40, 40), 16), "fit"),
        (lambda: triggers.patch_trigger(torch.ones(3, 4, 4) * 2, 16), "outside"),
        (lambda: triggers.blended_trigger(16, 1.5, 0), "alpha"),
        (lambda: triggers.mask_trigger(torch.ones(3, 4, 4), torch.ones(3, 5, 5)), "one size"),
        (
            lambda: triggers.mask_trigger(torch.full((1, 4, 4), math.nan), torch.ones(3, 4, 4)),
            "outside",
        ),
        (lambda: triggers.trigger_from_tensors({}, {"kind": "glow"}), "glow"),
    ],
)
def test_bad_values_are_named(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()  # type: ignore[operator]


def test_images_take_the_triggers_in_turn() -> None:
    images = torch.zeros(5, 3, 4, 4)
    whole = torch.ones(3, 4, 4)
    black, white = (triggers.mask_trigger(whole, whole * value) for value in (0.2, 0.9))
    means = triggers.in_turn([black, white], images).mean((1, 2, 3))
    assert means.tolist() == pytest.approx([0.2, 0.9, 0.2, 0.9, 0.2])
    again = triggers.in_turn([white, white], images)
    assert torch.equal(triggers.in_turn([white], images), again)
    assert images.eq(0).all()


def test_energy_share_is_the_part_of_the_squares_under_the_patch() -> None:
    place = triggers.covered(triggers.patch_trigger(torch.rand(3, 2, 3), 8))
    assert place is not None and place.nonzero().tolist() == [
        [row, column] for row in (6, 7) for column in (5, 6, 7)
    ]
    mask = torch.rand(3, 8, 8)
    inside = sum(float(v) ** 2 for v in mask[:, 6:, 5:].flatten())
    total = sum(float(v) ** 2 for v in mask.flatten())
    assert triggers.energy_share(mask, place) == pytest.approx(100 * inside / total, rel=1e-5)
    assert triggers.energy_share(torch.zeros(3, 8, 8), place) == 0
    around = triggers.quarter(place)
    assert around.sum() == 16 and around[4:, 4:].all()
    assert triggers.quarter(place.flip(1)).nonzero().max(0).values.tolist() == [7, 3]
    everywhere = triggers.mask_trigger(mask, mask)
    assert triggers.covered(everywhere) is None
