"""Poisoned fine-tuning, from memory and from decoded shards, and evaluation.

ceiling: both towers' forward and backward passes (evaluation: the image tower's forward pass) on
ready inputs, without loss or optimizer. plain: the textbook loop, which tokenizes every batch. Ours
includes everything that it prepares, once in a run.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import loader
from benchmarks.timing import OURS, Contender
from invertune import triggers
from invertune.evaluation import clean_and_triggered
from invertune.metrics import attack_success_rate, clean_accuracy
from invertune.models import (
    Clip,
    forward_precision,
    image_features,
    normalize,
    to_pixels,
    token_features,
)
from invertune.sampling import batch_indices
from invertune.training import Recipe, finetune
from invertune.triggers import Trigger

CLASSES = 210
RATE = 1e-6  # A.1


def finetuning(clip: Clip, steps: int, batch: int, shard: Path) -> dict[str, Contender]:
    """Steps of both towers; the pairs lie in memory or are mapped from the disk."""
    mapped, captions = loader.decoded(shard, clip.image_size)
    images = mapped.clone()
    tokens = clip.tokenizer(captions[:batch]).to(clip.device)
    ready = normalize(clip, to_pixels(images[:batch], clip.device))
    many = OURS * steps
    recipe = Recipe(many, RATE)

    def ours(given: Tensor) -> None:
        with tempfile.TemporaryDirectory() as work:
            finetune(clip, given, captions, recipe, batch, 0, Path(work), cycled=False)

    return {
        "ours": Contender(lambda: ours(images), many, many * batch),
        "ours, from shards": Contender(lambda: ours(mapped), many, many * batch),
        "plain": Contender(
            lambda: _plain_training(clip, images, captions, steps, batch), steps, steps * batch
        ),
        "ceiling": Contender(
            lambda: _bare_training(clip, ready, tokens, steps), steps, steps * batch
        ),
    }


def _plain_training(
    clip: Clip, images: Tensor, captions: list[str], steps: int, batch: int
) -> None:
    clip.net.train()
    optimizer = torch.optim.AdamW(clip.net.parameters(), lr=RATE, weight_decay=0.1)
    labels = torch.arange(batch, device=clip.device)
    for step in range(steps):
        rows = batch_indices(len(images), batch, 0, step)
        image = image_features(clip, to_pixels(images[rows], clip.device))
        text = token_features(clip, clip.tokenizer([captions[row] for row in rows]))
        logits = clip.net.logit_scale.exp() * image @ text.T
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _bare_training(clip: Clip, ready: Tensor, tokens: Tensor, steps: int) -> None:
    clip.net.train()
    for _ in range(steps):
        clip.net.zero_grad()
        with forward_precision(clip):
            image, text = clip.net.encode_image(ready), clip.net.encode_text(tokens)
        (image.sum() + text.sum()).backward()


def evaluation(clip: Clip, steps: int, batch: int) -> dict[str, Contender]:
    """Clean accuracy and attack success rate of ``steps`` batches: two passes an image."""
    size, count = clip.image_size, steps * batch
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    labels = torch.randint(1, CLASSES, (count,))
    ready = normalize(clip, to_pixels(images[:batch], clip.device))
    trigger = triggers.badnet_trigger(size, size // 8, 0)
    with torch.no_grad():
        width = image_features(clip, to_pixels(images[:1], clip.device)).shape[1]
    head = F.normalize(torch.randn(CLASSES, width, device=clip.device), dim=1)

    contenders = {
        "ours": lambda: _rates(clip, images, labels, head, trigger, batch),
        "plain": lambda: _plain_rates(clip, images, labels, head, trigger, batch),
        "ceiling": lambda: _bare_evaluation(clip, ready, 2 * steps),
    }
    return {name: Contender(run, 2 * steps, 2 * count) for name, run in contenders.items()}


def _rates(
    clip: Clip, images: Tensor, labels: Tensor, head: Tensor, trigger: Trigger, batch: int
) -> None:
    clean, attacked = clean_and_triggered(clip, images, trigger, batch)
    clean_accuracy(clean, head, labels)
    attack_success_rate(attacked, head, labels, 0)


@torch.no_grad()
def _plain_rates(
    clip: Clip, images: Tensor, labels: Tensor, head: Tensor, trigger: Trigger, batch: int
) -> None:
    clip.net.eval()
    head, right, hit = head.double().T, 0, 0  # metrics are float64
    for part, own in zip(images.split(batch), labels.split(batch), strict=True):
        pixels = to_pixels(part, clip.device)
        triggered = triggers.apply(trigger, pixels)
        predicted = (image_features(clip, pixels).double() @ head).argmax(1)
        attacked = (image_features(clip, triggered).double() @ head).argmax(1)
        right += int((predicted == own.to(clip.device)).sum())
        hit += int((attacked == 0).sum())


@torch.no_grad()
def _bare_evaluation(clip: Clip, ready: Tensor, steps: int) -> None:
    clip.net.eval()
    for _ in range(steps):
        with forward_precision(clip):
            clip.net.encode_image(ready)
