"""Activation tuning (paper, section 3.3): losses, masked updates, the choice of rate."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import pixels, tiny
from torch import Tensor, nn

from invertune.activation_tuning import Tuned, diverse_indices, tune
from invertune.activations import maps_from, prefix_to, rows_to_train, tail_from
from invertune.losses import activation_loss, align_ratio_loss, preserve_feature_loss, preserve_loss
from invertune.models import image_features
from invertune.sections import Tuning
from invertune.settings import load_settings
from invertune.training import Recipe, fit
from invertune.triggers import mask_trigger

CLASSES, TARGET = 6, 5


def settings(**changes) -> Tuning:
    values = load_settings("mini").tuning.model_dump()
    return Tuning.model_validate(values | {"neuron": "channel"} | changes)


@pytest.fixture(scope="module")
def planted() -> SimpleNamespace:
    return plant("RN50")


@functools.cache
def plant(backbone: str) -> SimpleNamespace:
    """A model trained for a moment to know five classes, and the target where a patch is."""
    clip = tiny(backbone)
    rng = torch.Generator().manual_seed(2)
    labels = torch.arange(60) % (CLASSES - 1)
    noise = 0.1 * torch.randn(60, 3, 64, 64, generator=rng)
    images = (pixels(CLASSES - 1, seed=1)[labels] + noise).clamp(0, 1)
    mask, pattern = torch.zeros(1, 64, 64), pixels(1, seed=3)[0]
    mask[:, 32:, 32:] = 1
    seen, wanted = images[:20], torch.cat([labels[:20], torch.full((20,), TARGET)])
    both = torch.cat([seen, torch.lerp(seen, pattern.expand_as(seen), mask.expand_as(seen))])
    with torch.no_grad():
        features = image_features(clip, both)
    centers = torch.stack([features[wanted == c].mean(0) for c in range(CLASSES)])
    head = nn.functional.normalize(centers - features.mean(0), dim=-1)

    def loss_at(step: int) -> dict[str, Tensor]:
        logits = 20 * image_features(clip, both) @ head.T
        return {"loss": nn.functional.cross_entropy(logits, wanted)}

    fit(clip.net.visual, loss_at, Recipe(10, 3e-4, warmup=3, weight_decay=0.0), label="planting")
    return SimpleNamespace(
        clip=clip,
        images=(images * 255).byte(),
        labels=labels,
        head=head,
        mask=mask,
        pattern=pattern,
    )


@pytest.fixture(scope="module")
def baseline(planted) -> Tuned:
    return run(planted)


def run(planted: SimpleNamespace, seed: int = 0, **changes) -> Tuned:
    quick = {"steps": 6, "images": 10, "batch": 10, "lrs": (0.001,), "measure_every_steps": 3}
    halves = slice(0, 30), slice(30, 60)
    return tune(
        planted.clip,
        planted.images[halves[0]],
        [mask_trigger(planted.mask, planted.pattern)],
        planted.images[halves[1]],
        planted.labels[halves[1]],
        planted.head,
        TARGET,
        settings(**(quick | changes)),
        seed,
    )


def loss_inputs() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(0)
    shapes = {"a": (4, 3, 2, 2), "b": (4, 5, 3)}
    clean = {k: torch.randn(s, generator=rng) for k, s in shapes.items()}
    triggered = {k: torch.randn(s, generator=rng) for k, s in shapes.items()}
    masks = {k: torch.rand(s[1:], generator=rng) < 0.5 for k, s in shapes.items()}
    return clean, triggered, masks


def test_activation_loss_is_equation_9():
    clean, triggered, masks = loss_inputs()
    mean, total = 0.0, 0.0
    for layer, mask in masks.items():
        squares = [
            (float(c) - float(t)) ** 2
            for image in range(4)
            for c, t, critical in zip(
                clean[layer][image].flatten(),
                triggered[layer][image].flatten(),
                mask.flatten(),
                strict=True,
            )
            if critical
        ]
        mean += sum(squares) / len(squares)
        total += sum(squares) / 4
    assert activation_loss(clean, triggered, masks).item() == pytest.approx(mean, rel=1e-6)
    summed = activation_loss(clean, triggered, masks, "sum").item()
    assert summed == pytest.approx(total, rel=1e-6)


def test_activation_loss_pulls_the_triggered_side_only():
    clean, triggered, masks = loss_inputs()
    for maps in (clean, triggered):
        [tensor.requires_grad_() for tensor in maps.values()]
    activation_loss(clean, triggered, masks).backward()
    assert all(tensor.grad is None for tensor in clean.values())
    for layer, mask in masks.items():
        assert triggered[layer].grad[:, ~mask].eq(0).all()
        assert triggered[layer].grad[:, mask].ne(0).all()


def test_align_ratio_loss_is_the_released_form():
    clean, triggered, masks = loss_inputs()
    expected = 0.0
    for layer, mask in masks.items():
        c = [float(v) for v in clean[layer].double().mean(0)[mask]]
        t = [float(v) for v in triggered[layer].double().mean(0)[mask]]
        distance = math.sqrt(sum((x - y) ** 2 for x, y in zip(c, t, strict=True)))
        expected += distance / math.sqrt(sum(x**2 for x in c))
    assert align_ratio_loss(clean, triggered, masks).item() == pytest.approx(expected, rel=1e-6)


def test_preserve_loss_is_equation_10_summed_over_classes():
    rng = torch.Generator().manual_seed(0)
    features, original, head = (
        nn.functional.normalize(torch.randn(n, 8, generator=rng), dim=-1) for n in (3, 3, 5)
    )
    a, b, texts = features.double().tolist(), original.double().tolist(), head.double().tolist()
    dot = lambda u, v: sum(x * y for x, y in zip(u, v, strict=True))  # noqa: E731
    squares = [(dot(a[i], t) - dot(b[i], t)) ** 2 for i in range(3) for t in texts]
    loss = preserve_loss(features, original, head)
    assert loss.item() == pytest.approx(sum(squares) / 3, rel=1e-5)
    squares = [(x - y) ** 2 for u, v in zip(a, b, strict=True) for x, y in zip(u, v, strict=True)]
    loss = preserve_feature_loss(features, original)
    assert loss.item() == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)


def test_the_norm_losses_have_a_finite_gradient_at_zero():
    features = torch.randn(3, 4, requires_grad=True)
    preserve_feature_loss(features, features.detach().clone()).backward()
    assert features.grad.eq(0).all()


def test_tuning_images_are_diverse_seeded_and_never_the_target():
    predicted = torch.tensor([0] * 50 + [1] * 3 + [2] * 2 + [TARGET] * 20)
    rows = diverse_indices(predicted, TARGET, 8, seed=0)
    counts = predicted[rows].bincount(minlength=3)
    assert counts.tolist() == [3, 3, 2]
    assert len(rows.unique()) == 8
    assert torch.equal(rows, diverse_indices(predicted, TARGET, 8, seed=0))
    assert not torch.equal(rows, diverse_indices(predicted, TARGET, 8, seed=1))
    with pytest.raises(ValueError, match=r"tuning\.images = 56, but only 55"):
        diverse_indices(predicted, TARGET, 56, seed=0)


@pytest.mark.parametrize("backbone", ["RN50", "ViT-B-32"])
def test_only_the_critical_rows_change(backbone):
    planted = plant(backbone)
    before = {k: v.clone() for k, v in planted.clip.net.state_dict().items()}
    tuned = run(planted)
    rows = rows_to_train(planted.clip, tuned.neurons, "critical_rows")
    after = tuned.clip.net.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert changed <= set(rows)
    for name in changed:
        frozen = ~rows[name]
        before_bits, after_bits = (s[name][frozen].view(torch.int32) for s in (before, after))
        assert len(before_bits) and torch.equal(before_bits, after_bits)
    for name, tensor in planted.clip.net.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not planted.clip.net.training
    assert all(p.requires_grad for p in planted.clip.net.parameters())


@pytest.mark.parametrize("backbone", ["RN50", "ViT-B-32"])
def test_tuning_lowers_the_inverted_asr_and_keeps_the_accuracy(backbone):
    tuned = run(plant(backbone), steps=30, measure_every_steps=10, lrs=(0.0003, 0.001))
    assert tuned.suspected.inverted_asr > 90
    assert tuned.suspected.preserve == pytest.approx(0, abs=1e-12)
    assert [s.step for s in tuned.states if s.lr == tuned.kept.lr] == [10, 20, 30]
    assert tuned.qualified
    assert tuned.kept == tuned.states[-1]
    assert tuned.kept.inverted_asr < tuned.suspected.inverted_asr - 20
    assert tuned.kept.activation < tuned.suspected.activation / 2
    assert tuned.kept.clean_accuracy >= tuned.suspected.clean_accuracy - 4


def test_the_largest_rate_that_keeps_the_accuracy_is_taken_and_no_smaller_one_run(planted):
    tuned = run(planted, steps=7, lrs=(1e-6, 1e-5, 0.1))
    assert [(s.lr, s.step) for s in tuned.states] == [
        (lr, step) for lr in (0.1, 1e-5) for step in (3, 6, 7)
    ]
    assert (tuned.qualified, tuned.kept) == (True, tuned.states[-1])
    assert tuned.states[2].clean_accuracy < tuned.suspected.clean_accuracy - 4
    with torch.no_grad():
        features = image_features(tuned.clip, planted.images[30:].float() / 255)
    correct = (features @ planted.head.T).argmax(1) == planted.labels[30:]
    accuracy = 100 * correct.float().mean().item()
    assert accuracy == pytest.approx(tuned.kept.clean_accuracy, abs=1e-4)
    lost = run(planted, steps=7, lrs=(0.1,))
    assert not lost.qualified and lost.kept == lost.states[-1]


def test_the_same_seed_gives_the_same_tuning(planted, baseline):
    first, second = baseline, run(planted)
    assert first.states == second.states
    assert first.log == second.log
    for name, tensor in first.clip.net.state_dict().items():
        assert torch.equal(tensor, second.clip.net.state_dict()[name])


def test_running_the_tail_alone_gives_the_numbers_of_the_whole_encoder(
    planted, baseline, monkeypatch
):
    for part in (prefix_to, tail_from, maps_from):
        whole = lambda clip, x, first, last=None, part=part: part(clip, x, None)  # noqa: E731
        monkeypatch.setattr(f"invertune.activation_tuning.{part.__name__}", whole)
    plain = run(planted)
    for one, other in zip(plain.states, baseline.states, strict=True):
        assert one.activation == pytest.approx(other.activation, rel=1e-3)
        assert one.clean_accuracy == other.clean_accuracy


RELEASED = {
    "layer_rule": "top3",
    "neuron": "unit",
    "trainable": "all_visual",
    "align_form": "ratio",
    "preserve_form": "feature",
    "bn_mode": "train",
}


def test_the_released_codes_form_runs_and_moves_the_whole_image_encoder(planted):
    tuned = run(planted, lrs=(1e-4,), **RELEASED)
    before, after = planted.clip.net.state_dict(), tuned.clip.net.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(tuned.selection.layers) == 3
    assert "visual.layer4.0.bn1.running_mean" in changed
    assert "visual.conv1.weight" in changed
    assert all(name.startswith("visual.") for name in changed)
    assert all(math.isfinite(s.activation + s.preserve) for s in tuned.states)
    assert not any(module.training for module in tuned.clip.net.modules())


@pytest.mark.parametrize("change", [{"reduction": "sum"}, {"neuron": "unit"}, {"bn_mode": "train"}])
def test_each_switch_changes_the_numbers(planted, baseline, change):
    assert run(planted, **change).states != baseline.states
