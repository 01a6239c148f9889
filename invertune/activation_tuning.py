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
    locate,
    prefix_to,
    rows_to_train,
    tail_from,
    train_only,
)
from invertune.losses import Objective, tuning_objective
from invertune.metrics import attack_success_rate, clean_accuracy, predictions
from invertune.models import Clip, clone, embed_images, set_state, to_pixels
from invertune.sections import Tuning
from invertune.training import Recipe, fit, generator
from invertune.triggers import Trigger

TIE_POINTS = 0.5
Measure = Callable[[Clip], tuple[float, float]]


@dataclass(frozen=True)
class State:
    """One measured state: rates in percent on held-out images, losses on the tuning batch.

    ``inverted_asr`` is that of all suspected triggers, within the top ``settings.measure_top``.
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

    ``neurons`` holds a bool mask per critical layer; ``kept`` is the chosen one of the ``states``;
    ``qualified`` is False where every state lost more accuracy than allowed; ``suspected`` is the
    model before tuning (step 0); ``log`` has the losses of every rate.
    """

    clip: Clip
    selection: Selection
    impacts: dict[str, float]
    neurons: dict[str, Tensor]
    kept: State
    qualified: bool
    suspected: State
    states: tuple[State, ...]
    log: list[dict[str, float]]


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
    class embeddings and ``target`` the identified class. Every rate of ``settings.lrs`` is run
    and measured; the returned weights are those of the state that ``choose`` takes, which looks at
    the suspected model, the held-out clean images and the suspected triggers only. A trigger
    succeeds where the target is among the ``settings.measure_top`` nearest classes: it loses the
    first place long before images leave the target's neighborhood. Where the suspected triggers
    still succeed on more than ``settings.widen_above_percent`` of the held-out images, the three
    layers of largest impact are tuned instead, if that leaves less.
    Raises ``ValueError`` for too few images, ``TrainingError`` for a loss that is not finite.
    """
    suspected = clone(clip)
    suspected.net.requires_grad_(False).eval()
    predicted = predictions(embed_images(suspected, images), head)
    diverse = diverse_indices(predicted.cpu(), target, settings.images, seed)
    clean = to_pixels(images[diverse], clip.device)
    triggered = triggers.in_turn(found, clean)
    measurer = partial(
        _measurer, suspected, found, heldout, heldout_labels, head, target, settings.measure_top
    )

    def tuned_by(own: Tuning) -> Tuned:
        return _tune(suspected, clean, triggered, head, measurer, own, seed)

    first = tuned_by(settings)
    if settings.layer_rule == "top3" or first.kept.inverted_asr <= settings.widen_above_percent:
        return first
    wider = tuned_by(settings.model_copy(update={"layer_rule": "top3"}))
    accuracy, allowed = first.suspected.clean_accuracy, settings.allowed_ca_drop_points
    return (first, wider)[choose([first.kept, wider.kept], accuracy, allowed)[0]]


def _tune(
    suspected: Clip,
    clean: Tensor,
    triggered: Tensor,
    head: Tensor,
    measurer: Callable[[str | None], Measure],
    settings: Tuning,
    seed: int,
) -> Tuned:
    """``tune`` with one selection of layers."""
    impacts, selection, neurons = locate(suspected, clean, triggered, settings, seed)
    fixed = settings.trainable == "critical_rows" and settings.bn_mode == "eval"
    first = next(iter(neurons)) if fixed else None  # nothing before it can change
    losses = tuning_objective(suspected, first, clean, triggered, neurons, head, settings, seed)
    measure = measurer(first)
    before = _state(0.0, 0, measure(suspected), losses(suspected, 0))
    rows = rows_to_train(suspected, neurons, settings.trainable)
    runs = [_tune_at(lr, suspected, losses, rows, measure, settings) for lr in settings.lrs]
    measured = [pair for run, _ in runs for pair in run]
    index, qualified = choose(
        [state for state, _ in measured], before.clean_accuracy, settings.allowed_ca_drop_points
    )
    chosen, weights = measured[index]
    purified = clone(suspected)
    purified.net.requires_grad_(True)
    set_state(purified, {**purified.net.state_dict(), **weights})
    return Tuned(
        purified,
        selection,
        impacts,
        neurons,
        chosen,
        qualified,
        before,
        tuple(s for s, _ in measured),
        [r for _, log in runs for r in log],
    )


def choose(
    states: Sequence[State], suspected_accuracy: float, allowed_drop: float
) -> tuple[int, bool]:
    """Index of the state to keep, and whether any state qualified.

    A state qualifies with a held-out clean accuracy at most ``allowed_drop`` points below the
    suspected model's. Among those the lowest inverted ASR wins; of the states within half a point
    of it, the one with the highest clean accuracy, then the earliest. If none qualifies: the
    highest clean accuracy of all.
    """
    qualified = [
        i for i, s in enumerate(states) if s.clean_accuracy >= suspected_accuracy - allowed_drop
    ]
    if not qualified:
        return max(range(len(states)), key=lambda i: states[i].clean_accuracy), False
    lowest = min(states[i].inverted_asr for i in qualified)
    tied = [i for i in qualified if states[i].inverted_asr <= lowest + TIE_POINTS]
    return max(tied, key=lambda i: states[i].clean_accuracy), True


def diverse_indices(predicted: Tensor, target: int, count: int, seed: int) -> Tensor:
    """``count`` seeded indices of images, in turn over the ``predicted`` classes [N].

    Images predicted as the ``target`` are never taken. Raises ``ValueError`` if too few are left.
    """
    order = torch.randperm(len(predicted), generator=generator(seed))
    order = order[predicted[order] != target]
    if len(order) < count:
        raise ValueError(
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
    top: int,
    first: str | None,
) -> Measure:
    """Function from a tuned model to its held-out clean accuracy and inverted ASR, in percent."""
    others = labels != target
    prefix = prefix_to(suspected, first)
    clean = batched_inputs(prefix, heldout, suspected.device)
    triggered = batched_inputs(
        lambda pixels: prefix(triggers.in_turn(found, pixels)), heldout[others], suspected.device
    )

    @torch.no_grad()
    def measure(clip: Clip) -> tuple[float, float]:
        visual, tail = clip.net.get_submodule("visual"), tail_from(clip, first)
        training = visual.training
        visual.eval()
        features, attacked = (
            torch.cat([tail(x)[0] for x in inputs()]) for inputs in (clean, triggered)
        )
        visual.train(training)
        return (
            clean_accuracy(features, head, labels).value,
            attack_success_rate(attacked, head, labels[others], target, top).value,
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
) -> tuple[list[tuple[State, dict[str, Tensor]]], list[dict[str, float]]]:
    """Phase 3 at one rate: each measured state with the tensors it changed, and the log."""
    original, tuned = suspected.net.state_dict(), clone(suspected)
    tuned.net.get_submodule("visual").train(settings.bn_mode == "train")
    train_only(tuned.net, rows)
    measured = []

    def record(step: int, terms: Mapping[str, Tensor]) -> None:
        changed = {
            name: tensor.cpu().clone()
            for name, tensor in tuned.net.state_dict().items()
            if not torch.equal(tensor, original[name])
        }
        measured.append((_state(lr, step, measure(tuned), terms), changed))

    def loss_at(step: int) -> dict[str, Tensor]:
        terms = losses(tuned, step)
        if step > 0 and step % settings.measure_every_steps == 0:
            record(step, terms)
        return terms

    recipe = Recipe(settings.steps, lr, weight_decay=0.0, schedule="constant")
    log = fit(tuned.net, loss_at, recipe, label=f"tuning at {lr:g}")
    with torch.no_grad():
        record(settings.steps, losses(tuned, settings.steps))
    return measured, [{"lr": lr, **row} for row in log]
