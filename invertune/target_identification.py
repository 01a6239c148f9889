"""Step 1: which class is the backdoor's target? (paper, section 3.1)

Universal adversarial perturbations of several kinds, none of them told a target, show where the
suspected model's predictions go. A clean model has sink classes as strong as a target, so the top
candidates are re-ranked by a short trigger inversion: a target needs a small mask, and hardly any
image resists the perturbation that found it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from invertune.advclip import generated_patch
from invertune.metrics import predicted_counts
from invertune.models import Clip, embed_images, frozen_copy
from invertune.perturbations import View, fourier_wave, perturb, universal_ball, universal_patch
from invertune.sections import Identification, Inversion
from invertune.trigger_inversion import InvertedTrigger, Run, invert_triggers

MAKERS: Mapping[str, Callable[[View, Identification, int], Tensor]] = {
    "patch_feature": lambda view, own, seed: universal_patch(view, view.features, own, seed),
    "patch_prediction": lambda view, own, seed: universal_patch(view, view.texts, own, seed),
    "ball_feature": lambda view, own, seed: universal_ball(view, view.features, own, seed),
    "ball_prediction": lambda view, own, seed: universal_ball(view, view.texts, own, seed),
    "generator": generated_patch,
    "fourier": fourier_wave,
}


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

    ``scores`` are mask sizes (L1) at the ASR floor, infinite where that was never reached;
    ``perturbations`` holds each kind's tensor (a patch [3, p, p] or a ball [3, H, W]).
    """

    ranking: tuple[int, ...]
    scores: tuple[float, ...]
    asrs: tuple[float, ...]
    increases: dict[str, Increase]
    perturbations: dict[str, Tensor]


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
    view = View(suspect, images, clean, head[predicted])
    perturbations: dict[str, Tensor] = {}
    increases: dict[str, Increase] = {}
    before = predicted.cpu().bincount(minlength=len(head))
    for kind in settings.kinds:
        perturbations[kind] = MAKERS[kind](view, settings, seed)
        moved = embed_images(suspect, images, change=partial(perturb, kind, perturbations[kind]))
        increases[kind] = Increase(before, predicted_counts(moved, head))
    gains = largest_increases(increases)
    chosen = gains.topk(settings.candidates).indices.tolist()
    short = {"steps": settings.check_steps, "lr": settings.check_lr, "emb_reference": "clean"}
    check = inversion.model_copy(update=short)
    runs = [Run.of(target, check) for target in chosen]
    tried = invert_triggers(clip, images, heldout, head, runs, check, seed)
    order = sorted(range(len(chosen)), key=lambda i: evidence(tried[i], gains[chosen[i]].item()))
    return Identified(
        tuple(chosen[i] for i in order),
        tuple(tried[i].mask_l1_at_equal_asr for i in order),
        tuple(tried[i].kept.inverted_asr for i in order),
        increases,
        perturbations,
    )


def evidence(trigger: InvertedTrigger, increase: float) -> tuple[float, float]:
    """Sort key of a candidate, smallest first; ``increase`` is its largest one, in points.

    Mask L1 at the ASR floor times 100 minus the increase (``weighted_mask``); then
    (where that ASR was never reached) the highest ASR. The mask alone would favor natural sinks
    over triggers that cover the image: a faint wave needs a larger mask than a patch.
    """
    return weighted_mask(trigger.mask_l1_at_equal_asr, increase), -trigger.kept.inverted_asr


def weighted_mask(mask_l1: float, increase: float) -> float:
    """The score: mask L1 at the ASR floor times 100 minus the class's largest ``increase`` in
    points, which counts as at least 1. Small for a target.
    """
    return mask_l1 * max(100 - increase, 1.0)


def strongest(increases: Mapping[str, Increase]) -> str:
    """The kind of perturbation that drives any class most (Tables 6-11)."""
    return max(increases, key=lambda kind: float(increases[kind].points.max()))


def largest_increases(increases: Mapping[str, Increase]) -> Tensor:
    """Each class's largest increase [C] over the kinds of perturbation, in points."""
    return torch.stack([i.points for i in increases.values()]).amax(0)


def ranked_increases(
    increase: Increase, names: Sequence[str], count: int = 20
) -> list[tuple[str, int, int, float]]:
    """Rows of Tables 6-11: class, clean count, adversarial count, increase in points."""
    order = increase.points.topk(count).indices.tolist()
    return [
        (names[i], int(increase.clean[i]), int(increase.adversarial[i]), float(increase.points[i]))
        for i in order
    ]
