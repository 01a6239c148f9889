"""Pretraining of a CLIP on scenes: a supervised warm start, then contrastive training."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invertune.augment import augment
from invertune.data import Pairs
from invertune.models import Clip, image_features, to_pixels
from invertune.prefetch import Batch, Prefetcher
from invertune.sampling import balanced_indices
from invertune.sections import Pretraining
from invertune.training import Log, Recipe, contrastive_method, fit


def warm_start(
    clip: Clip, pairs: Pairs, classes: int, recipe: Recipe, seed: int, work: Path
) -> Log:
    """Trains the image tower to name the objects in the ``pairs``; resumes in ``work``."""
    torch.manual_seed(seed)
    dim, objects = clip.net.text_projection.shape[1], pairs.objects
    net = nn.ModuleDict({"visual": clip.net.visual, "head": nn.Linear(dim, classes)})
    net.to(clip.device).train()

    def batch_at(step: int) -> Batch:
        rows = balanced_indices(objects[:, 0], classes, seed, step)
        return pairs.images[rows], objects[rows]

    batches = Prefetcher(batch_at, clip.device)

    def loss_at(step: int) -> dict[str, Tensor]:
        images, shown = batches(step)
        pixels = augment(to_pixels(images, clip.device), seed, step)
        logits = net["head"](image_features(clip, pixels) * 20)
        present = F.one_hot(shown + 1, classes + 1).sum(1)[:, 1:].float()
        targets = present / present.sum(1, keepdim=True)
        loss = F.cross_entropy(logits, targets, label_smoothing=0.05)
        return {"loss": loss, "accuracy": (logits.argmax(1) == shown[:, 0]).float().mean()}

    checkpoint = work / "warm_start.safetensors"
    return fit(net, loss_at, recipe, label="warm start", checkpoint=checkpoint)


def contrastive(
    clip: Clip, pairs: Pairs, classes: int, recipe: Recipe, seed: int, work: Path
) -> Log:
    """Contrastive training of both towers on ``pairs``; resumes in ``work``."""
    batch_at, terms = contrastive_method(clip, pairs.images, pairs.captions)
    rows = functools.partial(balanced_indices, pairs.objects[:, 0], classes, seed)
    batches = Prefetcher(lambda step: batch_at(rows(step), step), clip.device)

    def loss_at(step: int) -> dict[str, Tensor]:
        images, words = batches(step)
        return terms(augment(to_pixels(images, clip.device), seed, step), words)

    checkpoint = work / "contrastive.safetensors"
    return fit(clip.net, loss_at, recipe, label="contrastive", checkpoint=checkpoint)


def pretrain(
    clip: Clip, pairs: Pairs, classes: int, settings: Pretraining, seed: int, work: Path
) -> Log:
    """Both stages, in place; a killed one goes on from its checkpoint in ``work``."""
    log = []
    for stage, steps, lr in (
        (warm_start, settings.warm_start_steps, settings.warm_start_lr),
        (contrastive, settings.contrastive_steps, settings.contrastive_lr),
    ):
        recipe = Recipe(steps, lr, settings.warmup_steps, settings.weight_decay)
        log += stage(clip, pairs, classes, recipe, seed, work)
    clip.net.eval()
    return log
