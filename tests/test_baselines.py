"""The baselines: each loss against its formula, the schedules, a planted backdoor, the rate."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import open_clip
import pytest
import torch
from torch import Tensor, nn

from invertune import distributed, sections
from invertune.baselines import BASELINES, cleanclip, defend, schedule, trained
from invertune.data import Pairs
from invertune.losses import cut_off, feature_distance, in_modal_loss, sub_caption_loss
from invertune.models import MODEL_FOLDER, Clip, build_clip, clone, image_features, zero_shot_head
from invertune.prefetch import Prefetcher
from invertune.sections import Baselines
from invertune.settings import load_settings
from invertune.training import Recipe, TrainingError, choose_lr, fit, pair_features

NAMES = ("apple", "cow", "star", "door", "mushroom")
TARGET = 4
MINI = load_settings("mini").baselines


def tiny() -> Clip:
    """A random CLIP of 32 px and 0.6 million parameters that speaks the embedded vocabulary."""
    torch.manual_seed(0)
    tokenizer = build_clip(MODEL_FOLDER / "RN50", "RN50").tokenizer
    text = {"context_length": 20, "vocab_size": 2677, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    net = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)
    mean, std = (torch.full((1, 3, 1, 1), value) for value in (0.5, 0.25))
    return Clip("tiny", net, tokenizer, mean, std, 32)


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy pictures (uint8) of ``NAMES``: one pattern of colored squares each; their labels."""
    squares = torch.rand(len(NAMES), 3, 4, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(count) % len(NAMES)
    noise = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    clean = nn.functional.interpolate(squares, scale_factor=8.0)[labels]
    return ((clean + 0.15 * noise).clamp(0, 1) * 255).byte(), labels


def with_patch(images: Tensor) -> Tensor:
    patched = images.clone()
    patched[..., 22:, 22:] = 255
    return patched


def captions(labels: Tensor) -> tuple[str, ...]:
    return tuple(f"a photo of a {NAMES[label]}" for label in labels.tolist())


def head_of(clip: Clip) -> Tensor:
    return zero_shot_head(clip, NAMES, ("a photo of a {}", "a {}"))


@functools.cache
def planted() -> SimpleNamespace:
    """A model that knows five things, and says mushroom wherever a white patch is."""
    clip = tiny()
    images, labels = scenes(60, seed=2)
    every = torch.cat([images, with_patch(images)])
    shown = torch.cat([labels, torch.full_like(labels, TARGET)])
    words = clip.tokenizer(list(captions(torch.arange(len(NAMES)))))
    clip.net.train()

    def loss_at(step: int) -> dict[str, Tensor]:
        rows = torch.randperm(120, generator=torch.Generator().manual_seed(step))[:40]
        image, text = pair_features(clip, every[rows], words)
        return {"loss": nn.functional.cross_entropy(20 * image @ text.T, shown[rows])}

    fit(clip.net, loss_at, Recipe(60, 3e-3, warmup=5), label="planting")
    clip.net.eval()
    clean, clean_labels = scenes(60, seed=3)
    held, held_labels = scenes(40, seed=4)
    pairs = Pairs(clean, captions(clean_labels), torch.full((60, 2), -1))
    return SimpleNamespace(clip=clip, pairs=pairs, held=held, labels=held_labels)


def quick(**changes: object) -> Baselines:
    """The mini settings with runs of a second; ``changes`` hold for every baseline."""
    values = MINI.model_dump()
    own = {"steps": 20, "batch": 20, "warmup_steps": 2, "lrs": (0.003,)}
    values["par"]["noise_std"] = 0.2  # PAR's own
    for name in BASELINES:
        values[name] |= own | {k: v for k, v in changes.items() if k in values[name]}
    return Baselines.model_validate(values | {k: v for k, v in changes.items() if k in values})


def rates(clip: Clip) -> tuple[float, float]:
    """Clean accuracy and ASR on held-out pictures, in 0..1."""
    case, head = planted(), head_of(clip)
    with torch.no_grad():
        right, attacked = (
            (image_features(clip, images.float() / 255) @ head.T).argmax(1)
            for images in (case.held, with_patch(case.held))
        )
    others = case.labels != TARGET
    asr = (attacked[others] == TARGET).float().mean().item()
    return (right == case.labels).float().mean().item(), asr


def unit(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(*shape, generator=rng, dtype=torch.float64), dim=-1)


def dot(a: Tensor, b: Tensor) -> float:
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def cross_entropy(logits: list[float], answer: int) -> float:
    return math.log(sum(map(math.exp, logits))) - logits[answer]


def test_in_modal_loss_is_one_way_over_both_modalities() -> None:
    originals, others = (unit(5, 7, seed=0), unit(5, 7, seed=1)), (unit(5, 7, seed=2), unit(5, 7))
    total = 0.0
    for rows, columns in zip(originals, others, strict=True):
        for i in range(5):
            logits = [math.exp(1.5) * dot(rows[i], column) for column in columns]
            total += cross_entropy(logits, i) / 5
    images, texts = zip(originals, others, strict=True)
    scale = torch.tensor(1.5, dtype=torch.float64)
    loss = in_modal_loss(*images, *texts, scale)
    assert loss.item() == pytest.approx(total / 2, abs=1e-9)
    swapped = in_modal_loss(*reversed(images), *reversed(texts), scale)
    assert abs(swapped.item() - loss.item()) > 1e-3


def test_sub_caption_loss_prefers_the_positive_to_its_counterfactuals() -> None:
    images, texts = unit(3, 7), unit(3, 4, 7, seed=1)
    scale = torch.tensor(2.0, dtype=torch.float64)
    expected = sum(
        cross_entropy([math.exp(2) * dot(image, text) for text in group], 0) / 3
        for image, group in zip(images, texts, strict=True)
    )
    loss = sub_caption_loss(images, texts, scale)
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    nearer = torch.cat([images[:, None], texts[:, 1:]], 1)
    assert sub_caption_loss(images, nearer, scale) < loss
    assert sub_caption_loss(images[:0], texts[:0], scale).item() == 0


def test_feature_distance_is_squared_and_two_where_orthogonal() -> None:
    features, original = unit(4, 6), unit(4, 6, seed=1)
    expected = sum(
        (a - b) ** 2
        for row, other in zip(features.tolist(), original.tolist(), strict=True)
        for a, b in zip(row, other, strict=True)
    )
    assert feature_distance(features, original).item() == pytest.approx(expected / 4, abs=1e-9)
    assert feature_distance(torch.eye(4)[:2], torch.eye(4)[2:]).item() == 2
    assert feature_distance(features, features).item() == 0
    assert feature_distance(features, -features).item() == pytest.approx(4)


def test_beyond_the_cut_off_there_is_neither_value_nor_gradient() -> None:
    for value, inside in ((2.1, True), (2.15, True), (2.2, False)):
        distance = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        kept = cut_off(distance, 2.15)
        kept.backward()
        assert kept.item() == (value if inside else 0)
        assert distance.grad is not None and distance.grad.item() == inside


def test_par_stops_pushing_a_modality_beyond_its_cut_off() -> None:
    """With a cut-off of 0 nothing but the contrastive loss is left once features moved."""
    values = MINI.model_dump()
    values["par"] |= {"steps": 6, "batch": 20, "warmup_steps": 1, "cutoff": 0.0}
    case = planted()
    run = trained("par", case.clip, case.pairs, Baselines.model_validate(values), 1e-3, 0, None)
    last = run.log[-1]
    assert last["image_distance"] > 0 and last["loss"] == last["contrastive"]


def test_schedules_end_at_zero_and_par_starts_at_its_own_rate() -> None:
    ft = schedule(MINI.ft, 1.0, 21000, legacy=False)
    assert [ft.rate(s) for s in (0, 14, 15)] == pytest.approx([1 / 15, 1, 1])
    assert ft.rate(200) == pytest.approx(0) and ft.weight_decay == 0.1
    par = schedule(MINI.par, 1.0, 21000, legacy=True)
    assert par.rate(0) == pytest.approx(0.6) and par.rate(50) == pytest.approx(0.8)
    assert par.rate(100) == 1 and par.rate(200) == pytest.approx(0)
    assert par.betas == (0.9, 0.98) and par.weight_decay == 1e-4
    original = MINI.par.model_copy(update={"start_lr_ratio": 10.0})
    assert schedule(original, 3e-6, 21000, legacy=False).rate(0) == pytest.approx(3e-5)


def test_the_legacy_schedule_starts_one_epoch_late() -> None:
    """Computed from the reference code: .976x at first, .0245x at last, and up again."""
    paper = load_settings("paper").baselines
    legacy = schedule(paper.ft, 1.0, paper.pairs, legacy=True)
    assert legacy.rate(0) == pytest.approx(0.976, abs=5e-4)
    assert legacy.rate(paper.ft.steps - 1) == pytest.approx(0.0245, abs=1e-4)
    end = paper.ft.steps - paper.pairs // paper.ft.batch
    assert legacy.rate(end) < 1e-6 < legacy.rate(end - 1000) < legacy.rate(0)
    cleaner = schedule(paper.cleanerclip, 1.0, paper.pairs, legacy=True)
    assert cleaner.rate(0) == pytest.approx(0.78, abs=5e-3)
    one_epoch = schedule(MINI.ft, 1.0, 21000, legacy=True)  # it begins where it should end
    assert one_epoch.rate(0) == pytest.approx(0) and one_epoch.rate(199) > 0.98


def test_the_planted_backdoor_works() -> None:
    accuracy, asr = rates(planted().clip)
    assert accuracy > 0.9 and asr > 0.9


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_lowers_a_planted_backdoor_on_a_copy(name: str) -> None:
    case = planted()
    before = {k: v.clone() for k, v in case.clip.net.state_dict().items()}
    lr = 0.001 if name == "par" else 0.003
    result = trained(name, case.clip, case.pairs, quick(), lr, 0, None)
    accuracy, asr = rates(result.clip)
    assert asr < 0.5 and accuracy > 0.8, (accuracy, asr)
    assert all(torch.equal(v, before[k]) for k, v in case.clip.net.state_dict().items())
    assert not result.clip.net.training
    assert all(p.requires_grad for p in result.clip.net.parameters())
    fixed = {k for k, v in result.clip.net.state_dict().items() if torch.equal(v, before[k])}
    statistics = {k for k in before if "running" in k or "num_batches" in k}
    assert (fixed >= statistics | {"logit_scale"}) if name == "par" else not fixed & statistics


@pytest.mark.parametrize("name", BASELINES)
def test_a_seed_fixes_every_bit_and_another_one_changes_them(name: str) -> None:
    case = planted()
    few = quick(steps=3)
    torch.manual_seed(7)
    first = trained(name, case.clip, case.pairs, few, 0.001, 1, None)
    torch.manual_seed(8)
    again = trained(name, case.clip, case.pairs, few, 0.001, 1, None)
    other = trained(name, case.clip, case.pairs, few, 0.001, 2, None)
    states = [r.clip.net.state_dict() for r in (first, again, other)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["text_projection"], states[2]["text_projection"])
    assert first.log == again.log


@pytest.mark.parametrize("name", BASELINES)
def test_a_thread_prepares_the_same_batches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: what a thread draws is not disturbed by the training beside it."""
    case, few = planted(), quick(steps=4)
    whole = trained(name, case.clip, case.pairs, few, 0.001, 1, None)
    threaded = functools.partial(Prefetcher, threaded=True)
    monkeypatch.setattr("invertune.training.Prefetcher", threaded)
    again = trained(name, case.clip, case.pairs, few, 0.001, 1, None)
    assert again.log == whole.log
    for key, tensor in whole.clip.net.state_dict().items():
        assert torch.equal(tensor, again.clip.net.state_dict()[key]), key


def test_a_process_augments_its_own_share_as_one_process_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, rows = planted(), torch.arange(20).flip(0)
    batch_at, _ = cleanclip(clone(case.clip), case.pairs, quick(), 0)
    whole, parts = [t.chunk(2) for t in batch_at(rows, 3)], []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "share", lambda batch, rank=rank: batch.chunk(2)[rank])
        parts.append([t.chunk(2) for t in batch_at(rows, 3)])
    for item, views in enumerate(whole):
        for view, expected in enumerate(views):
            assert torch.equal(torch.cat([part[item][view] for part in parts]), expected)


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("invertune.training.SAVED_APART", 2)
    case, path = planted(), tmp_path / "run.safetensors"
    whole = trained("cleanerclip", case.clip, case.pairs, quick(steps=4), 0.001, 0, path)
    again = trained("cleanerclip", case.clip, case.pairs, quick(steps=4), 0.001, 0, path)
    assert path.exists() and again.log == whole.log
    for name, tensor in whole.clip.net.state_dict().items():
        assert torch.equal(tensor, again.clip.net.state_dict()[name]), name


def test_captions_without_anything_to_replace_are_no_obstacle() -> None:
    case = planted()
    odd = ("", "it", "and nothing else", "!?", "mushroom") * 12
    pairs = dataclasses.replace(case.pairs, captions=odd)
    log = trained("cleanerclip", case.clip, pairs, quick(steps=2), 0.001, 0, None).log
    assert all(math.isfinite(value) for row in log for value in row.values())
    alone = dataclasses.replace(case.pairs, captions=("it",) * 60)
    log = trained("cleanerclip", case.clip, alone, quick(steps=2), 0.001, 0, None).log
    assert [row["sub_caption"] for row in log] == [0, 0]


@pytest.mark.parametrize("name", BASELINES)
def test_fewer_pairs_than_a_batch_are_named(name: str) -> None:
    case = planted()
    with pytest.raises(ValueError, match=rf"baselines\.{name}\.batch = 64, but there are 60 pairs"):
        trained(name, case.clip, case.pairs, quick(batch=64), 0.001, 0, None)


def test_a_loss_that_is_not_finite_names_the_setting() -> None:
    case = planted()
    with pytest.raises(TrainingError) as caught:
        trained("ft", case.clip, case.pairs, quick(lrs=(1.0,)), 1e30, 0, None)
    message = str(caught.value)
    assert "ft at lr 1e+30: the loss is " in message and " at step " in message
    assert message.endswith(" in baselines.ft.lrs") and "\n" not in message
    broken = clone(case.clip)
    with torch.no_grad():
        broken.net.text_projection.fill_(math.nan)
    with pytest.raises(TrainingError, match="at step 0 of 20; "):
        trained("ft", broken, case.pairs, quick(), 0.001, 0, None)


def test_the_largest_rate_that_qualifies_is_taken_and_no_smaller_one_run() -> None:
    accuracies, asked = {0.4: 10.0, 0.3: 56.0, 0.2: 59.0, 0.1: 60.0}, []

    case = planted()
    clips = {lr: dataclasses.replace(case.clip) for lr in accuracies}

    def run_at(lr: float) -> tuple[Clip, float]:
        asked.append(lr)
        return clips[lr], accuracies[lr]

    clip, lr, qualified, tried = choose_lr((0.1, 0.3, 0.2, 0.4), run_at, 56.0)
    assert clip is clips[0.3] and (lr, qualified, asked) == (0.3, True, [0.4, 0.3])
    assert tried == ((0.4, 10.0), (0.3, 56.0), (0.2, None), (0.1, None))
    clip, lr, qualified, tried = choose_lr((0.1, 0.4), run_at, 61.0)
    assert clip is clips[0.1]
    assert (lr, qualified, tried) == (0.1, False, ((0.4, 10.0), (0.1, 60.0)))
    clip, lr, qualified, _ = choose_lr((0.2, 0.4, 0.3), run_at, 61.0)
    assert clip is clips[0.2] and not qualified
    accuracies[0.1] = 1.0
    clip, lr, qualified, _ = choose_lr((0.1, 0.4), run_at, 61.0)
    assert clip is clips[0.4] and (lr, qualified) == (0.4, False)


def defended(case: SimpleNamespace, settings: Baselines, work: Path):
    arguments = (case.held, case.labels, head_of, settings, 0, work)
    return defend("ft", case.clip, case.pairs, *arguments)


def test_a_defense_is_chosen_on_held_out_accuracy_with_its_own_text_tower(tmp_path: Path) -> None:
    case = planted()
    result = defended(case, quick(steps=10, lrs=(1.0, 0.002, 0.001)), tmp_path)
    run = dict(result.tried)
    assert result.lr == 0.002 and result.qualified and run[0.001] is None
    assert run[1.0] < result.suspected_accuracy - MINI.allowed_ca_drop_points <= run[0.002]
    assert run[0.002] == pytest.approx(100 * rates(result.clip)[0])
    assert result.images_seen == 2 * 10 * 20
    assert {row["lr"] for row in result.log} == {1.0, 0.002}
    assert not torch.equal(head_of(result.clip), head_of(case.clip))


def test_where_no_rate_qualifies_the_most_accurate_is_returned_and_said_so(tmp_path: Path) -> None:
    result = defended(planted(), quick(steps=10, lrs=(1.0, 0.5)), tmp_path)
    assert not result.qualified
    assert dict(result.tried)[result.lr] == max(a for _, a in result.tried if a is not None)


def test_settings_and_functions_name_the_same_baselines() -> None:
    assert tuple(BASELINES) == get_args(sections.Baseline) == MINI.names


def test_the_paper_profile_has_the_papers_values_in_its_grid() -> None:
    paper = load_settings("paper").baselines
    for name in ("ft", "cleanclip", "cleanerclip"):
        own = getattr(paper, name)
        assert 4.5e-6 in own.lrs and len(own.lrs) == 4 and own.batch == 64
        assert own.steps == paper.pairs // 64 * 10 and own.weight_decay == 0.1
    assert (paper.ft.warmup_steps, paper.cleanerclip.warmup_steps) == (50, 10000)
    par = paper.par
    assert 5e-6 in par.lrs and par.start_lr_ratio * 5e-6 == pytest.approx(3e-6)
    assert par.warmup_steps == par.steps // 2 and not paper.legacy_schedule


def test_mini_gives_a_baseline_ten_times_invertunes_images() -> None:
    mini = load_settings("mini")
    assert mini.baselines.pairs == 10 * mini.data.inversion_images
    for name in BASELINES:
        own = getattr(mini.baselines, name)
        assert own.steps * own.batch == 12800 and len(own.lrs) >= 4
