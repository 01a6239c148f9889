"""The four baselines: FT, CleanCLIP, CleanerCLIP and PAR (paper, section 4.1, appendix B).

All of them fine-tune the suspected model on clean caption pairs; they differ in their losses and
augmentations. CleanerCLIP is our reconstruction: no reference code exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from invertune import distributed
from invertune.augment import auto_augment, noise_and_erase
from invertune.data import Pairs
from invertune.losses import cut_off, feature_distance, in_modal_loss, sub_caption_loss
from invertune.metrics import clean_accuracy
from invertune.models import Clip, clone, embed_images, frozen_copy, to_pixels, token_features
from invertune.prefetch import Batch
from invertune.sampling import BatchError, pair_indices
from invertune.sections import Baselines, BaselineTraining, CleanClip, Par
from invertune.text_augment import Synonyms, augment_captions, known_words, lexicon, sub_captions
from invertune.training import (
    Log,
    Method,
    Recipe,
    Terms,
    TrainingError,
    choose_lr,
    contrastive_loss,
    contrastive_method,
    pair_features,
    train,
)


@dataclass(frozen=True)
class Trained:
    """A fine-tuned copy of the suspected model, and the training log."""

    clip: Clip
    log: Log


@dataclass(frozen=True)
class Defended:
    """The defended ``clip`` and how its rate ``lr`` was chosen (accuracies: held-out, percent).

    ``qualified`` is False where every rate lost more accuracy than allowed; ``tried`` pairs every
    rate of the grid, largest first, with its accuracy, or None where it was not run.
    ``images_seen`` counts the pairs shown over all rates (a second view of a pair not again).
    """

    clip: Clip
    lr: float
    qualified: bool
    tried: tuple[tuple[float, float | None], ...]
    suspected_accuracy: float
    log: Log
    images_seen: int


def schedule(section: BaselineTraining, lr: float, pairs: int, legacy: bool) -> Recipe:
    """Warm-up to ``lr``, then a cosine that ends at 0; PAR has its own warm-up and Adam betas.

    With ``legacy``, CleanCLIP's released schedule: epochs are counted from 1, so it runs one epoch
    late. The warm-up is skipped, and in the last epoch the rate goes up again.
    """
    if isinstance(section, Par):
        return Recipe(
            section.steps,
            lr,
            section.warmup_steps,
            section.weight_decay,
            betas=(0.9, 0.98),  # PAR's code
            start_ratio=section.start_lr_ratio,
        )
    offset = min(pairs // section.batch, section.steps) if legacy else 0
    return Recipe(section.steps, lr, section.warmup_steps, section.weight_decay, offset=offset)


def ft(clip: Clip, pairs: Pairs, settings: Baselines, seed: int) -> Method:
    """Fine-tuning: the contrastive loss alone (CleanCLIP's code without its second term)."""
    return contrastive_method(clip, pairs.images, pairs.captions)


def cleanclip(clip: Clip, pairs: Pairs, settings: Baselines, seed: int) -> Method:
    """FT plus in-modal self-supervision on augmented images and captions (Bansal et al. 2023)."""
    clip.net.train()
    section = settings.cleanclip
    known = known_words(settings.synonyms).synonyms
    tokens = _both_tokens(clip, pairs.captions, known, section, seed)

    def batch_at(rows: Tensor, step: int) -> Batch:
        return _two_views(pairs, tokens, rows, seed, step)

    def terms(views: Tensor, words: Tensor) -> Terms:
        return _cleanclip_terms(clip, views, words, section)[0]

    return batch_at, terms


def cleanerclip(clip: Clip, pairs: Pairs, settings: Baselines, seed: int) -> Method:
    """CleanCLIP plus sub-captions on a random share of each batch (Xun et al. 2024).

    Images whose caption has nothing to replace take no part in the third term.
    """
    clip.net.train()
    section = settings.cleanerclip
    vocabulary = known_words(settings.synonyms)
    tokens = _both_tokens(clip, pairs.captions, vocabulary.synonyms, section, seed)
    known = lexicon(pairs.captions, vocabulary.nouns)

    def batch_at(rows: Tensor, step: int) -> Batch:
        captions = [pairs.captions[row] for row in rows.tolist()]
        share, count = section.sub_caption_share, section.counterfactuals
        groups = sub_captions(captions, known, share, count, seed, step)
        drawn = torch.tensor(list(groups), dtype=torch.long)
        texts = clip.tokenizer([text for group in groups.values() for text in group])
        return *_two_views(pairs, tokens, rows, seed, step), drawn, texts

    def terms(views: Tensor, words: Tensor, drawn: Tensor, sub_words: Tensor) -> Terms:
        base, image = _cleanclip_terms(clip, views, words, section)
        image = image[drawn]
        texts = image[:, None]
        if len(drawn):
            texts = token_features(clip, sub_words).view(
                len(drawn), 1 + section.counterfactuals, -1
            )
        sub = sub_caption_loss(image, texts, clip.net.logit_scale)
        loss = base["loss"] + section.sub_caption_weight * sub
        return {**base, "loss": loss, "sub_caption": sub}

    return batch_at, terms


def par(clip: Clip, pairs: Pairs, settings: Baselines, seed: int) -> Method:
    """Perturb and recover: moves away from the suspected model's features (Singh et al. 2024).

    The contrastive loss minus half of the two distances, each until its cut-off. Batch norm is in
    eval mode, as in effect in PAR's code, and the logit scale is not trained. The logged distances
    are those before the cut-off: unless they approach 2, nothing was perturbed.
    """
    frozen, section = frozen_copy(clip), settings.par  # not yet trained: the suspected model
    clip.net.eval().logit_scale.requires_grad_(False)
    tokens = clip.tokenizer(list(pairs.captions))

    def batch_at(rows: Tensor, step: int) -> Batch:
        pixels = to_pixels(pairs.images[rows], clip.device)
        return noise_and_erase(pixels, clip.mean, section, seed, step), tokens[rows]

    def terms(pixels: Tensor, words: Tensor) -> Terms:
        image, text = pair_features(clip, pixels, words)
        with torch.no_grad():
            original_image, original_text = pair_features(frozen, pixels, words)
        image_distance = feature_distance(image, original_image)
        text_distance = feature_distance(text, original_text)
        perturbed = cut_off(image_distance, section.cutoff) + cut_off(text_distance, section.cutoff)
        contrastive = contrastive_loss(image, text, clip.net.logit_scale)
        return {
            "loss": contrastive - perturbed / 2,
            "contrastive": contrastive,
            "image_distance": image_distance,
            "text_distance": text_distance,
        }

    return batch_at, terms


def _both_tokens(
    clip: Clip, captions: Sequence[str], synonyms: Synonyms, section: CleanClip, seed: int
) -> Tensor:
    """Token ids [2, N, context] of the captions and of their augmented versions, drawn once."""
    augmented = augment_captions(captions, synonyms, section.text_change_rate, seed)
    return torch.stack([clip.tokenizer(list(texts)) for texts in (captions, augmented)])


def _two_views(pairs: Pairs, tokens: Tensor, rows: Tensor, seed: int, step: int) -> Batch:
    """This process's share n of the pairs at ``rows``, and their augmented versions after them.

    Returns uint8 [2 n, 3, H, W] and token ids [2 n, context] from those of ``_both_tokens``.
    """
    mine = rows[places := distributed.share(torch.arange(len(rows)))]
    images = pairs.images[mine]
    augmented = auto_augment(images, seed, step, int(places[0]))
    return torch.cat([images, augmented]), tokens[:, mine].flatten(0, 1)


def _cleanclip_terms(
    clip: Clip, views: Tensor, tokens: Tensor, section: CleanClip
) -> tuple[Terms, Tensor]:
    """CleanCLIP's loss on what ``_two_views`` gives; image features [N, D] of the whole batch."""
    features = pair_features(clip, views, tokens, shared=True)
    parts = (distributed.processes(), 2, -1)  # each process has gathered both views of its share
    both = [f.unflatten(0, parts).transpose(0, 1).flatten(1, 2) for f in features]
    (image, other_image), (text, other_text) = both
    contrastive = contrastive_loss(image, text, clip.net.logit_scale)
    in_modal = in_modal_loss(image, other_image, text, other_text, clip.net.logit_scale)
    loss = contrastive + section.in_modal_weight * in_modal
    return {"loss": loss, "contrastive": contrastive, "in_modal": in_modal}, image


BASELINES: Mapping[str, Callable[[Clip, Pairs, Baselines, int], Method]] = {
    "ft": ft,
    "cleanclip": cleanclip,
    "cleanerclip": cleanerclip,
    "par": par,
}


def trained(
    name: str,
    suspected: Clip,
    pairs: Pairs,
    settings: Baselines,
    lr: float,
    seed: int,
    checkpoint: Path | None,
) -> Trained:
    """Fine-tunes a copy of ``suspected`` by one of the four methods."""
    section: BaselineTraining = getattr(settings, name)
    count = len(pairs.images)
    if count < section.batch:
        raise BatchError(f"baselines.{name}.batch = {section.batch}, but there are {count} pairs")
    clip = clone(suspected)
    method = BASELINES[name](clip, pairs, settings, seed)
    rows_at = partial(pair_indices, count, section.batch, seed, cycled=pairs.cycled)
    recipe = schedule(section, lr, count, settings.legacy_schedule)
    try:
        log = train(clip, method, rows_at, recipe, f"{name} at lr {lr:g}", checkpoint)
    except TrainingError as error:
        raise TrainingError(f"{error} in baselines.{name}.lrs") from None
    clip.net.requires_grad_(True)
    return Trained(clip, log)


def defend(
    name: str,
    suspected: Clip,
    pairs: Pairs,
    heldout: Tensor,
    heldout_labels: Tensor,
    head_of: Callable[[Clip], Tensor],
    settings: Baselines,
    seed: int,
    work: Path,
) -> Defended:
    """One baseline at the rate that ``choose_lr`` finds on held-out clean images alone.

    ``heldout`` [M, 3, H, W] with ``heldout_labels`` [M]; ``head_of`` gives a model's own class
    embeddings (text towers change too). Checkpoints lie in ``work``; the suspected model stays as
    it is. Raises ``BatchError`` for fewer pairs than a batch, and ``TrainingError`` for a loss that
    is not finite.
    """
    section: BaselineTraining = getattr(settings, name)
    logs: dict[float, Log] = {}

    def accuracy(clip: Clip) -> float:
        rate = clean_accuracy(embed_images(clip, heldout), head_of(clip), heldout_labels)
        return distributed.from_first(rate.value)

    def run_at(lr: float) -> tuple[Clip, float]:
        checkpoint = work / f"{name}-{lr:g}.safetensors"
        run = trained(name, suspected, pairs, settings, lr, seed, checkpoint)
        logs[lr] = run.log
        return run.clip, accuracy(run.clip)

    before = accuracy(suspected)
    lowest = before - settings.allowed_ca_drop_points
    clip, lr, qualified, tried = choose_lr(section.lrs, run_at, lowest)
    log = [{"lr": rate, **row} for rate, rows in logs.items() for row in rows]
    seen = section.steps * section.batch * len(logs)
    return Defended(clip, lr, qualified, tried, before, log, seen)
