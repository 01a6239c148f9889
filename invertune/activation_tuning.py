"""Step 3: retrain only the neurons that answer to the inverted trigger.

Paper, section 3.3, algorithm 2. Images are [N, 3, H, W], uint8 or float32 in [0, 1]; activation
maps are those of ``invertune.activations``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from invertune import triggers
from invertune.activations import (
    Selection,
    batched_inputs,
    impacts_of,
    in_batches,
    locate,
    maps_from,
    prefix_to,
    rows_to_train,
    tail_from,
    train_only,
    unit_mask,
)
from invertune.losses import activation_loss, align_ratio_loss, preserve_feature_loss, preserve_loss
from invertune.metrics import attack_success_rate, clean_accuracy, predictions
from invertune.models import Clip, clone, embed_images, to_pixels
from invertune.sampling import BatchError, batch_indices, generator
from invertune.sections import Tuning
from invertune.training import Log, Recipe, choose_lr, fit
from invertune.triggers import Trigger

Measure = Callable[[Clip], tuple[float, float]]
Objective = Callable[[Clip, int], dict[str, Tensor]]


@dataclass(frozen=True)
class State:
    """One measured state: rates in percent on held-out images, losses on the tuning batch.

    ``inverted_asr`` is that of all suspected triggers in turn.
    """

    lr: float
    step: int
    clean_accuracy: float
    inverted_asr: float
    activation: float
    preserve: float


@dataclass(frozen=True)
class Tuned:
    """The purified ``clip`` and how it came about.

    ``neurons`` holds a bool mask per critical layer; ``kept`` is the last of the ``states`` at the
    chosen rate; ``qualified`` is False where every rate lost more accuracy than allowed;
    ``suspected`` is the model before tuning (step 0); ``log`` has the losses of every rate run.
    """

    clip: Clip
    selection: Selection
    impacts: dict[str, float]
    neurons: dict[str, Tensor]
    kept: State
    qualified: bool
    suspected: State
    states: tuple[State, ...]
    log: Log


def tune(
    clip: Clip,
    images: Tensor,
    found: Sequence[Trigger],
    heldout: Tensor,
    heldout_labels: Tensor,
    head: Tensor,
    target: int,
    settings: Tuning,
    seed: int,
) -> Tuned:
    """Algorithm 2 on a copy of the suspected ``clip``, which stays as it is.

    ``images`` [N, 3, H, W] are unlabeled clean images, of which ``settings.images`` are used;
    ``found`` are the suspected triggers, the inverted one first, which images take in turn;
    ``heldout`` with ``heldout_labels`` [M] are other clean images; ``head`` [C, D] holds the unit
    class embeddings and ``target`` the identified class. The rate is the largest of
    ``settings.lrs`` that keeps the allowed clean accuracy on the held-out images, as for every
    baseline: how far tuning goes does not depend on the suspected triggers, which need not be
    what the attacker planted.
    Raises ``ValueError`` for too few images, ``TrainingError`` for a loss that is not finite.
    """
    suspected = clone(clip)
    suspected.net.requires_grad_(False).eval()
    clean = _diverse_pixels(suspected, images, head, target, settings.images, seed)
    triggered = triggers.in_turn(found, clean)
    impacts, selection, neurons = locate(suspected, clean, triggered, settings, seed)
    fixed = settings.trainable == "critical_rows" and settings.bn_mode == "eval"
    first = next(iter(neurons)) if fixed else None  # nothing before it can change
    losses = tuning_objective(suspected, first, clean, triggered, neurons, head, settings, seed)
    measure = _measurer(suspected, found, heldout, heldout_labels, head, target, first)
    rows = rows_to_train(suspected, neurons, settings.trainable)
    before = _state(0.0, 0, measure(suspected), losses(suspected, 0))
    states: list[State] = []
    log: Log = []

    def run_at(lr: float) -> tuple[Clip, float]:
        tuned, measured, logged = _tune_at(lr, suspected, losses, rows, measure, settings)
        states.extend(measured)
        log.extend({"lr": lr, **row} for row in logged)
        return tuned, measured[-1].clean_accuracy

    lowest = before.clean_accuracy - settings.allowed_ca_drop_points
    tuned, lr, qualified, _ = choose_lr(settings.lrs, run_at, lowest)
    purified = clone(suspected)  # without the gradient hooks of train_only
    purified.net.load_state_dict(tuned.net.state_dict())
    purified.net.requires_grad_(True)
    kept = [state for state in states if state.lr == lr][-1]
    return Tuned(purified, selection, impacts, neurons, kept, qualified, before, tuple(states), log)


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
    prefix = partial(prefix_to, suspected, first=first)
    clean, triggered = (
        torch.cat(list(in_batches(prefix, images, suspected.device)))
        for images in (clean, triggered)
    )
    with torch.no_grad():
        unchanged, maps = tail_from(suspected, clean, first)
    original = {layer: maps[layer] for layer in neurons}
    masks = {layer: unit_mask(m, maps[layer].shape[1:]) for layer, m in neurons.items()}
    del maps  # of layers that are not critical

    def losses(clip: Clip, step: int) -> dict[str, Tensor]:
        rows = batch_indices(len(clean), settings.batch, seed, step)
        features, clean_maps = tail_from(clip, clean[rows], first)
        attacked = maps_from(clip, triggered[rows], first, last)
        if settings.align_form == "ratio":
            activation = align_ratio_loss(clean_maps, attacked, masks)
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


def trigger_impacts(
    clip: Clip, images: Tensor, trigger: Trigger, head: Tensor, target: int, count: int, seed: int
) -> dict[str, float]:
    """Eq. 8 of one ``trigger`` for every candidate layer of ``clip``, on ``count`` diverse images.

    The arguments are those of ``tune``, where images may carry several triggers in turn.
    """
    clean = _diverse_pixels(clip, images, head, target, count, seed)
    return impacts_of(clip, clean, triggers.apply(trigger, clean))[0]


def _diverse_pixels(
    clip: Clip, images: Tensor, head: Tensor, target: int, count: int, seed: int
) -> Tensor:
    """The images of ``diverse_indices``, as ``clip`` predicts them, as pixels on its device."""
    predicted = predictions(embed_images(clip, images), head)
    return to_pixels(images[diverse_indices(predicted.cpu(), target, count, seed)], clip.device)


def diverse_indices(predicted: Tensor, target: int, count: int, seed: int) -> Tensor:
    """``count`` seeded indices of images, in turn over the ``predicted`` classes [N].

    Images predicted as the ``target`` are never taken. Raises ``BatchError`` if too few are left.
    """
    order = torch.randperm(len(predicted), generator=generator(seed))
    order = order[predicted[order] != target]
    if len(order) < count:
        raise BatchError(
            f"tuning.images = {count}, but only {len(order)} clean images are not "
            "predicted as the target class"
        )
    taken: Counter[int] = Counter()
    turns = []
    for label in predicted[order].tolist():
        turns.append(taken[label])
        taken[label] += 1
    return order[torch.tensor(turns).argsort(stable=True)[:count]]


def _measurer(
    suspected: Clip,
    found: Sequence[Trigger],
    heldout: Tensor,
    labels: Tensor,
    head: Tensor,
    target: int,
    first: str | None,
) -> Measure:
    """Function from a tuned model to its held-out clean accuracy and inverted ASR, in percent."""
    others = labels != target
    prefix = partial(prefix_to, suspected, first=first)
    clean = batched_inputs(prefix, heldout, suspected.device)
    triggered = batched_inputs(
        lambda pixels: prefix(triggers.in_turn(found, pixels)), heldout[others], suspected.device
    )

    @torch.no_grad()
    def measure(clip: Clip) -> tuple[float, float]:
        visual = clip.net.get_submodule("visual")
        training = visual.training
        visual.eval()
        features, attacked = (
            torch.cat([tail_from(clip, hidden, first)[0] for hidden in inputs()])
            for inputs in (clean, triggered)
        )
        visual.train(training)
        return (
            clean_accuracy(features, head, labels).value,
            attack_success_rate(attacked, head, labels[others], target).value,
        )

    return measure


def _state(lr: float, step: int, rates: tuple[float, float], terms: Mapping[str, Tensor]) -> State:
    return State(lr, step, *rates, terms["activation"].item(), terms["preserve"].item())


def _tune_at(
    lr: float,
    suspected: Clip,
    losses: Objective,
    rows: Mapping[str, Tensor],
    measure: Measure,
    settings: Tuning,
) -> tuple[Clip, list[State], Log]:
    """Phase 3 at one rate: the tuned model, what was measured on the way, and its losses."""
    tuned, states = clone(suspected), []
    tuned.net.get_submodule("visual").train(settings.bn_mode == "train")
    train_only(tuned.net, rows)

    def loss_at(step: int) -> dict[str, Tensor]:
        terms = losses(tuned, step)
        if step > 0 and step % settings.measure_every_steps == 0:
            states.append(_state(lr, step, measure(tuned), terms))
        return terms

    recipe = Recipe(settings.steps, lr, weight_decay=0.0, schedule="constant")
    log = fit(tuned.net, loss_at, recipe, label=f"tuning at {lr:g}")
    with torch.no_grad():
        last = losses(tuned, settings.steps)
    states.append(_state(lr, settings.steps, measure(tuned), last))
    return tuned, states, log
