"""Trigger inversion: each loss against its formula, the loop's promises, a planted trigger."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import pytorch_msssim
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invertune import models, trigger_inversion
from invertune.kernels import ssim_statistics
from invertune.losses import align_loss, emb_loss, similarity_loss, sparsity_loss
from invertune.models import Clip, embed_images, image_features
from invertune.sampling import batch_indices
from invertune.sections import Inversion
from invertune.settings import load_settings
from invertune.training import TrainingError
from invertune.trigger_inversion import (
    InvertedTrigger,
    Run,
    initial_trigger,
    invert_triggers,
    inverted_asr,
    pattern_bounds,
)

OPENAI_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
OPENAI_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)


def options(**changes: Any) -> Inversion:
    """A short inversion: four updates of four images, measured every two."""
    short = {"steps": 4, "batch": 4, "measure_every_steps": 2, **changes}
    values = {**load_settings("mini").inversion.model_dump(), **short}
    return Inversion.model_validate(values)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(random(*shape, seed=seed), dim=-1)


def pool(count: int, size: int = 64, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=source, dtype=torch.uint8)


@pytest.fixture(scope="module", params=["RN50", "ViT-B-32"])
def clip(request: pytest.FixtureRequest) -> Clip:
    torch.manual_seed(0)
    return models.build_clip(models.MODEL_FOLDER / request.param, request.param)


@pytest.fixture(scope="module")
def vit() -> Clip:
    torch.manual_seed(0)
    return models.build_clip(models.MODEL_FOLDER / "ViT-B-32", "ViT-B-32")


def head_of(clip: Clip, classes: int = 5) -> Tensor:
    width = embed_images(clip, pool(1)).shape[1]
    return unit(classes, width, seed=3).float()


def invert(
    clip: Clip, settings: Inversion, *targets: int, seed: int = 0, **extra: Any
) -> list[InvertedTrigger]:
    runs = [Run.of(target, settings) for target in targets or (1,)]
    head = extra.pop("head", None)
    arguments = {"images": pool(9), "heldout": pool(5, seed=1), **extra}
    return invert_triggers(
        clip,
        head=head_of(clip) if head is None else head,
        runs=runs,
        settings=settings,
        seed=seed,
        **arguments,
    )


def test_align_loss_is_equation_3_over_all_classes() -> None:
    features, head, targets = unit(2, 3, 6), unit(5, 6, seed=1), torch.tensor([4, 0])
    for k, target in enumerate(targets.tolist()):
        terms = []
        for image in features[k]:
            similar = [math.exp(float(image @ one) / 0.07) for one in head]
            terms.append(-math.log(similar[target] / sum(similar)))
        loss = align_loss(features, head, targets, 0.07)[k].item()
        assert loss == pytest.approx(sum(terms) / 3, rel=1e-12)


def test_emb_loss_is_the_mean_distance_neither_squared_nor_over_the_batch() -> None:
    features, clean = unit(2, 3, 6), unit(3, 6, seed=1)
    for k in range(2):
        distances = [math.sqrt(float(((features[k, i] - clean[i]) ** 2).sum())) for i in range(3)]
        assert emb_loss(features, clean)[k].item() == pytest.approx(sum(distances) / 3)


def test_emb_loss_has_a_finite_gradient_where_nothing_moved() -> None:
    features = unit(1, 2, 6).requires_grad_()
    emb_loss(features, features.detach()[0]).sum().backward()
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_similarity_loss_is_one_minus_ssim_and_sparsity_the_sum() -> None:
    images, tilde = random(3, 3, 12, 12).sigmoid(), random(2, 3, 3, 12, 12, seed=1).sigmoid()
    losses = similarity_loss(tilde, images, ssim_statistics(images))
    for k in range(2):
        wanted = 1 - pytorch_msssim.ssim(tilde[k], images, data_range=1.0)
        assert losses[k].item() == pytest.approx(wanted.item(), abs=1e-6)
    mask = random(2, 3, 4, 4)
    assert sparsity_loss(mask)[1].item() == pytest.approx(sum(abs(v) for v in mask[1].flatten()))


def literal_terms(clip: Clip, settings: Inversion, reference: Tensor | None = None) -> list[float]:
    """The four terms and their total at step 0, written out from equations 2 to 7."""
    mask, pattern = initial_trigger(clip, settings, 0)
    images = pool(9)[batch_indices(9, settings.batch, 0, 0)].float() / 255
    stamp = pattern * clip.std[0] + clip.mean[0]
    tilde = mask * stamp + (1 - mask) * images
    with torch.no_grad():
        features, clean = image_features(clip, tilde), image_features(clip, images)
    wanted = torch.full((len(features),), 1)
    align = F.cross_entropy(features @ head_of(clip).T / settings.temperature, wanted)
    emb = (features - (clean if reference is None else reference)).norm(dim=1).mean()
    spaces = (tilde, images)
    if settings.ssim_space == "normalized":
        spaces = tuple((x - clip.mean) / clip.std for x in spaces)
    sim = 1 - pytorch_msssim.ssim(*spaces, data_range=1.0)
    terms = [align.item(), emb.item(), sim.item(), mask.abs().sum().item()]
    total = 5 * terms[0] + 0.5 * terms[1] + 1 * terms[2] + 0.01 * terms[3]
    return [*terms, total]


def first_row(trigger: InvertedTrigger) -> list[float]:
    return [trigger.log[0][name] for name in ("align", "emb", "sim", "mask", "loss")]


def test_the_first_step_minimizes_equation_7(clip: Clip) -> None:
    settings = options()
    assert first_row(invert(clip, settings)[0]) == pytest.approx(
        literal_terms(clip, settings), rel=1e-4
    )


@pytest.mark.parametrize(
    "change, moved",
    [
        ({"temperature": 0.01}, {"align", "loss"}),
        ({"ssim_space": "normalized"}, {"sim", "loss"}),
        ({"emb_reference": "target_image"}, {"emb", "loss"}),
        ({"mask_init": "ones"}, {"align", "emb", "sim", "mask", "loss"}),
    ],
)
def test_a_switch_moves_its_own_term_and_no_other(
    vit: Clip, change: dict[str, Any], moved: set[str]
) -> None:
    feature = random(head_of(vit).shape[1], seed=5).float()
    changed = options(**change)
    extra = {"target_features": feature} if "emb_reference" in change else {}
    before, after = invert(vit, options())[0].log[0], invert(vit, changed, **extra)[0].log[0]
    assert {name for name in before if abs(before[name] - after[name]) > 1e-6} == moved
    reference = F.normalize(feature, dim=0) if extra else None
    wanted = literal_terms(vit, changed, reference)
    assert [after[name] for name in ("align", "emb", "sim", "mask", "loss")] == pytest.approx(
        wanted, rel=1e-4, abs=1e-5
    )


def test_a_mask_of_ones_starts_at_the_image_size(vit: Clip) -> None:
    assert invert(vit, options(mask_init="ones"))[0].log[0]["mask"] == 3 * 64 * 64


def test_bounds_are_those_of_the_paper_for_openai_models(vit: Clip) -> None:
    openai = replace(vit, mean=OPENAI_MEAN, std=OPENAI_STD)
    low, high = pattern_bounds(openai, "scalar")
    assert (low.item(), high.item()) == pytest.approx((-1.7922, 2.1461), abs=3e-4)
    low, high = pattern_bounds(openai, "per_channel")
    assert low.flatten().tolist() == pytest.approx([-1.7923, -1.7521, -1.4802], abs=1e-4)
    assert high.flatten().tolist() == pytest.approx([1.9303, 2.0749, 2.1459], abs=1e-4)


def test_only_the_scalar_clamp_lets_the_search_leave_the_pixel_range(vit: Clip) -> None:
    openai = replace(vit, mean=OPENAI_MEAN, std=OPENAI_STD)
    for clamp, leaves in (("scalar", True), ("per_channel", False)):
        _, pattern = initial_trigger(openai, options(clamp=clamp), 0)
        pixels = pattern * OPENAI_STD[0] + OPENAI_MEAN[0]
        assert (pixels.max() > 1.01) == leaves and (pixels.min() < -0.01) == leaves
        found = invert(openai, options(clamp=clamp, lr=1.0))[0]
        assert found.pattern.min() >= 0 and found.pattern.max() <= 1
        assert found.mask.min() >= 0 and found.mask.max() <= 1


def test_a_shared_mask_is_one_for_all_channels_and_counts_three_times(vit: Clip) -> None:
    found = invert(vit, options(mask="shared", steps=3))[0]
    own = invert(vit, options(steps=3))[0]
    assert torch.equal(found.mask, found.mask[:1].expand(3, -1, -1))
    assert not torch.equal(own.mask, own.mask[:1].expand(3, -1, -1))
    assert found.kept.mask_l1 == pytest.approx(3 * found.mask[0].sum().item(), rel=1e-5)
    first, _ = initial_trigger(vit, options(), 0)
    assert found.log[0]["mask"] == pytest.approx(3 * first[0].sum().item(), rel=1e-5)


def test_steps_and_measurements_are_as_many_as_asked(vit: Clip) -> None:
    trigger = invert(vit, options(steps=7, measure_every_steps=3))[0]
    assert [state.step for state in trigger.states] == [3, 6, 7]
    assert [row["step"] for row in trigger.log] == [0, 5, 6]


def test_runs_together_equal_each_alone(clip: Clip) -> None:
    settings = options(steps=3, measure_every_steps=1)
    runs = [Run(1, 5, 0.5, 1, 0.01), Run(3, 5, 0.1, 2, 0.5)]
    data = (clip, pool(9), pool(5, seed=1), head_of(clip))
    together = invert_triggers(*data, runs, settings, 0)
    for run, one in zip(runs, together, strict=True):
        alone = invert_triggers(*data, [run], settings, 0)[0]
        assert one.run == run
        assert one.kept.step == alone.kept.step
        assert one.kept.inverted_asr == alone.kept.inverted_asr
        assert [r["loss"] for r in one.log] == pytest.approx([r["loss"] for r in alone.log])
        # Adam moves an element by lr whatever its gradient, so rounding flips a few of them.
        assert (one.mask - alone.mask).abs().gt(1e-4).float().mean() < 0.01
        assert ((one.pattern - alone.pattern).abs() * one.mask).gt(1e-3).float().mean() < 0.01


def test_a_seed_fixes_every_bit_and_another_one_changes_them(vit: Clip) -> None:
    one, again, other = (invert(vit, options(), seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(one.mask, again.mask) and torch.equal(one.pattern, again.pattern)
    assert one.log == again.log and one.states == again.states
    assert not torch.equal(one.mask, other.mask)


def test_uint8_and_float_images_and_an_uncached_pool_give_the_same(
    vit: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = invert(vit, options())[0]
    as_floats = invert(vit, options(), images=pool(9).float() / 255)[0]
    monkeypatch.setattr(trigger_inversion, "POOL_LIMIT_BYTES", 0)
    uncached = invert(vit, options())[0]
    for other in (as_floats, uncached):
        torch.testing.assert_close(other.mask, one.mask, rtol=0, atol=1e-5)


def test_the_network_is_not_touched(clip: Clip) -> None:
    head = head_of(clip)
    clip.net.train()
    before = {name: value.clone() for name, value in clip.net.state_dict().items()}
    invert(clip, options(), head=head)
    after = clip.net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(module.training for module in clip.net.modules())
    assert all(p.requires_grad and p.grad is None for p in clip.net.parameters())
    clip.net.eval()


def test_held_out_images_of_the_target_class_do_not_count(vit: Clip) -> None:
    heldout, head = pool(8, seed=1), head_of(vit)
    mask, pattern = torch.zeros(3, 64, 64), torch.zeros(3, 64, 64)
    predicted = (embed_images(vit, heldout) @ head.T).argmax(1)
    target = int(predicted.mode().values)
    labels = torch.where(torch.arange(8) < 3, target, (target + 1) % 5)
    wanted = 100 * (predicted[3:] == target).double().mean().item()
    assert inverted_asr(vit, heldout, labels, head, mask, pattern, target) == pytest.approx(wanted)
    nobody = torch.full((8,), target)
    with pytest.raises(ValueError, match="no image is left"):
        invert(vit, options(), target, heldout=heldout, heldout_labels=nobody)


@pytest.mark.parametrize("floor", [0, 100])
def test_the_state_kept_is_the_smallest_mask_at_the_floor_or_else_the_highest_asr(
    vit: Clip, floor: int
) -> None:
    settings = options(steps=6, measure_every_steps=1, asr_floor_percent=floor, lr=0.3)
    trigger = invert(vit, settings, 2)[0]
    kept = trigger.kept
    assert kept == trigger.states[kept.step - 1]
    assert trigger.mask.sum().item() == pytest.approx(kept.mask_l1)
    reached = [s.mask_l1 for s in trigger.states if s.inverted_asr >= floor]
    assert trigger.mask_l1_at_equal_asr == min(reached, default=math.inf)
    if reached:
        assert kept.mask_l1 == min(reached)
    else:
        assert kept.inverted_asr == max(s.inverted_asr for s in trigger.states)


def test_a_loss_that_is_not_finite_is_reported_with_its_step(vit: Clip) -> None:
    images = pool(4).float() / 255
    images[:, 0, 20, 20] = math.nan
    with pytest.raises(TrainingError, match="at step 0 of 4; lower lr"):
        invert(vit, options(), images=images)


@pytest.mark.parametrize(
    "settings, extra, message",
    [
        ({}, {"runs": [Run(5, 1, 1, 1, 1)]}, "target 5 is no class: the head has 0 to 4"),
        ({}, {"runs": []}, "no runs"),
        (
            {},
            {"images": torch.zeros(9, 3, 32, 32)},
            r"images are \(9, 3, 32, 32\), not \[N, 3, 64, 64",
        ),
        ({}, {"heldout": torch.zeros(9, 64, 64)}, "heldout are"),
        ({"emb_reference": "target_image"}, {}, "pass the target_features"),
        ({"batch": 10}, {}, "9 items, fewer than one batch of 10"),
    ],
)
def test_unusable_inputs_are_named(
    vit: Clip, settings: dict[str, Any], extra: dict[str, Any], message: str
) -> None:
    arguments = {
        "images": pool(9),
        "heldout": pool(5),
        "head": head_of(vit),
        "runs": [Run(1, 5, 0.5, 1, 0.01)],
        **extra,
    }
    with pytest.raises(ValueError, match=message):
        invert_triggers(vit, settings=options(**settings), seed=0, **arguments)


def test_half_precision_weights_are_refused() -> None:
    clip = models.build_clip(models.MODEL_FOLDER / "RN50", "RN50")
    head = head_of(clip)
    clip.net.half()
    with pytest.raises(ValueError, match=r"torch.float16; inversion needs torch.float32"):
        invert(clip, options(), head=head)


class Planted(nn.Module):
    """Features of class 0-2 by mean color; a known 4 x 4 patch turns any image into class 3."""

    def __init__(self) -> None:
        super().__init__()
        self.template = nn.Parameter(random(3, 4, 4, seed=9).sign().float())

    def encode_image(self, images: Tensor) -> Tensor:
        match = (images[:, :, 12:, 12:] * self.template).mean((1, 2, 3)).relu()
        return torch.cat([images.mean((2, 3)) + 1, 2 * match[:, None]], 1)


def test_a_planted_trigger_is_found_where_it_is() -> None:
    net = Planted()
    half, quarter = torch.full((1, 3, 1, 1), 0.5), torch.full((1, 3, 1, 1), 0.25)
    clip = Clip("RN50", net, None, half, quarter, 16)
    images, heldout, head = pool(40, 16), pool(60, 16, seed=1), torch.eye(4)
    settings = options(steps=150, batch=16, measure_every_steps=30, lr=0.03, lambda4=0.02)
    trigger = invert_triggers(clip, images, heldout, head, [Run.of(3, settings)], settings, 0)[0]
    assert (
        inverted_asr(
            clip, heldout, torch.full((60,), -1), head, torch.zeros(3, 16, 16), trigger.pattern, 3
        )
        < 20
    )
    assert trigger.kept.inverted_asr >= 75
    inside = trigger.mask[:, 12:, 12:]
    assert inside.sum() > 0.9 * trigger.mask.sum()
    seen = inside > 0.1
    agree = (trigger.pattern[:, 12:, 12:] - 0.5).sign() == net.template
    assert seen.sum() > 20 and agree[seen].float().mean() > 0.9
