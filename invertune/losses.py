"""The loss terms of inversion (section 3.2), tuning (3.3) and the baselines, a function each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from invertune.kernels import SsimStatistics, ssim_with


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


def in_modal_loss(
    images: Tensor, other_images: Tensor, texts: Tensor, other_texts: Tensor, logit_scale: Tensor
) -> Tensor:
    """CleanCLIP's self-supervision: each image and text finds its own augmented version.

    Unit features [N, D] of the originals and of their augmented versions. Mean of two one-way
    cross-entropies (rows: originals, columns: augmented) at the model's logit scale.
    """
    scale = logit_scale.exp()
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
    return F.cross_entropy(logit_scale.exp() * logits, labels)


def feature_distance(features: Tensor, original: Tensor) -> Tensor:
    """PAR: mean squared L2 between unit features [N, D], in 0..4; 2 where they are orthogonal."""
    return (features - original.detach()).square().sum(1).mean()


def cut_off(distance: Tensor, limit: float) -> Tensor:
    """PAR: the ``distance``, or 0 without a gradient once it exceeds ``limit``."""
    return torch.where(distance > limit, torch.zeros_like(distance), distance)
