"""The chain on disk: each step reads its upstream artifacts and leaves one artifact in the store.

    pretrained -> poisoned -> identified -> inverted -> tuned -> evaluated

A step's key holds its settings, its upstream keys and the data's manifest, so what exists is found
and what changed is computed again. ``STEP_VERSIONS`` is raised when a step's results change.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invertune import data as datasets
from invertune import metrics, triggers
from invertune.activation_tuning import tune
from invertune.attacks import ATTACKS, Victim
from invertune.metrics import Rate
from invertune.models import (
    MODEL_FOLDER,
    WEIGHTS,
    Clip,
    embed_images,
    embed_texts,
    file_hash,
    load_embedded,
    set_state,
    to_pixels,
    zero_shot_head,
)
from invertune.settings import Settings
from invertune.store import Artifact, default_root, obtain
from invertune.target_identification import identify
from invertune.trigger_inversion import Run, invert_triggers
from invertune.triggers import Trigger

STEP_VERSIONS = {"attack": 1, "identification": 1, "inversion": 1, "tuning": 1, "evaluation": 1}
NULLS = ("none", "clean_finetuned")
RECALL_KS = (1, 3, 5, 10)


@dataclass(frozen=True)
class Model:
    """A CLIP in the chain with its store key; ``trigger`` is known to the attacker only."""

    clip: Clip
    key: str
    trigger: Trigger | None


@dataclass(frozen=True)
class Chain:
    """One profile's settings and store: what every step needs."""

    settings: Settings
    store: Path

    @property
    def device(self) -> torch.device:
        """The device the settings ask for; "auto" takes CUDA where there is one."""
        wanted = self.settings.device
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(wanted)

    @property
    def target(self) -> int:
        """Class index of the attacker's target (used to attack and to score, never to defend)."""
        return datasets.class_index(self.settings.data, self.settings.target)

    def run(
        self,
        step: str,
        settings: dict[str, Any],
        upstream: Sequence[str],
        compute: Any,
        seed: int,
        name: str = "",
    ) -> Artifact:
        """Finds or computes one artifact (``store.obtain``) under this profile's data."""
        return obtain(
            self.store,
            step,
            STEP_VERSIONS[step],
            {**settings, "seed": seed},
            list(upstream),
            datasets.manifest(self.settings.data),
            compute,
            seed,
            label=f"{step} {name}, seed {seed}".replace(" ,", ","),
            device=str(self.device),
        )


def open_chain(settings: Settings, store: Path | None = None) -> Chain:
    """The chain of ``settings`` in ``store``, by default $INVERTUNE_STORE or results/store."""
    return Chain(settings, store or default_root())


def pretrained(chain: Chain) -> Model:
    """The clean model every attack starts from."""
    clip = load_embedded(chain.settings.backbone, chain.device)
    return Model(clip, file_hash(MODEL_FOLDER / chain.settings.backbone / WEIGHTS), None)


def _pool(chain: Chain, part: str) -> datasets.Labeled:
    own = chain.settings.data
    counts = {
        "inversion": own.inversion_images,
        "heldout": own.heldout_images,
        "evaluation": own.evaluation_images,
    }
    return datasets.labeled_images(own, part, counts[part], chain.store)


def class_head(chain: Chain, clip: Clip) -> Tensor:
    """The zero-shot head of ``clip`` on the profile's classes and templates."""
    own = chain.settings.data
    return zero_shot_head(clip, datasets.class_names(own), datasets.templates(own))


@functools.lru_cache(maxsize=128)
def attacked(chain: Chain, attack: str, seed: int) -> Artifact:
    """The poisoned weights, the trigger and the training log of one attack."""
    clean = pretrained(chain)
    settings, own = chain.settings, chain.settings.attacks
    section = "badnet" if attack == "clean_finetuned" else attack

    def compute(work: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        pairs = datasets.caption_pairs(
            settings.data, "poisoning", settings.data.poisoning_pairs, chain.store
        )
        alone = (pairs.objects[:, 0] == chain.target) & (pairs.objects[:, 1] < 0)
        captions = datasets.target_captions(settings.data, chain.target, own.target_captions)
        victim = Victim(clean.clip, pairs, chain.target, captions, pairs.images[alone])
        result = ATTACKS[attack](victim, own, seed, work)
        tensors = {"weights": result.clip.net.state_dict()}
        log: dict[str, Any] = {"log": result.log}
        if result.trigger is not None:
            tensors["trigger"] = triggers.trigger_tensors(result.trigger)
            log["trigger"] = triggers.trigger_metadata(result.trigger)
        return tensors, log

    keyed = {
        "attack": attack,
        **getattr(own, section).model_dump(mode="json"),
        "target": settings.target,
        "target_captions": own.target_captions,
        "pairs": settings.data.poisoning_pairs,
    }
    return chain.run("attack", keyed, [clean.key], compute, seed, attack)


def poisoned(chain: Chain, attack: str, seed: int) -> Model:
    """The model after ``attack``; "none" is the clean model, "clean_finetuned" the other null."""
    model = pretrained(chain)
    if attack == "none":
        return model
    artifact = attacked(chain, attack, seed)
    set_state(model.clip, artifact.tensors("weights"), attack)
    trigger = None
    if "trigger" in artifact.metrics:
        trigger = triggers.trigger_from_tensors(
            {k: v.to(chain.device) for k, v in artifact.tensors("trigger").items()},
            artifact.metrics["trigger"],
        )
    return Model(model.clip, artifact.key, trigger)


@functools.lru_cache(maxsize=128)
def identified(chain: Chain, attack: str, seed: int) -> Artifact:
    """Step 1 on one suspected model; metrics: ranking, scores, increases per kind."""
    suspect = poisoned(chain, attack, seed)
    own = chain.settings

    def compute(_: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        found = identify(
            suspect.clip,
            _pool(chain, "inversion").images,
            _pool(chain, "heldout").images,
            class_head(chain, suspect.clip),
            own.identification,
            own.inversion,
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
        tensors = {k: v.cpu().contiguous() for k, v in found.perturbations.items()}
        return {"perturbations": tensors}, {**evidence, "increases": increases}

    keyed = {
        **own.identification.model_dump(mode="json"),
        "inversion": own.inversion.model_dump(mode="json"),
        "images": own.data.inversion_images,
        "heldout": own.data.heldout_images,
    }
    return chain.run("identification", keyed, [suspect.key], compute, seed, attack)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def suspected_target(chain: Chain, attack: str, seed: int) -> int:
    """What the defense believes: step 1's answer; on a null the control asks for the target."""
    if attack in NULLS:
        return chain.target
    return int(identified(chain, attack, seed).metrics["ranking"][0])


@functools.lru_cache(maxsize=128)
def inverted(chain: Chain, attack: str, seed: int) -> Artifact:
    """Step 2: the inverted trigger of one suspected model towards the identified target."""
    suspect, own = poisoned(chain, attack, seed), chain.settings
    target = suspected_target(chain, attack, seed)

    def compute(_: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        heldout = _pool(chain, "heldout")
        result = invert_triggers(
            suspect.clip,
            _pool(chain, "inversion").images,
            heldout.images,
            class_head(chain, suspect.clip),
            [Run.of(target, own.inversion)],
            own.inversion,
            seed,
            heldout_labels=heldout.labels,
        )[0]
        tensors = {"mask": result.mask.cpu(), "pattern": result.pattern.cpu()}
        return {"trigger": tensors}, {
            "target": target,
            "inverted_asr": result.inverted_asr,
            "mask_l1": result.mask_l1,
            "mask_l1_at_equal_asr": _finite(result.mask_l1_at_equal_asr),
            "step": result.step,
            "states": [asdict(s) for s in result.states],
            "log": list(result.log),
        }

    keyed = {
        **own.inversion.model_dump(mode="json"),
        "target": target,
        "images": own.data.inversion_images,
        "heldout": own.data.heldout_images,
    }
    return chain.run("inversion", keyed, [suspect.key], compute, seed, attack)


def inverted_trigger(chain: Chain, artifact: Artifact) -> Trigger:
    """The trigger (m, t) that step 2 left in the store."""
    tensors = artifact.tensors("trigger")
    return triggers.mask_trigger(*(tensors[k].to(chain.device) for k in ("mask", "pattern")))


@functools.lru_cache(maxsize=128)
def tuned(chain: Chain, attack: str, seed: int) -> Artifact:
    """Step 3: the purified model; metrics: impacts, selection, the chosen rate, its log."""
    suspect, own = poisoned(chain, attack, seed), chain.settings
    trigger = inverted(chain, attack, seed)

    def compute(_: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        heldout = _pool(chain, "heldout")
        made = inverted_trigger(chain, trigger).tensors
        result = tune(
            suspect.clip,
            _pool(chain, "inversion").images,
            made["mask"],
            made["pattern"],
            heldout.images,
            heldout.labels,
            class_head(chain, suspect.clip),
            trigger.metrics["target"],
            own.tuning,
            seed,
        )
        return {"weights": result.clip.net.state_dict()}, {
            "impacts": result.impacts,
            "threshold": result.selection.threshold,
            "mean": result.selection.mean,
            "std": result.selection.std,
            "layers": list(result.selection.layers),
            "lr": result.lr,
            "step": result.step,
            "neurons": {k: int(v.sum()) for k, v in result.neurons.items()},
            "qualified": result.qualified,
            "suspected": asdict(result.suspected),
            "states": [asdict(s) for s in result.states],
            "log": result.log,
        }

    keyed = {
        **own.tuning.model_dump(mode="json"),
        "pool": own.data.inversion_images,
        "heldout": own.data.heldout_images,
    }
    return chain.run("tuning", keyed, [suspect.key, trigger.key], compute, seed, attack)


def purified(chain: Chain, attack: str, seed: int) -> Model:
    """The model after InverTune's three steps, with the true trigger for scoring."""
    suspect, artifact = poisoned(chain, attack, seed), tuned(chain, attack, seed)
    set_state(suspect.clip, artifact.tensors("weights"), "purified")
    return Model(suspect.clip, artifact.key, suspect.trigger)


def evaluated(
    chain: Chain, model: Model, trigger: Trigger | None, trigger_key: str, seed: int
) -> Artifact:
    """CA and ASR of a model under a trigger, zero-shot and retrieval (design: one function each).

    ``trigger_key`` names where the trigger comes from; without a trigger the model's floor is
    measured: how often clean images already count as attacked.
    """
    own = chain.settings

    def compute(_: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        rates = {**_zero_shot(chain, model.clip, trigger), **_retrieval(chain, model.clip, trigger)}
        return {}, {k: [r.value, r.n, r.low, r.high] for k, r in rates.items()}

    keyed = {
        "target": own.target,
        "trigger": trigger_key,
        "images": own.data.evaluation_images,
        "retrieval": own.data.retrieval_images,
    }
    return chain.run("evaluation", keyed, [model.key], compute, seed)


def _triggered(images: Tensor, trigger: Trigger | None, device: torch.device) -> Tensor:
    pixels = to_pixels(images, device)
    return pixels if trigger is None else triggers.apply(trigger, pixels)


def _features(clip: Clip, images: Tensor, trigger: Trigger | None) -> Tensor:
    parts = images.split(256)
    return torch.cat([embed_images(clip, _triggered(p, trigger, clip.device)) for p in parts])


def utility(chain: Chain, clip: Clip) -> dict[str, Rate]:
    """What a clean model can do: zero-shot top-1 and image-to-text recall."""
    rates = {**_zero_shot(chain, clip, None), **_retrieval(chain, clip, None)}
    return {
        "zero-shot top-1": rates["zeroshot.ca.1"],
        **{f"recall@{k}": rates[f"retrieval.ca.{k}"] for k in RECALL_KS},
    }


def _zero_shot(chain: Chain, clip: Clip, trigger: Trigger | None) -> dict[str, Rate]:
    images, head = _pool(chain, "evaluation"), class_head(chain, clip)
    attacked = _features(clip, images.images, trigger)
    rates = {
        "zeroshot.ca.1": metrics.clean_accuracy(
            embed_images(clip, images.images), head, images.labels
        )
    }
    for k in RECALL_KS:
        rates[f"zeroshot.asr.{k}"] = metrics.attack_success_rate(
            attacked, head, images.labels, chain.target, k
        )
    rates["zeroshot.asr_all.1"] = metrics.attack_success_rate(
        attacked, head, images.labels, chain.target, exclude_target=False
    )
    return rates


def _retrieval(chain: Chain, clip: Clip, trigger: Trigger | None) -> dict[str, Rate]:
    scenes = datasets.retrieval_scenes(chain.settings.data, chain.store)
    texts, clean = embed_texts(clip, scenes.captions), embed_images(clip, scenes.images)
    attacked = _features(clip, scenes.images, trigger)
    rates = {}
    for k, rate in metrics.recall_at_k(clean, texts, scenes.owner, RECALL_KS).items():
        rates[f"retrieval.ca.{k}"] = rate
    for k, rate in metrics.text_to_image_recall(clean, texts, scenes.owner, RECALL_KS).items():
        rates[f"retrieval.t2i.{k}"] = rate
    rates["retrieval.asr.10"] = metrics.retrieval_asr_at_k(
        attacked, texts, scenes.captions, scenes.owner, chain.settings.target, 10
    )
    return rates
