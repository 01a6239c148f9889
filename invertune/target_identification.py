"""Step 1: which class is the backdoor's target? (paper, section 3.1)

Universal adversarial perturbations of several kinds, none of them told a target, show where the
suspected model's predictions go. A clean model has sink classes as strong as a target, so the top
candidates are re-ranked by a short trigger inversion: the target needs the smallest mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from invertune import triggers
from invertune.advclip import generated_patch
from invertune.kernels import frozen_copy
from invertune.metrics import predicted_counts
from invertune.models import Clip, embed_images, image_features, to_pixels
from invertune.settings import Identification, Inversion
from invertune.training import batch_indices, generator, progress
from invertune.trigger_inversion import InvertedTrigger, Run, invert_triggers

Perturb = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Increase:
    """What one perturbation does: predicted counts per class [C], and the increase in points."""

    clean: Tensor
    adversarial: Tensor

    @property
    def points(self) -> Tensor:
        """(P_adv - P_clean) [C] in percentage points (eq. 1)."""
        return 100 * (self.adversarial - self.clean).double() / self.clean.sum()


@dataclass(frozen=True)
class Identified:
    """The ranking: candidate classes, best first, with the evidence for each.

    ``scores`` are mask sizes (L1) at equal ASR, infinite where the short inversion never got there;
    ``perturbations`` holds each kind's tensor (a patch [3, p, p] or a ball [3, H, W]).
    """

    ranking: tuple[int, ...]
    scores: tuple[float, ...]
    asrs: tuple[float, ...]
    increases: dict[str, Increase]
    perturbations: dict[str, Tensor]

    @property
    def target(self) -> int:
        return self.ranking[0]


def identify(
    clip: Clip,
    images: Tensor,
    heldout: Tensor,
    head: Tensor,
    settings: Identification,
    inversion: Inversion,
    seed: int,
) -> Identified:
    """Finds the target of a suspected model from clean images alone.

    ``images`` and ``heldout`` are uint8 [N, 3, H, W], ``head`` [C, D] the class embeddings.
    """
    suspect = frozen_copy(clip)
    clean = embed_images(suspect, images)
    predicted = (clean @ head.T).argmax(1)
    perturbations: dict[str, Tensor] = {}
    increases: dict[str, Increase] = {}
    for kind in settings.kinds:
        tensor = MAKERS[kind](suspect, images, clean, head[predicted], settings, seed)
        perturb = as_function(kind, tensor, clip.image_size)
        perturbations[kind] = tensor
        increases[kind] = measure(suspect, images, predicted, head, perturb)
    chosen = candidates(increases, settings.candidates)
    check = inversion.model_copy(update={"steps": settings.check_steps, "lr": settings.check_lr})
    runs = [Run.of(target, check) for target in chosen]
    tried = invert_triggers(clip, images, heldout, head, runs, check, seed)
    order = sorted(range(len(chosen)), key=lambda i: evidence(tried[i]))
    return Identified(
        tuple(chosen[i] for i in order),
        tuple(tried[i].mask_l1_at_equal_asr for i in order),
        tuple(tried[i].inverted_asr for i in order),
        increases,
        perturbations,
    )


def evidence(trigger: InvertedTrigger) -> tuple[float, float]:
    """Sort key of a candidate: mask L1 at equal ASR, then (where never reached) the highest ASR."""
    return trigger.mask_l1_at_equal_asr, -trigger.inverted_asr


def candidates(increases: Mapping[str, Increase], count: int) -> list[int]:
    """The ``count`` classes of the largest increase over all kinds, largest first."""
    largest = torch.stack([i.points for i in increases.values()]).amax(0)
    return largest.topk(count).indices.tolist()


def measure(
    clip: Clip, images: Tensor, predicted: Tensor, head: Tensor, perturb: Perturb
) -> Increase:
    """Predicted class counts before and after a perturbation (Tables 6-11)."""
    features = [
        embed_images(clip, perturb(to_pixels(part, clip.device))) for part in images.split(256)
    ]
    adversarial = predicted_counts(torch.cat(features), head)
    return Increase(predicted.bincount(minlength=len(head)), adversarial)


def paste(images: Tensor, patch: Tensor) -> Tensor:
    """Places ``patch`` [3, p, p] where the released code does: 14 of 224 px from the corner."""
    size = images.shape[-1]
    start = size - round(size * 14 / 224) - patch.shape[-1]
    return triggers.paste(images, patch, start, start)


def as_function(kind: str, tensor: Tensor, size: int) -> Perturb:
    """The perturbation ``tensor`` as a function of images in [0, 1]."""
    if kind.startswith("ball"):
        return lambda images: triggers.add(images, tensor)
    return lambda images: paste(images, tensor)


def feature_objective(features: Tensor, clean: Tensor, texts: Tensor) -> Tensor:
    """Cosine to the clean image's own features: minimized, it moves the features away."""
    return (features * clean).sum(1).mean()


def prediction_objective(features: Tensor, clean: Tensor, texts: Tensor) -> Tensor:
    """Cosine to the text of the model's own prediction: minimized, it changes predictions."""
    return (features * texts).sum(1).mean()


def universal_patch(
    objective: Callable[[Tensor, Tensor, Tensor], Tensor],
    clip: Clip,
    images: Tensor,
    clean: Tensor,
    texts: Tensor,
    settings: Identification,
    seed: int,
) -> Tensor:
    """A directly optimized patch [3, p, p] in [0, 1] that minimizes ``objective``."""
    side = settings.patch_px
    start = torch.rand(3, side, side, generator=generator(seed, 3))
    return _optimize(
        start, settings.lr, 0, 1, paste, objective, clip, images, clean, texts, settings, seed
    )


def universal_ball(
    objective: Callable[[Tensor, Tensor, Tensor], Tensor],
    clip: Clip,
    images: Tensor,
    clean: Tensor,
    texts: Tensor,
    settings: Identification,
    seed: int,
) -> Tensor:
    """An additive perturbation [3, H, W] of at most ``ball_radius`` that minimizes it."""
    radius = settings.ball_radius
    start = torch.rand(3, clip.image_size, clip.image_size, generator=generator(seed, 4))

    return _optimize(
        (2 * start - 1) * radius,
        settings.lr * radius,
        -radius,
        radius,
        triggers.add,
        objective,
        clip,
        images,
        clean,
        texts,
        settings,
        seed,
    )


def _optimize(
    start: Tensor,
    lr: float,
    low: float,
    high: float,
    place: Callable[[Tensor, Tensor], Tensor],
    objective: Callable[[Tensor, Tensor, Tensor], Tensor],
    clip: Clip,
    images: Tensor,
    clean: Tensor,
    texts: Tensor,
    settings: Identification,
    seed: int,
) -> Tensor:
    tensor = start.to(clip.device).requires_grad_(True)
    optimizer = torch.optim.Adam([tensor], lr=lr)
    for step in progress(range(settings.steps), "universal perturbation"):
        rows = batch_indices(len(images), settings.batch, seed, step)
        features = image_features(clip, place(to_pixels(images[rows], clip.device), tensor))
        optimizer.zero_grad()
        objective(features, clean[rows], texts[rows]).backward()
        optimizer.step()
        with torch.no_grad():
            tensor.clamp_(low, high)
    return tensor.detach()


def _generated(
    clip: Clip, images: Tensor, clean: Tensor, texts: Tensor, settings: Identification, seed: int
) -> Tensor:
    return generated_patch(clip, images, clean, texts, paste, settings, seed)


def _directly(
    make: Callable[..., Tensor], objective: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Callable[..., Tensor]:
    return lambda *arguments: make(objective, *arguments)


MAKERS: Mapping[str, Callable[..., Tensor]] = {
    "patch_feature": _directly(universal_patch, feature_objective),
    "patch_prediction": _directly(universal_patch, prediction_objective),
    "ball_feature": _directly(universal_ball, feature_objective),
    "ball_prediction": _directly(universal_ball, prediction_objective),
    "generator": _generated,
}


def ranked_increases(
    increase: Increase, names: Sequence[str], count: int = 20
) -> list[tuple[str, int, int, float]]:
    """Rows of Tables 6-11: class, clean count, adversarial count, increase in points."""
    order = increase.points.topk(count).indices.tolist()
    return [
        (names[i], int(increase.clean[i]), int(increase.adversarial[i]), float(increase.points[i]))
        for i in order
    ]
