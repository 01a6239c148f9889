"""Step 1: equation 1, the perturbations, and the ranking of candidates."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from invertune import prefetch
from invertune.advclip import nce_loss, patch_generator, topology_gap
from invertune.models import embed_images, zero_shot_head
from invertune.perturbations import View, perturb
from invertune.sections import EMBEDDED, Identification
from invertune.settings import load_settings
from invertune.target_identification import (
    MAKERS,
    Increase,
    evidence,
    identify,
    largest_increases,
    ranked_increases,
)
from invertune.trigger_inversion import State
from invertune.weights import load_clip

CLASSES = ("dog", "cat", "car", "mushroom", "bus")


@pytest.fixture(scope="module")
def view() -> View:
    """The shipped RN50 on noise, with the texts that it sees there."""
    clip, source = load_clip("RN50", EMBEDDED)[0], torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (32, 3, 64, 64), generator=source, dtype=torch.uint8)
    clean, head = embed_images(clip, images), zero_shot_head(clip, CLASSES, ["a {}"])
    return View(clip, images, clean, head[(clean @ head.T).argmax(1)])


def _increase(clean: list[int], adversarial: list[int]) -> Increase:
    return Increase(torch.tensor(clean), torch.tensor(adversarial))


def test_equation_1_gives_the_paper_s_increase_of_mushroom() -> None:
    points = _increase([6, 49994], [19971, 30029]).points  # Table 6: +39.93 points
    assert points[0].item() == pytest.approx(39.93)
    assert points.sum().item() == pytest.approx(0)


def test_candidates_take_the_largest_increase_over_all_kinds() -> None:
    found = {
        "patch": _increase([10, 10, 10, 10], [30, 4, 3, 3]),
        "ball": _increase([10, 10, 10, 10], [2, 3, 35, 0]),
    }
    assert largest_increases(found).topk(2).indices.tolist() == [2, 0]


def test_the_smallest_mask_at_equal_asr_ranks_first_and_then_the_highest_asr() -> None:
    tried = {
        "small": SimpleNamespace(mask_l1_at_equal_asr=90.0, kept=State(1, 76.0, 90.0)),
        "large": SimpleNamespace(mask_l1_at_equal_asr=800.0, kept=State(1, 99.0, 800.0)),
        "never, close": SimpleNamespace(mask_l1_at_equal_asr=math.inf, kept=State(1, 70.0, 9.0)),
        "never, far": SimpleNamespace(mask_l1_at_equal_asr=math.inf, kept=State(1, 5.0, 9.0)),
    }
    assert sorted(tried, key=lambda name: evidence(tried[name], 50)) == list(tried)


def test_a_perturbation_that_hardly_any_image_resists_outweighs_a_smaller_mask() -> None:
    sink, wave = (
        SimpleNamespace(mask_l1_at_equal_asr=size, kept=State(1, 99.0, size))
        for size in (330.0, 630.0)
    )
    assert evidence(wave, 92) < evidence(sink, 50) < evidence(wave, 50)


def test_the_fourier_wave_is_one_frequency_and_the_strongest_of_all(view: View) -> None:
    settings = _quick().model_copy(update={"wave_cycles": 2, "batch": 32})
    wave, pixels = MAKERS["fourier"](view, settings, 0), view.images.float() / 255
    spectrum = torch.fft.rfft2(wave[0]).abs()
    assert (spectrum > 1e-2).sum() in (1, 2) and torch.equal(wave[0], wave[2])
    assert wave.abs().max() <= settings.wave_amplitude + 1e-6
    y, x = torch.meshgrid(*[torch.arange(64) / 64] * 2, indexing="ij")
    moved = []
    for up, across in [(0, 1), (0, 2), (1, -1), (1, 0), (1, 1), (2, 0)]:
        other = settings.wave_amplitude * torch.cos(2 * math.pi * (up * y + across * x - 0.125))
        changed = (pixels + other).clamp(0, 1)
        moved.append((embed_images(view.clip, changed) * view.features).sum(1).mean())
    best = embed_images(view.clip, perturb("fourier", wave, pixels))
    assert (best * view.features).sum(1).mean() <= min(moved) + 1e-5


def test_rows_are_sorted_by_increase() -> None:
    rows = ranked_increases(_increase([10, 10, 0, 0, 0], [1, 4, 0, 15, 0]), CLASSES, 3)
    assert rows[0] == ("mushroom", 0, 15, 75.0)
    assert {row[1:] for row in rows[1:]} == {(0, 0, 0.0)}


def test_the_patch_lands_where_the_released_code_pastes_it() -> None:
    images = perturb("patch", torch.ones(3, 38, 38), torch.zeros(1, 3, 224, 224))
    assert (images[..., 172:210, 172:210] == 1).all() and images.sum() == 3 * 38 * 38


@pytest.mark.parametrize("kind", ["ball_prediction", "fourier"])
def test_an_additive_perturbation_is_added_and_clamped(kind: str) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tensor = images[0] - 0.5
    assert torch.equal(perturb(kind, tensor, images), (images + tensor).clamp(0, 1))


def _quick() -> Identification:
    return load_settings(
        "mini", {"identification": {"steps": 12, "batch": 16, "check_steps": 2}}
    ).identification


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_every_kind_is_bounded_deterministic_and_moves_the_features(
    kind: str, view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _quick()
    made = MAKERS[kind](view, settings, 0)
    threaded = functools.partial(prefetch.Prefetcher, threaded=True)  # as on a GPU
    monkeypatch.setattr(prefetch, "Prefetcher", threaded)
    assert torch.equal(made, MAKERS[kind](view, settings, 0))
    pixels = view.images.float() / 255
    changed = perturb(kind, made, pixels)
    assert changed.min() >= 0 and changed.max() <= 1
    if kind.startswith("ball"):
        assert (changed - pixels).abs().max() <= settings.ball_radius + 1e-6
    moved = (embed_images(view.clip, changed) * view.features).sum(1).mean()
    assert moved < 1 - 1e-4


def test_counts_add_up_and_identify_ranks_the_asked_number(view: View) -> None:
    clip, images, head = view.clip, view.images, zero_shot_head(view.clip, CLASSES, ["a {}"])
    mini = load_settings("mini", {"inversion": {"batch": 16}})
    settings = _quick().model_copy(update={"steps": 1, "kinds": ("patch_feature",)})
    found = identify(clip, images, images, head, settings, mini.inversion, 0)
    assert len(found.ranking) == len(found.scores) == settings.candidates
    increase = found.increases["patch_feature"]
    assert increase.clean.sum() == increase.adversarial.sum() == 32


def test_topology_gap_is_zero_only_for_equal_graphs() -> None:
    a = torch.nn.functional.normalize(torch.randn(6, 4), dim=1)
    b = torch.nn.functional.normalize(torch.randn(6, 4), dim=1)
    assert topology_gap(a, a).item() == pytest.approx(0, abs=1e-6)
    assert topology_gap(a, b).item() > 1e-4
    assert nce_loss(a, a) < nce_loss(a, a.flip(0))


@pytest.mark.parametrize(
    ("patch_px", "side", "filters"),
    [
        (12, 16, [256, 128, 64]),
        (16, 16, [256, 128, 64]),
        (38, 64, [1024, 512, 256, 128, 64]),  # AdvCLIP's: Zhou et al. 2023
    ],
)
def test_the_generator_draws_as_many_pixels_as_the_patch_has(
    patch_px: int, side: int, filters: list[int]
) -> None:
    maker = patch_generator(patch_px)
    layers = [layer for layer in maker if isinstance(layer, nn.ConvTranspose2d)]
    assert [layer.out_channels for layer in layers] == filters
    with torch.no_grad():
        patch = maker(torch.randn(16, 100, 1, 1))
    assert patch.shape == (1, 3, side, side)
    assert 0 <= patch.min() < patch.max() <= 1
