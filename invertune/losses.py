"""The loss terms of inversion (section 3.2), tuning (3.3) and the baselines, a function each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from invertune.activations import batched_inputs, maps_from, prefix_to, tail_from, unit_mask
from invertune.kernels import SsimStatistics, ssim_with
from invertune.models import Clip
from invertune.sections import Tuning
from invertune.training import MAX_LOGIT_SCALE, batch_indices

Objective = Callable[[Clip, int], dict[str, Tensor]]


def align_loss(features: Tensor, head: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Cross-modal alignment [K] (eq. 3): cross-entropy over all classes, mean over images.

    ``features`` [K, B, D] and ``head`` [N, D] are unit vectors, ``targets`` [K] class indices.
    """
    logits = features @ head.T / temperature
    wanted = targets[:, None].expand(logits.shape[:2])
    return F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").mean(1)


def emb_loss(features: Tensor, reference: Tensor) -> Tensor:
    """Embedding preservation [K] (eq. 4): mean over images of the L2 distance, not squared.

    ``features`` [K, B, D] unit vectors; ``reference`` unit vectors that broadcast to them.
    """
    return torch.linalg.vector_norm(features - reference, dim=-1).mean(-1)


def similarity_loss(images_tilde: Tensor, images: Tensor, statistics: SsimStatistics) -> Tensor:
    """Visual similarity [K] (eq. 5): mean over images of 1 - SSIM.

    ``images_tilde`` [K, B, 3, H, W], ``images`` [B, 3, H, W] and their ``statistics``.
    """
    return 1 - ssim_with(images_tilde, images, statistics).mean(1)


def sparsity_loss(mask: Tensor) -> Tensor:
    """Trigger sparsity [K] (eq. 6): the sum of |m| over ``mask`` [K, 3, H, W]."""
    return mask.abs().sum((1, 2, 3))


def activation_loss(
    original: Mapping[str, Tensor],
    triggered: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    reduction: str = "mean",
) -> Tensor:
    """Eq. 9, summed over layers: squared distance at the critical units, mean over images.

    ``original`` [N, *map] are the suspected model's activations of the clean images, detached;
    ``masks`` are bool maps. Over a layer's critical units: the mean, or with ``reduction`` "sum"
    the sum (the paper's literal form, which weighs a layer by its size).
    """
    total = torch.zeros((), device=next(iter(triggered.values())).device)
    for layer, mask in masks.items():
        summed = ((original[layer].detach() - triggered[layer]).square() * mask).sum()
        total = total + summed / len(triggered[layer]) / (mask.sum() if reduction == "mean" else 1)
    return total


def align_ratio_loss(
    clean: Mapping[str, Tensor], triggered: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> Tensor:
    """The released code's alignment: ||(mean a_c - mean a_t) M|| / ||mean a_c M||, over layers.

    Means are over the batch, and ``clean`` [N, *map] belongs to the model that is being tuned.
    """
    total = torch.zeros((), device=next(iter(triggered.values())).device)
    for layer, mask in masks.items():
        reference = clean[layer].mean(0) * mask
        distance = (reference - triggered[layer].mean(0) * mask).norm()
        total = total + distance / reference.norm().clamp_min(1e-12)
    return total


def preserve_loss(features: Tensor, original: Tensor, head: Tensor) -> Tensor:
    """Eq. 10: mean over images of the sum over all classes of squared cosine differences.

    ``features`` and ``original`` [N, D] are unit features of the clean images under the tuned and
    the suspected model; ``head`` [C, D] holds the unit class embeddings.
    """
    return ((features - original.detach()) @ head.T).square().sum(1).mean()


def preserve_feature_loss(features: Tensor, original: Tensor) -> Tensor:
    """The released code's preservation: Frobenius norm of the unit-feature difference [N, D]."""
    return (features - original.detach()).norm()


def tuning_objective(
    suspected: Clip,
    first: str | None,
    clean: Tensor,
    triggered: Tensor,
    neurons: Mapping[str, Tensor],
    head: Tensor,
    settings: Tuning,
    seed: int,
) -> Objective:
    """Eq. 11 with its two terms, on the batch of a step; what all steps share is computed once.

    ``clean`` and ``triggered`` are the tuning images [N, 3, H, W] in [0, 1]; nothing before layer
    ``first`` can change; ``neurons`` holds a bool mask per critical layer, ``head`` [C, D] the unit
    class embeddings. Of the triggered images no activation after the last critical layer is needed,
    but batch statistics, where they are trained, are those of whole forward passes.
    """
    last = list(neurons)[-1] if settings.bn_mode == "eval" else None
    prefix = prefix_to(suspected, first)
    clean, triggered = (
        torch.cat(list(batched_inputs(prefix, images, suspected.device)()))
        for images in (clean, triggered)
    )
    with torch.no_grad():
        unchanged, maps = tail_from(suspected, first)(clean)
    original = {layer: maps[layer] for layer in neurons}
    masks = {layer: unit_mask(m, maps[layer].shape[1:]) for layer, m in neurons.items()}
    del maps  # of layers that are not critical

    def losses(clip: Clip, step: int) -> dict[str, Tensor]:
        rows = batch_indices(len(clean), settings.batch, seed, step)
        features, own = tail_from(clip, first)(clean[rows])
        attacked = maps_from(clip, first, last)(triggered[rows])
        if settings.align_form == "ratio":
            activation = align_ratio_loss(own, attacked, masks)
        else:
            drawn = {layer: map_[rows] for layer, map_ in original.items()}
            activation = activation_loss(drawn, attacked, masks, settings.reduction)
        if settings.preserve_form == "feature":
            preserve = preserve_feature_loss(features, unchanged[rows])
        else:
            preserve = preserve_loss(features, unchanged[rows], head)
        loss = activation + settings.beta * preserve
        return {"loss": loss, "activation": activation, "preserve": preserve}

    return losses


def in_modal_loss(
    images: Tensor, other_images: Tensor, texts: Tensor, other_texts: Tensor, logit_scale: Tensor
) -> Tensor:
    """CleanCLIP's self-supervision: each image and text finds its own augmented version.

    Unit features [N, D] of the originals and of their augmented versions. Mean of two one-way
    cross-entropies (rows: originals, columns: augmented) at the model's logit scale.
    """
    scale = logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
    labels = torch.arange(len(images), device=images.device)
    image = F.cross_entropy(scale * images @ other_images.T, labels)
    return (image + F.cross_entropy(scale * texts @ other_texts.T, labels)) / 2


def sub_caption_loss(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """CleanerCLIP: an image is nearer to its positive sub-caption than to its counterfactuals.

    Unit features: ``images`` [M, D]; ``texts`` [M, 1 + K, D], the positive first. Cross-entropy at
    the model's logit scale, 0 for M = 0.
    """
    if len(images) == 0:
        return images.sum()
    logits = (texts @ images[:, :, None]).squeeze(2)
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    return F.cross_entropy(logit_scale.clamp(max=MAX_LOGIT_SCALE).exp() * logits, labels)


def feature_distance(features: Tensor, original: Tensor) -> Tensor:
    """PAR: mean squared L2 between unit features [N, D], in 0..4; 2 where they are orthogonal."""
    return (features - original.detach()).square().sum(1).mean()


def cut_off(distance: Tensor, limit: float) -> Tensor:
    """PAR: the ``distance``, or 0 without a gradient once it exceeds ``limit``."""
    return torch.where(distance > limit, torch.zeros_like(distance), distance)
