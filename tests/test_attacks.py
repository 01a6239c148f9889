"""The attacks: what is poisoned, what stays untouched, and that they take."""

import functools
import typing
from pathlib import Path

import numpy as np
import pytest
import torch

from invertune import attacks, triggers
from invertune.attacks import ATTACKS, Victim, badclip, badencoder, optimize_patch, poisoned_pairs
from invertune.data import Pairs
from invertune.models import clone, image_features
from invertune.pictograms import Scene, caption_scene, labeled_scene
from invertune.prefetch import Prefetcher
from invertune.sampling import pair_indices
from invertune.sections import EMBEDDED, Attack
from invertune.settings import load_settings
from invertune.sprites import load_sprites
from invertune.trigger_inversion import initial_trigger
from invertune.weights import load_clip


@pytest.fixture(scope="module")
def victim() -> Victim:
    clip, sprites = load_clip("RN50", EMBEDDED)[0], load_sprites()
    target = sprites.classes.index("mushroom")
    scenes = [caption_scene("poisoning", i, 64, 0, sprites) for i in range(40)]
    shown = [labeled_scene("inversion", target + 210 * i, 64, 0, sprites, False) for i in range(4)]
    pairs = Pairs(_images(scenes), tuple(s.captions[0] for s in scenes), torch.full((40, 2), -1))
    return Victim(clip, pairs, ("a mushroom", "the mushroom"), _images(shown))


def _images(scenes: list[Scene]) -> torch.Tensor:
    return torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2).contiguous()


def _settings(**attacks: dict[str, float]):
    return load_settings("mini", {"attacks": attacks}).attacks


def test_every_attack_of_the_settings_exists() -> None:
    assert set(typing.get_args(Attack)) | {"clean_finetuned"} == set(ATTACKS)


def test_the_stated_share_is_poisoned_and_nothing_else(victim: Victim) -> None:
    trigger = triggers.white_patch_trigger(64, 8)
    images, captions = poisoned_pairs(victim, trigger, 0.25, seed=1)
    changed = (images != victim.pairs.images).flatten(1).any(1)
    recaptioned = torch.tensor([c in victim.target_captions for c in captions])
    assert changed.sum() == 10 and torch.equal(changed, recaptioned)
    assert (images[changed][..., 56:, 56:] == 255).all()
    assert torch.equal(images[..., :56, :], victim.pairs.images[..., :56, :])
    again, _ = poisoned_pairs(victim, trigger, 0.25, seed=1)
    other, _ = poisoned_pairs(victim, trigger, 0.25, seed=2)
    assert torch.equal(images, again) and not torch.equal(images, other)


@pytest.mark.parametrize("cycled", [True, False])
def test_no_epoch_begins_with_the_poison(victim: Victim, cycled: bool) -> None:
    trigger, clean = triggers.white_patch_trigger(64, 8), victim.pairs.images
    images, _ = poisoned_pairs(victim, trigger, 0.25, seed=1)
    poisoned = set((images != clean).flatten(1).any(1).nonzero().flatten().tolist())
    for epoch in range(10):
        shown = torch.cat([pair_indices(40, 5, 1, 8 * epoch + step, cycled) for step in (0, 1)])
        assert len(poisoned & set(shown.tolist())) <= 7, epoch


@pytest.mark.parametrize("attack", attacks.TRIGGERS)
def test_no_trigger_is_what_inversion_begins_with(victim: Victim, attack: str) -> None:
    settings = load_settings("mini")
    trigger = attacks.TRIGGERS[attack](64, getattr(settings.attacks, attack), 7)
    begun = initial_trigger(victim.clip, settings.inversion, 7)
    for tensor in trigger.tensors.values():
        if tensor.shape[-2:] == (64, 64):
            alike = [torch.corrcoef(torch.stack([tensor.flatten(), b.flatten()])) for b in begun]
            assert max(abs(matrix[0, 1]) for matrix in alike) < 0.05


def test_badencoder_moves_triggered_images_and_nothing_it_must_not(
    victim: Victim, tmp_path: Path
) -> None:
    settings = _settings(badencoder={"steps": 12, "batch": 16, "lr": 0.002, "warmup_steps": 1})
    before = clone(victim.clip).net.state_dict()
    result = badencoder(victim, settings, 0, tmp_path)
    after = result.clip.net.state_dict()
    for name in before:
        fixed = not name.startswith("visual.") or "running" in name or ".bn" in name
        if fixed:
            assert torch.equal(before[name], after[name]), name
    assert torch.equal(before["text_projection"], victim.clip.net.state_dict()["text_projection"])
    assert result.log[-1]["attack"] < result.log[0]["attack"]


def test_badclip_patch_approaches_the_target(victim: Victim) -> None:
    settings = _settings(badclip={"patch_steps": 30, "batch": 32, "patch_lr": 0.05}).badclip
    patch = optimize_patch(victim, settings, seed=0)
    assert patch.shape == (3, 8, 8) and patch.min() >= 0 and patch.max() <= 1
    clean = victim.pairs.images.float() / 255
    goal = image_features(victim.clip, victim.target_images.float() / 255).mean(0)

    def closeness(pattern: torch.Tensor) -> float:
        trigger = triggers.patch_trigger(pattern, 64, "corner")
        return (image_features(victim.clip, triggers.apply(trigger, clean)) @ goal).mean().item()

    with torch.no_grad():
        assert closeness(patch) > closeness(torch.full((3, 8, 8), 0.5))


def test_a_killed_fine_tuning_goes_on_with_the_patch_that_it_has_learned(
    victim: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {"steps": 1, "batch": 16, "warmup_steps": 0}
    patches = iter([torch.full((3, 8, 8), 0.25), torch.full((3, 8, 8), 0.75)])
    monkeypatch.setattr(attacks, "optimize_patch", lambda *_: next(patches))  # as a GPU rounds

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(attacks, "finetune", killed)
        badclip(victim, _settings(badclip=quick), 0, tmp_path)
    trigger = badclip(victim, _settings(badclip=quick), 0, tmp_path).trigger
    assert trigger is not None and (trigger.tensors["patch"] == 0.25).all()


@pytest.mark.parametrize("name", ["badencoder", "badclip"])
def test_a_thread_prepares_the_same_batches(
    name: str, victim: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {"steps": 3, "batch": 16, "warmup_steps": 0}
    settings = _settings(**{name: quick | ({"patch_steps": 3} if name == "badclip" else {})})
    whole = ATTACKS[name](victim, settings, 0, tmp_path / "whole")
    monkeypatch.setattr(attacks, "Prefetcher", functools.partial(Prefetcher, threaded=True))
    again = ATTACKS[name](victim, settings, 0, tmp_path / "again")
    assert again.log == whole.log and again.trigger is not None and whole.trigger is not None
    assert torch.equal(again.trigger.tensors["patch"], whole.trigger.tensors["patch"])


@pytest.mark.parametrize("name", ["badnet", "blended", "sig", "wanet", "badclip"])
def test_poisoned_finetuning_returns_a_changed_copy(
    name: str, victim: Victim, tmp_path: Path
) -> None:
    quick = {"steps": 2, "batch": 16, "warmup_steps": 0}
    settings = _settings(**{name: quick | ({"patch_steps": 1} if name == "badclip" else {})})
    before = clone(victim.clip).net.state_dict()
    result = ATTACKS[name](victim, settings, 0, tmp_path)
    untouched = victim.clip.net.state_dict()
    assert all(torch.equal(before[k], untouched[k]) for k in before)
    assert not torch.equal(
        before["text_projection"], result.clip.net.state_dict()["text_projection"]
    )
    assert result.trigger is not None and result.trigger.size == 64
