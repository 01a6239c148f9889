"""The steps that only ablations need: sweeps of loss weights, a second round, lighter scores.

A changed setting that equals the profile's own finds the main chain's artifact. The other values of
a loss weight run as one batch: they see the same images and share all that is not their own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invertune import metrics, steps, triggers
from invertune.chain import Chain, Model, class_head, pool
from invertune.defenses import defended
from invertune.evaluation import RECALL_KS
from invertune.kernels import ssim_statistics, ssim_with
from invertune.models import embed_images
from invertune.sections import WEIGHTS
from invertune.settings import changed, sweep_values
from invertune.store import Artifact, Made
from invertune.trigger_inversion import Run
from invertune.triggers import Trigger


def with_value(chain: Chain, section: str, name: str, value: Any) -> Chain:
    """The chain with one setting changed; its store is the same, so what is equal is found."""
    return replace(chain, settings=changed(chain.settings, section, name, value))


def swept(chain: Chain, attack: str, seed: int, weight: str) -> Artifact:
    """The triggers inverted with the other values of one loss weight, stacked in their order.

    A step of its own, not K inversions: in a batch a run differs from itself alone by rounding.
    """
    suspect, settings = steps.poisoned(chain, attack, seed), chain.settings
    target = steps.suspected_target(chain, attack, seed)
    values = list(sweep_values(settings, "inversion", weight)[1:])
    base = Run.of(target, settings.inversion)

    def compute(_: Path) -> Made:
        runs = [replace(base, **{weight: value}) for value in values]
        found = steps.invert(chain, suspect, runs, seed)
        parts = {"mask": [r.mask for r in found], "pattern": [r.pattern for r in found]}
        tensors = {name: torch.stack(part) for name, part in parts.items()}
        return {"triggers": tensors}, {"runs": [steps.inversion_metrics(r) for r in found]}

    keyed = {
        **settings.inversion.model_dump(mode="json"),
        weight: values,
        "target": target,
        "images": settings.data.inversion_images,
        "heldout": settings.data.heldout_images,
    }
    return chain.run("sweep", keyed, [suspect.key], compute, seed, f"of {weight} on {attack}")


def inversions(
    chain: Chain, attack: str, seed: int, name: str
) -> list[tuple[Artifact, tuple[Any, ...]]]:
    """Step 2 at every compared value of a setting: artifacts, each with the values that it holds.

    The target is the one that step 1 found with the profile's own settings.
    """
    own, *others = sweep_values(chain.settings, "inversion", name)
    target = steps.suspected_target(chain, attack, seed)
    found = [(steps.inverted(chain, attack, seed, target), (own,))]
    if name in WEIGHTS:
        return [*found, (swept(chain, attack, seed, name), tuple(others))] if others else found
    for value in others:
        other = with_value(chain, "inversion", name, value)
        found.append((steps.inverted(other, attack, seed, target), (value,)))
    return found


@functools.lru_cache(maxsize=128)
def second_round(chain: Chain, attack: str, seed: int) -> Artifact:
    """Steps 2 and 3 once more, on the model that step 3 left; metrics: step 3's, ``inversion``."""
    purified, settings = defended(chain, "invertune", attack, seed), chain.settings
    target = steps.suspected_target(chain, attack, seed)

    def compute(_: Path) -> Made:
        found = steps.invert(chain, purified, [Run.of(target, settings.inversion)], seed)[0]
        again = [triggers.mask_trigger(found.mask, found.pattern)]
        tensors, kept = steps.tune_model(chain, purified, again, target, seed)
        return tensors, {**kept, "inversion": steps.inversion_metrics(found)}

    keyed = {
        "inversion": settings.inversion.model_dump(mode="json"),
        "tuning": settings.tuning.model_dump(mode="json", exclude={"triggers"}),
        "target": target,
        "pool": settings.data.inversion_images,
        "heldout": settings.data.heldout_images,
    }
    return chain.run("second_round", keyed, [purified.key], compute, seed, f"on {attack}")


def found_triggers(chain: Chain, artifact: Artifact) -> list[tuple[Trigger, dict[str, Any]]]:
    """The triggers of one inversion or of one sweep, each with what is kept of it."""
    if "runs" not in artifact.metrics:
        return [(steps.inverted_trigger(chain, artifact), artifact.metrics)]
    stacked = artifact.tensors("triggers")
    pairs = zip(stacked["mask"], stacked["pattern"], strict=True)
    made = [triggers.mask_trigger(m.to(chain.device), t.to(chain.device)) for m, t in pairs]
    return list(zip(made, artifact.metrics["runs"], strict=True))


def scored(
    chain: Chain, model: Model, placed: Sequence[Trigger], source: str, seed: int
) -> Artifact:
    """Zero-shot CA of a model at every k, and per trigger its ASR at every k and mean SSIM.

    ``source`` is the key of the triggers' artifact. The same rates as ``evaluated``, which adds
    retrieval: what an ablation does not need.
    """

    def compute(_: Path) -> Made:
        evaluation, head = pool(chain, "evaluation"), class_head(chain, model.clip)
        clean = embed_images(model.clip, evaluation.images)
        ca = {str(k): metrics.clean_accuracy(clean, head, evaluation.labels, k) for k in RECALL_KS}
        asr, ssim = [], []
        for trigger in placed:
            features, similar = _triggered(model, evaluation.images, trigger)
            rates = {
                str(k): metrics.attack_success_rate(
                    features, head, evaluation.labels, chain.target, k
                )
                for k in RECALL_KS
            }
            asr.append(rates)
            ssim.append(float(similar.mean()))
        return {}, {"ca": ca, "asr": asr, "ssim": ssim}

    keyed = {"target": chain.settings.target, "images": chain.settings.data.evaluation_images}
    keys = [model.key, source]
    return chain.run("scores", keyed, keys, compute, seed, f"of {model.name}")


def _triggered(model: Model, images: Tensor, trigger: Trigger) -> tuple[Tensor, Tensor]:
    """Features [N, D] of the triggered images and their SSIM [N] to the clean ones."""
    similar = []

    def place(clean: Tensor) -> Tensor:
        placed = triggers.apply(trigger, clean)
        similar.append(ssim_with(placed[None], clean, ssim_statistics(clean))[0])
        return placed

    return embed_images(model.clip, images, change=place), torch.cat(similar)
