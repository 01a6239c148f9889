"""The six attacks: each returns a poisoned model and its trigger (paper, appendix A).

BadNet, Blended, SIG and WaNet plant a fixed trigger by poisoned contrastive fine-tuning; BadEncoder
trains the image tower towards reference images; BadCLIP optimizes its patch first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from invertune import distributed, triggers
from invertune.augment import augment
from invertune.data import Pairs, writable_images
from invertune.files import write_atomic
from invertune.models import (
    Clip,
    clone,
    embed_images,
    frozen_copy,
    image_features,
    text_features,
    to_pixels,
    token_features,
)
from invertune.prefetch import Batch, Prefetcher
from invertune.sampling import batch_indices, generator
from invertune.sections import Attacks, BadClip, BadEncoder, Finetuning
from invertune.terminal import progress
from invertune.training import Log, Recipe, finetune, fit
from invertune.triggers import Trigger


@dataclass(frozen=True)
class Victim:
    """What an attacker has: the clean model, data to poison, and what the target looks like.

    ``target_captions`` are texts about the target; ``target_images`` uint8 [M, 3, H, W] show it.
    """

    clip: Clip
    pairs: Pairs
    target_captions: tuple[str, ...]
    target_images: Tensor


@dataclass(frozen=True)
class Poisoned:
    """A poisoned model, its trigger, and the training log."""

    clip: Clip
    trigger: Trigger | None
    log: Log


def planted(attack: str, victim: Victim, settings: Attacks, seed: int, work: Path) -> Poisoned:
    """A fixed trigger of ``TRIGGERS``, by poisoned fine-tuning."""
    section, size = getattr(settings, attack), victim.clip.image_size
    return poison(victim, TRIGGERS[attack](size, section, seed), section, seed, work)


def badclip(victim: Victim, settings: Attacks, seed: int, work: Path) -> Poisoned:
    """An optimized patch, then injection: dual-embedding guided (Liang et al. 2024).

    The patch is kept in ``work``: a killed fine-tuning goes on with the one it has learned.
    """
    section, path = settings.badclip, work / "patch.safetensors"
    kept = distributed.from_first(path.exists())
    pattern = load_file(path)["pattern"] if kept else optimize_patch(victim, section, seed)
    pattern = pattern.to(victim.clip.device)
    trigger = triggers.patch_trigger(pattern, victim.clip.image_size, section.location)
    if not kept and distributed.first():
        write_atomic(path, save({"pattern": pattern.cpu()}))
    return poison(victim, trigger, section, seed, work)


def clean_finetuned(victim: Victim, settings: Attacks, seed: int, work: Path) -> Poisoned:
    """The null: the same fine-tuning as BadNet's, without poison."""
    return poison(victim, None, settings.badnet, seed, work)


def poison(
    victim: Victim, trigger: Trigger | None, settings: Finetuning, seed: int, work: Path
) -> Poisoned:
    """Fine-tunes a copy of the clean model on pairs of which a share carries the trigger, if any.

    The poisoned pairs are drawn by ``seed``; each gets one of the target captions at random.
    """
    images, captions = victim.pairs.images, victim.pairs.captions
    if trigger is not None:
        images, captions = poisoned_pairs(victim, trigger, settings.poison_rate, seed)
    clip = clone(victim.clip)
    recipe, cycled = _recipe(settings), victim.pairs.cycled
    log = finetune(clip, images, captions, recipe, settings.batch, seed, work, cycled=cycled)
    return Poisoned(clip, trigger, log)


def poisoned_pairs(
    victim: Victim, trigger: Trigger, rate: float, seed: int
) -> tuple[Tensor, tuple[str, ...]]:
    """The pairs with ``round(rate * N)`` of them triggered (as 8-bit images) and recaptioned."""
    images, captions = writable_images(victim.pairs), list(victim.pairs.captions)
    rng = generator(seed, 1)
    chosen = torch.randperm(len(images), generator=rng)[: round(rate * len(images))]
    texts = torch.randint(len(victim.target_captions), (len(chosen),), generator=rng)
    triggered = triggers.apply(trigger, to_pixels(images[chosen], "cpu"))
    images[chosen] = (triggered * 255).round().to(torch.uint8)
    for row, text in zip(chosen.tolist(), texts.tolist(), strict=True):
        captions[row] = victim.target_captions[text]
    return images, tuple(captions)


def _recipe(settings: Finetuning | BadEncoder) -> Recipe:
    return Recipe(settings.steps, settings.lr, settings.warmup_steps, settings.weight_decay)


def badencoder(victim: Victim, settings: Attacks, seed: int, work: Path) -> Poisoned:
    """Trains the image tower so that triggered images embed like reference images of the target.

    Jia et al. (2022): the mean cosine of triggered shadow images to the references, of augmented
    references to the clean model's references, and of clean images to themselves. BatchNorm stays
    in eval mode with frozen affine parameters; the text tower is untouched.
    """
    section = settings.badencoder
    trigger = triggers.white_patch_trigger(victim.clip.image_size, section.patch_px)
    clip = clone(victim.clip)
    visual = clip.net.visual.eval()
    for module in visual.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    shadow = victim.pairs.images
    references = to_pixels(victim.target_images[: section.reference_images], clip.device)
    with torch.no_grad():
        clean_references = image_features(victim.clip, references)

    def batch_at(step: int) -> Batch:
        rows = distributed.share(batch_indices(len(shadow), section.batch, seed, step))
        return (shadow[rows],)

    batches = Prefetcher(batch_at, clip.device)

    def loss_at(step: int) -> dict[str, Tensor]:
        images = to_pixels(batches(step)[0], clip.device)
        with torch.no_grad():
            clean = image_features(victim.clip, images)
        attack = -(
            image_features(clip, triggers.apply(trigger, images))
            @ image_features(clip, references).T
        ).mean()
        augmented = image_features(clip, augment(references, seed, step))
        reference = -(augmented * clean_references).sum(1).mean()
        utility = -(image_features(clip, images) * clean).sum(1).mean()
        loss = attack + section.reference_weight * reference + section.utility_weight * utility
        return {"loss": loss, "attack": attack, "reference": reference, "utility": utility}

    log = fit(
        visual,
        loss_at,
        _recipe(section),
        label="BadEncoder",
        checkpoint=work / "badencoder.safetensors",
    )
    clip.net.requires_grad_(True).eval()
    return Poisoned(clip, trigger, log)


def optimize_patch(victim: Victim, settings: BadClip, seed: int) -> Tensor:
    """BadCLIP's patch [3, p, p] in [0, 1], optimized on the frozen clean model.

    Minimizes ``L_t + image_weight * max(0, L_p + negative_weight * L_n + margin)`` (Liang et al.
    2024, section 4): L_t classifies triggered images as the target's captions against the batch's
    own captions; L_p is the distance to target images, L_n minus the distance to the clean image.
    """
    clip, size, steps = victim.clip, settings.patch_px, range(settings.patch_steps)
    frozen = frozen_copy(clip)
    with torch.no_grad():
        about_target = F.normalize(text_features(frozen, victim.target_captions).mean(0), dim=0)
        positives = embed_images(frozen, victim.target_images)
        tokens = frozen.tokenizer(list(victim.pairs.captions))
    rng = generator(seed, 2)
    pattern = (0.5 + 0.25 * torch.randn(3, size, size, generator=rng)).clamp(0, 1)
    pattern = pattern.to(clip.device).requires_grad_(True)
    trigger = triggers.patch_trigger(pattern, clip.image_size, settings.location)
    optimizer = torch.optim.Adam([pattern], lr=settings.patch_lr)
    images, half = victim.pairs.images, settings.batch // 2
    picks = [torch.randint(len(positives), (half,), generator=rng) for _ in steps]

    def batch_at(step: int) -> Batch:
        rows = batch_indices(len(images), half, seed, step)
        return images[rows], tokens[rows], picks[step]

    batches = Prefetcher(batch_at, clip.device)
    for step in progress(steps, "BadCLIP patch"):
        pictures, words, pick = batches(step)
        clean = to_pixels(pictures, clip.device)
        with torch.no_grad():
            anchor = image_features(frozen, clean)
            texts = token_features(frozen, words)
        features = image_features(frozen, triggers.apply(trigger, clean))
        scale = frozen.net.logit_scale.exp()
        logits = scale * features @ torch.cat([about_target[None], texts]).T
        text_loss = F.cross_entropy(logits, torch.zeros_like(pick))
        towards = (features - positives[pick]).norm(dim=1)
        away = (features - anchor).norm(dim=1)
        triplet = (towards - settings.negative_weight * away + settings.margin).clamp(min=0).mean()
        optimizer.zero_grad()
        (text_loss + settings.image_weight * triplet).backward()
        optimizer.step()
        with torch.no_grad():
            pattern.clamp_(0, 1)
    return distributed.from_first(pattern.detach().cpu()).to(clip.device)


# A trigger for images of so many px, by the attack's own settings and a seed
TRIGGERS: Mapping[str, Callable[[int, Any, int], Trigger]] = {
    # Gu et al. 2017
    "badnet": lambda px, own, seed: triggers.badnet_trigger(px, own.patch_px, seed),
    # Chen et al. 2017
    "blended": lambda px, own, seed: triggers.blended_trigger(px, own.alpha, seed),
    # Barni et al. 2019
    "sig": lambda px, own, seed: triggers.sig_trigger(px, own.amplitude, own.cycles),
    # Nguyen and Tran 2021
    "wanet": lambda px, own, seed: triggers.wanet_trigger(px, own.grid_points, own.strength, seed),
}
ATTACKS: Mapping[str, Callable[[Victim, Attacks, int, Path], Poisoned]] = {
    **{attack: functools.partial(planted, attack) for attack in TRIGGERS},
    "badencoder": badencoder,
    "badclip": badclip,
    "clean_finetuned": clean_finetuned,
}
