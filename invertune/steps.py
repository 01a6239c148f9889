"""The steps on disk: each reads its upstream artifacts and leaves one artifact in the store.

    pretrained -> attacked -> identified -> inverted -> tuned

``poisoned`` loads the model that ``attacked`` left, ``invertune.defenses`` the defended ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from invertune import data as datasets
from invertune import triggers
from invertune.activation_tuning import trigger_impacts, tune
from invertune.activations import Selection, critical_layers
from invertune.attacks import ATTACKS, Victim
from invertune.chain import Chain, Model, class_head, class_list, pool, pretrained
from invertune.layouts import DataError
from invertune.models import embed_images
from invertune.perturbations import as_trigger
from invertune.results import natural_order
from invertune.sections import NULLS
from invertune.store import Artifact, Made
from invertune.target_identification import Increase, identify
from invertune.trigger_inversion import InvertedTrigger, Run, invert_triggers
from invertune.triggers import Trigger


@functools.lru_cache(maxsize=128)
def attacked(chain: Chain, attack: str, seed: int) -> Artifact:
    """The poisoned weights, the trigger and the training log of one attack."""
    target = chain.target  # a name that is no class is told before any work
    clean = pretrained(chain)
    settings, attacks = chain.settings, chain.settings.attacks
    section = "badnet" if attack == "clean_finetuned" else attack

    def compute(work: Path) -> Made:
        pairs = datasets.caption_pairs(
            settings.data, "poisoning", settings.data.poisoning_pairs, chain.store
        )
        captions = datasets.target_captions(
            settings.data, target, attacks.target_captions, chain.store
        )
        images = datasets.target_images(settings.data, pairs, target, chain.store)
        datasets.require_captions(settings.data, settings.target, chain.store)
        victim = Victim(clean.clip, pairs, captions, images)
        result = ATTACKS[attack](victim, attacks, seed, work)
        tensors = {"weights": result.clip.net.state_dict()}
        log: dict[str, Any] = {"log": result.log}
        if result.trigger is not None:
            tensors["trigger"] = dict(result.trigger.tensors)
            log["trigger"] = triggers.trigger_metadata(result.trigger)
        return tensors, log

    keyed = {
        "attack": attack,
        **getattr(attacks, section).model_dump(mode="json"),
        "target": settings.target,
        "target_captions": attacks.target_captions,
        "pairs": settings.data.poisoning_pairs,
    }
    return chain.run("attack", keyed, [clean.key], compute, seed, attack)


def poisoned(chain: Chain, attack: str, seed: int) -> Model:
    """The model after ``attack``; "none" is the clean model, "clean_finetuned" the other null."""
    model = pretrained(chain)
    if attack == "none":
        return model
    planted = replace(model, trigger=planted_trigger(chain, attack, seed))
    return planted.after(attacked(chain, attack, seed), attack)


def planted_trigger(chain: Chain, attack: str, seed: int) -> Trigger | None:
    """The trigger of ``attack``, known to the attacker only; None for the nulls."""
    artifact = None if attack == "none" else attacked(chain, attack, seed)
    if artifact is None or "trigger" not in artifact.metrics:
        return None
    tensors = {k: v.to(chain.device) for k, v in artifact.tensors("trigger").items()}
    return triggers.trigger_from_tensors(tensors, artifact.metrics["trigger"])


@functools.lru_cache(maxsize=128)
def identified(chain: Chain, attack: str, seed: int) -> Artifact:
    """Step 1 on one suspected model; metrics: ranking, scores, increases per kind."""
    suspect = poisoned(chain, attack, seed)
    settings = chain.settings

    def compute(_: Path) -> Made:
        found = identify(
            suspect.clip,
            pool(chain, "inversion").images,
            pool(chain, "heldout").images,
            class_head(chain, suspect.clip),
            settings.identification,
            settings.inversion,
            seed,
        )
        increases = {
            kind: {"clean": i.clean.tolist(), "adversarial": i.adversarial.tolist()}
            for kind, i in found.increases.items()
        }
        evidence = {
            "ranking": found.ranking,
            "asrs": found.asrs,
            "scores": [_finite(s) for s in found.scores],
        }
        return {"perturbations": found.perturbations}, {**evidence, "increases": increases}

    keyed = {
        **settings.identification.model_dump(mode="json"),
        "inversion": settings.inversion.model_dump(mode="json"),
        "images": settings.data.inversion_images,
        "heldout": settings.data.heldout_images,
    }
    return chain.run("identification", keyed, [suspect.key], compute, seed, attack)


def increases(artifact: Artifact) -> dict[str, Increase]:
    """Predicted counts under each kind of perturbation, from step 1's artifact."""
    return {
        kind: Increase(torch.tensor(c["clean"]), torch.tensor(c["adversarial"]))
        for kind, c in artifact.metrics["increases"].items()
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def first_candidate(chain: Chain, attack: str, seed: int) -> str:
    """The class that step 1 puts first, by its name in the defense's list."""
    return class_list(chain)[identified(chain, attack, seed).metrics["ranking"][0]]


def suspected_target(chain: Chain, attack: str, seed: int) -> int:
    """What the defense believes: step 1's answer; on a null the control asks for the target."""
    if attack in NULLS:
        return chain.target
    return int(identified(chain, attack, seed).metrics["ranking"][0])


@functools.lru_cache(maxsize=128)
def inverted(chain: Chain, attack: str, seed: int, target: int | None = None) -> Artifact:
    """Step 2: the inverted trigger towards ``target``, by default the one that step 1 found."""
    suspect, settings = poisoned(chain, attack, seed), chain.settings
    target = suspected_target(chain, attack, seed) if target is None else target

    def compute(_: Path) -> Made:
        result = invert(chain, suspect, [Run.of(target, settings.inversion)], seed)[0]
        tensors = {"mask": result.mask, "pattern": result.pattern}
        return {"trigger": tensors}, inversion_metrics(result)

    keyed = {
        **settings.inversion.model_dump(mode="json"),
        "target": target,
        "images": settings.data.inversion_images,
        "heldout": settings.data.heldout_images,
    }
    return chain.run("inversion", keyed, [suspect.key], compute, seed, attack)


def invert(chain: Chain, suspect: Model, runs: Sequence[Run], seed: int) -> list[InvertedTrigger]:
    """Step 2 on the profile's images for ``runs`` towards one target, which share a pass."""
    images, heldout = pool(chain, "inversion"), pool(chain, "heldout")
    features = None
    if chain.settings.inversion.emb_reference == "target_image":
        shown = images.images[images.labels == runs[0].target]
        if not len(shown):
            raise DataError(
                f"inversion.emb_reference = target_image, but none of the {len(images.labels)} "
                "images of inversion shows the suspected target; use clean"
            )
        features = embed_images(suspect.clip, shown).mean(0)
    return invert_triggers(
        suspect.clip,
        images.images,
        heldout.images,
        class_head(chain, suspect.clip),
        runs,
        chain.settings.inversion,
        seed,
        features,
        heldout.labels,
    )


def inversion_metrics(result: InvertedTrigger) -> dict[str, Any]:
    """What is kept of one inversion besides its trigger."""
    return {
        "target": result.run.target,
        **asdict(result.kept),
        "mask_l1_at_equal_asr": _finite(result.mask_l1_at_equal_asr),
        "states": [asdict(s) for s in result.states],
        "log": list(result.log),
    }


def inverted_trigger(chain: Chain, artifact: Artifact) -> Trigger:
    """The trigger (m, t) that step 2 left in the store."""
    tensors = artifact.tensors("trigger")
    return triggers.mask_trigger(*(tensors[k].to(chain.device) for k in ("mask", "pattern")))


@functools.lru_cache(maxsize=128)
def tuned(chain: Chain, attack: str, seed: int) -> Artifact:
    """Step 3: the purified model; metrics: impacts, selection, the chosen rate, its log."""
    suspect, settings = poisoned(chain, attack, seed), chain.settings
    target = suspected_target(chain, attack, seed)
    found = [_SUSPECTED[name](chain, attack, seed) for name in settings.tuning.triggers]

    def compute(_: Path) -> Made:
        together = [trigger for several, _ in found for trigger in several]
        return tune_model(chain, suspect, together, target, seed)

    keyed = {
        **settings.tuning.model_dump(mode="json"),
        "pool": settings.data.inversion_images,
        "heldout": settings.data.heldout_images,
    }
    keys = [suspect.key, *(key for _, key in found)]
    return chain.run("tuning", keyed, keys, compute, seed, attack)


@functools.lru_cache(maxsize=128)
def impacts(chain: Chain, attack: str, seed: int) -> Artifact:
    """Eq. 8 of the inverted trigger alone (Tables 12-15), whatever step 3 tunes with."""
    suspect, settings = poisoned(chain, attack, seed), chain.settings
    found, target = inverted(chain, attack, seed), suspected_target(chain, attack, seed)

    def compute(_: Path) -> Made:
        images, head = pool(chain, "inversion").images, class_head(chain, suspect.clip)
        trigger, count = inverted_trigger(chain, found), settings.tuning.images
        return {}, {
            "impacts": trigger_impacts(suspect.clip, images, trigger, head, target, count, seed)
        }

    keyed = {"images": settings.tuning.images, "pool": settings.data.inversion_images}
    return chain.run("impacts", keyed, [suspect.key, found.key], compute, seed, attack)


def critical(chain: Chain, attack: str, seed: int) -> Selection:
    """The layers above the paper's threshold (section 3.3), whichever ones step 3 tuned."""
    return critical_layers(layer_impacts(chain, attack, seed))


def layer_impacts(chain: Chain, attack: str, seed: int) -> dict[str, float]:
    """Eq. 8 per layer, first to last."""
    return in_depth(impacts(chain, attack, seed).metrics["impacts"])


def in_depth(found: Mapping[str, Any]) -> dict[str, Any]:
    """First layer to last: the store sorts names as text, which puts block 10 before block 2."""
    return {layer: found[layer] for layer in sorted(found, key=partial(natural_order, "layer"))}


def tune_model(
    chain: Chain, suspect: Model, found: Sequence[Trigger], target: int, seed: int
) -> Made:
    """Step 3 on the profile's images: what is kept of it, tensors and metrics."""
    heldout = pool(chain, "heldout")
    result = tune(
        suspect.clip,
        pool(chain, "inversion").images,
        found,
        heldout.images,
        heldout.labels,
        class_head(chain, suspect.clip),
        target,
        chain.settings.tuning,
        seed,
    )
    return {"weights": result.clip.net.state_dict()}, {
        "impacts": result.impacts,
        **asdict(result.selection),
        "lr": result.kept.lr,
        "step": result.kept.step,
        "neurons": {k: int(v.sum()) for k, v in result.neurons.items()},
        "qualified": result.qualified,
        "suspected": asdict(result.suspected),
        "states": [asdict(s) for s in result.states],
        "log": result.log,
    }


def universal_triggers(chain: Chain, attack: str, seed: int) -> tuple[list[Trigger], str]:
    """Step 1's perturbations that drive at least half of the images to the suspected target.

    The strongest first, and that one in any case; with the key of the step they come from.
    """
    found, target = identified(chain, attack, seed), suspected_target(chain, attack, seed)
    counts = {k: c["adversarial"] for k, c in found.metrics["increases"].items()}
    driven = sorted(counts, key=lambda kind: counts[kind][target], reverse=True)
    most = [kind for kind in driven if counts[kind][target] >= sum(counts[kind]) / 2]
    tensors, size = found.tensors("perturbations"), chain.settings.data.image_size_px
    kinds = most or driven[:1]
    return [as_trigger(kind, tensors[kind].to(chain.device), size) for kind in kinds], found.key


def _inverted(chain: Chain, attack: str, seed: int) -> tuple[list[Trigger], str]:
    artifact = inverted(chain, attack, seed)
    return [inverted_trigger(chain, artifact)], artifact.key


_SUSPECTED = {"inverted": _inverted, "universal": universal_triggers}
