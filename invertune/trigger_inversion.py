"""Step 2: invert the trigger, a mask and a pattern, from the target's text embedding alone.

Algorithm 1 and equations 2-7 of the paper. K runs (candidate targets, or other loss weights) share
one pass: they see the same images, start from the same random trigger, and never mix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from invertune import triggers
from invertune.kernels import ssim_statistics
from invertune.losses import align_loss, emb_loss, similarity_loss, sparsity_loss
from invertune.metrics import attack_success_rate
from invertune.models import Clip, embed_images, frozen_copy, image_features, to_pixels
from invertune.prefetch import with_rows
from invertune.sampling import batch_indices, generator
from invertune.sections import Inversion
from invertune.terminal import progress
from invertune.training import Log, TrainingError

LOG_EVERY = 5
TERMS = ("align", "emb", "sim", "mask", "loss")
# SSIM statistics are kept for the whole pool only where its images, as floats, stay below this.
POOL_LIMIT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Run:
    """One inversion: the class index of its target and the four loss weights of eq. 7."""

    target: int
    lambda1: float
    lambda2: float
    lambda3: float
    lambda4: float

    @classmethod
    def of(cls, target: int, settings: Inversion) -> Run:
        """The run towards ``target`` with the weights of ``settings``."""
        return cls(target, settings.lambda1, settings.lambda2, settings.lambda3, settings.lambda4)


@dataclass(frozen=True)
class State:
    """What was measured after ``step`` updates: ASR in percent on held-out images, mask L1."""

    step: int
    inverted_asr: float
    mask_l1: float


@dataclass(frozen=True)
class InvertedTrigger:
    """The best state of one run.

    ``mask`` and ``pattern`` are float32 [3, H, W] in [0, 1]. Of the measured ``states`` whose ASR
    is at least the settings' floor the ``kept`` one has the smallest mask L1, the
    ``mask_l1_at_equal_asr``; where there is none (then that is infinite), the highest ASR. ``log``
    has a row per 5 steps, as in ``TERMS``.
    """

    run: Run
    mask: Tensor
    pattern: Tensor
    kept: State
    mask_l1_at_equal_asr: float
    states: tuple[State, ...]
    log: tuple[dict[str, float], ...]


def invert_triggers(
    clip: Clip,
    images: Tensor,
    heldout: Tensor,
    head: Tensor,
    runs: Sequence[Run],
    settings: Inversion,
    seed: int,
    target_features: Tensor | None = None,
    heldout_labels: Tensor | None = None,
) -> list[InvertedTrigger]:
    """Inverts one trigger per run, all together (algorithm 1); every run draws alike.

    ``images`` and ``heldout`` are uint8 or float in [0, 1], [N, 3, H, W]; ``head`` [C, D] holds
    unit class embeddings. The loss weights come from ``runs``, all else from ``settings``.
    ``target_features`` [D] (or [K, D], one per run) is the mean feature of target-class images,
    needed by ``emb_reference: target_image`` only. Held-out images whose ``heldout_labels`` [N]
    equal a run's target do not count in its ASR. The network itself is not touched. Raises
    ``ValueError`` for unusable inputs and ``TrainingError`` at the first loss not finite.
    """
    _check(clip, images, heldout, head, runs)
    clip = frozen_copy(clip)
    labels = torch.full((len(heldout),), -1) if heldout_labels is None else heldout_labels
    head = head.to(clip.device)
    count, batch = len(images), settings.batch
    indices = [batch_indices(count, batch, seed, step) for step in range(settings.steps)]
    asr = partial(inverted_asr, clip, heldout, labels, head)
    reference = _reference(clip, images, indices, settings, target_features)
    targets = torch.tensor([run.target for run in runs], device=clip.device)
    terms_at = _terms_at(clip, images, indices, reference, head, targets, settings)
    return _optimize(clip, terms_at, asr, runs, settings, seed)


def inverted_asr(
    clip: Clip,
    heldout: Tensor,
    labels: Tensor,
    head: Tensor,
    mask: Tensor,
    pattern: Tensor,
    target: int,
) -> float:
    """ASR in percent of a trigger ([3, H, W] each, in [0, 1]) on ``heldout`` images.

    Images whose ``labels`` [N] equal ``target`` are left out; the other arguments are those of
    ``invert_triggers``.
    """
    stamp = partial(triggers.compose, mask=mask, pattern=pattern)
    features = embed_images(clip, heldout, change=stamp)
    return attack_success_rate(features, head, labels, target).value


def pattern_bounds(clip: Clip, clamp: str) -> tuple[Tensor, Tensor]:
    """Lowest and highest pattern values in normalized space, [1, 3, 1, 1] or [1, 1, 1, 1].

    "per_channel": what black and white become in each channel. "scalar": the widest of these for
    all channels, as algorithm 1, line 27 has it: [-1.7922, 2.1461] for OpenAI's mean and std.
    """
    low, high = -clip.mean / clip.std, (1 - clip.mean) / clip.std
    if clamp == "scalar":
        return low.amin(1, keepdim=True), high.amax(1, keepdim=True)
    return low, high


def initial_trigger(clip: Clip, settings: Inversion, seed: int) -> tuple[Tensor, Tensor]:
    """The first mask in [0, 1] and pattern in normalized space, [3, H, W], from ``seed`` alone.

    A mask that all channels share is [1, H, W].
    """
    shape = (3, clip.image_size, clip.image_size)
    source = generator(seed)
    mask, draw = (torch.rand(shape, generator=source).to(clip.device) for _ in range(2))
    low, high = pattern_bounds(clip, settings.clamp)
    pattern = torch.lerp(low[0].expand(shape), high[0].expand(shape), draw)
    mask = mask[:1] if settings.mask == "shared" else mask
    return (torch.ones_like(mask) if settings.mask_init == "ones" else mask), pattern


def _reference(
    clip: Clip,
    images: Tensor,
    indices: Sequence[Tensor],
    settings: Inversion,
    target_features: Tensor | None,
) -> Tensor:
    """What eq. 4 compares to: the target's features [1 or K, 1, D], or those of the pool [N, D].

    A clean image is embedded once however often it is drawn, and not at all if it never is.
    """
    if settings.emb_reference == "target_image":
        if target_features is None:
            raise ValueError("emb_reference is target_image: pass the target_features")
        features = F.normalize(target_features.to(clip.device), dim=-1)
        return features.view(-1, 1, features.shape[-1])
    used = torch.cat(list(indices)).unique()
    found = torch.cat([embed_images(clip, images[i.to(images.device)]) for i in used.split(256)])
    features = found.new_zeros(len(images), found.shape[1])
    return features.index_copy_(0, used.to(clip.device), found)


def _terms_at(
    clip: Clip,
    images: Tensor,
    indices: Sequence[Tensor],
    reference: Tensor,
    head: Tensor,
    targets: Tensor,
    settings: Inversion,
) -> Callable[[int, Tensor, Tensor], Tensor]:
    """(step, mask, pattern) -> the four loss terms of every run, [4, K], in the order of eq. 7."""
    pool = None
    if images.numel() * 4 <= POOL_LIMIT_BYTES:
        pool = ssim_statistics(_compared(clip, to_pixels(images, clip.device), settings))
    batches = with_rows(images, indices.__getitem__, clip.device)

    def at(step: int, mask: Tensor, pattern: Tensor) -> Tensor:
        batch, index = batches(step)
        pixels = to_pixels(batch, clip.device)
        compared = _compared(clip, pixels, settings)
        statistics = pool.take(index) if pool else ssim_statistics(compared)
        pattern = pattern * clip.std + clip.mean
        tilde = triggers.compose(pixels, mask[:, None], pattern[:, None])
        features = image_features(clip, tilde.flatten(0, 1)).unflatten(0, tilde.shape[:2])
        return torch.stack(
            [
                align_loss(features, head, targets, settings.temperature),
                emb_loss(features, reference[index] if reference.ndim == 2 else reference),
                similarity_loss(_compared(clip, tilde, settings), compared, statistics),
                sparsity_loss(mask),
            ]
        )

    return at


def _compared(clip: Clip, pixels: Tensor, settings: Inversion) -> Tensor:
    """Images as SSIM sees them; in normalized space the data range stays 1, as released."""
    return (pixels - clip.mean) / clip.std if settings.ssim_space == "normalized" else pixels


def _check(clip: Clip, images: Tensor, heldout: Tensor, head: Tensor, runs: Sequence[Run]) -> None:
    shape = (3, clip.image_size, clip.image_size)
    for name, given in (("images", images), ("heldout", heldout)):
        if given.shape[1:] != shape:
            raise ValueError(f"{name} are {tuple(given.shape)}, not [N, 3, {shape[1]}, {shape[2]}]")
    if not runs:
        raise ValueError("no runs: name at least one target")
    for run in runs:
        if not 0 <= run.target < len(head):
            raise ValueError(f"target {run.target} is no class: the head has 0 to {len(head) - 1}")
    dtype = next(clip.net.parameters()).dtype
    if dtype != torch.float32:
        raise ValueError(f"the weights are {dtype}; inversion needs torch.float32 (net.float())")


def _optimize(
    clip: Clip,
    terms_at: Callable[[int, Tensor, Tensor], Tensor],
    asr: Callable[[Tensor, Tensor, int], float],
    runs: Sequence[Run],
    settings: Inversion,
    seed: int,
) -> list[InvertedTrigger]:
    """The loop of algorithm 1. Independent losses, summed, under Adam: each run as if alone."""
    leaf, pattern = (
        start.expand(len(runs), -1, -1, -1).clone().requires_grad_()
        for start in initial_trigger(clip, settings, seed)
    )
    low, high = pattern_bounds(clip, settings.clamp)
    lambdas = [[run.lambda1, run.lambda2, run.lambda3, run.lambda4] for run in runs]
    weights = torch.tensor(lambdas, device=clip.device).T
    optimizer = torch.optim.Adam([leaf, pattern], lr=settings.lr)
    logs: list[Log] = [[] for _ in runs]
    kept: list[list[tuple[State, Tensor, Tensor]]] = [[] for _ in runs]
    for step in progress(range(settings.steps), "trigger inversion"):
        terms = terms_at(step, leaf.expand(-1, 3, -1, -1), pattern)
        losses = (weights * terms).sum(0)
        if not torch.isfinite(losses).all():
            raise TrainingError(
                f"trigger inversion: the loss is {losses.tolist()} at step {step} "
                f"of {settings.steps}; lower lr (now {settings.lr:g})"
            )
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        with torch.no_grad():
            leaf.clamp_(0, 1)
            pattern.copy_(pattern.clamp(low, high))
        done = step + 1
        if step % LOG_EVERY == 0 or done == settings.steps:
            for log, values in zip(logs, torch.cat([terms, losses[None]]).T.tolist(), strict=True):
                log.append({"step": step, **dict(zip(TERMS, values, strict=True))})
        if done % settings.measure_every_steps == 0 or done == settings.steps:
            masks = leaf.detach().expand(-1, 3, -1, -1).clone()
            pixels = (pattern.detach() * clip.std + clip.mean).clamp(0, 1)
            for k, run in enumerate(runs):
                state = State(done, asr(masks[k], pixels[k], run.target), masks[k].sum().item())
                kept[k].append((state, masks[k], pixels[k]))
    return [_result(run, settings, k, log) for run, k, log in zip(runs, kept, logs, strict=True)]


def _result(
    run: Run,
    settings: Inversion,
    kept: Sequence[tuple[State, Tensor, Tensor]],
    log: Sequence[dict[str, float]],
) -> InvertedTrigger:
    reached = [one for one in kept if one[0].inverted_asr >= settings.asr_floor_percent]
    smallest = min(reached, key=lambda one: one[0].mask_l1, default=None)
    best, mask, pattern = smallest or max(kept, key=lambda one: one[0].inverted_asr)
    return InvertedTrigger(
        run,
        mask,
        pattern,
        best,
        best.mask_l1 if reached else math.inf,
        tuple(state for state, _, _ in kept),
        tuple(log),
    )
