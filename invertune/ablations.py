"""Ablations: one setting changed at a time (sections 4.3 and 4.4: Tables 2 and 3, Figure 6).

A changed setting that equals the profile's own finds the main chain's artifact. The other values of
a loss weight run as one batch: they see the same images and share all that is not their own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invertune import data as datasets
from invertune import metrics, steps, triggers
from invertune.chain import Chain, Model, class_head, pool
from invertune.evaluation import RECALL_KS
from invertune.kernels import ssim_statistics, ssim_with
from invertune.metrics import Rate
from invertune.models import embed_images, set_state, to_pixels
from invertune.perturbations import as_trigger
from invertune.reports import full_mask, grid, increases, metric_row, shared_columns
from invertune.results import variant_text
from invertune.settings import InversionChanges, TuningChanges, changed, compared
from invertune.store import Artifact
from invertune.trigger_inversion import Run
from invertune.triggers import Trigger

WEIGHTS = ("lambda1", "lambda2", "lambda3", "lambda4")
INVERSION_SWITCHES = tuple(n for n in InversionChanges.model_fields if n not in WEIGHTS)
TUNING_SWITCHES = tuple(n for n in TuningChanges.model_fields if n not in ("beta", "images"))

Tensors = dict[str, dict[str, Tensor]]
Rows = list[dict[str, str]]


def variant(name: str, value: Any) -> str:
    """The text of one changed setting in the results, e.g. "lambda4=0.05" or "lrs=0.001/0.003"."""
    if isinstance(value, tuple):
        value = "/".join(f"{v:g}" for v in value)
    return variant_text({name: value})


def variants(chain: Chain, section: str, names: Iterable[str]) -> list[str]:
    """The texts of all values of these settings, of those that have more than one."""
    found = {name: compared(chain.settings, section, name) for name in names}
    return [variant(name, v) for name, values in found.items() if len(values) > 1 for v in values]


def chosen(chain: Chain, attacks: Sequence[str]) -> list[tuple[str, int]]:
    """The profile's attacks that are among ``attacks``, with every seed."""
    return [(attack, seed) for attack, seed in grid(chain) if attack in attacks]


def swept(chain: Chain, attack: str, seed: int, weight: str) -> Artifact:
    """The triggers inverted with the other values of one loss weight, stacked in their order.

    A step of its own, not K inversions: in a batch a run differs from itself alone by rounding.
    """
    suspect, own = steps.poisoned(chain, attack, seed), chain.settings
    target = steps.suspected_target(chain, attack, seed)
    values = list(compared(own, "inversion", weight)[1:])
    base = Run.of(target, own.inversion)

    def compute(_: Path) -> tuple[Tensors, dict[str, Any]]:
        runs = [replace(base, **{weight: value}) for value in values]
        found = steps.invert(chain, suspect, runs, seed)
        parts = {"mask": [r.mask for r in found], "pattern": [r.pattern for r in found]}
        tensors = {name: torch.stack(part).cpu() for name, part in parts.items()}
        return {"triggers": tensors}, {"runs": [steps.inversion_metrics(r) for r in found]}

    keyed = {
        **own.inversion.model_dump(mode="json"),
        weight: values,
        "target": target,
        "images": own.data.inversion_images,
        "heldout": own.data.heldout_images,
    }
    return chain.run("sweep", keyed, [suspect.key], compute, seed, f"of {weight} on {attack}")


def inversions(
    chain: Chain, attack: str, seed: int, name: str
) -> list[tuple[Artifact, tuple[Any, ...]]]:
    """Step 2 at every compared value of a setting: artifacts, each with the values that it holds.

    The target is the one that step 1 found with the profile's own settings.
    """
    own, *others = compared(chain.settings, "inversion", name)
    target = steps.suspected_target(chain, attack, seed)
    found = [(steps.inverted(chain, attack, seed, target), (own,))]
    if name in WEIGHTS:
        return [*found, (swept(chain, attack, seed, name), tuple(others))] if others else found
    for value in others:
        other = replace(chain, settings=changed(chain.settings, "inversion", name, value))
        found.append((steps.inverted(other, attack, seed, target), (value,)))
    return found


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

    def compute(_: Path) -> tuple[Tensors, dict[str, Any]]:
        own, head = pool(chain, "evaluation"), class_head(chain, model.clip)
        clean = embed_images(model.clip, own.images)
        ca = {k: metrics.clean_accuracy(clean, head, own.labels, k) for k in RECALL_KS}
        asr, ssim = [], []
        for trigger in placed:
            features, similar = _triggered(model, own.images, trigger)
            rates = {
                k: metrics.attack_success_rate(features, head, own.labels, chain.target, k)
                for k in RECALL_KS
            }
            asr.append(_plain(rates))
            ssim.append(float(similar.mean()))
        return {}, {"ca": _plain(ca), "asr": asr, "ssim": ssim}

    keyed = {"target": chain.settings.target, "images": chain.settings.data.evaluation_images}
    return chain.run("scores", keyed, [model.key, source], compute, seed)


def _triggered(model: Model, images: Tensor, trigger: Trigger) -> tuple[Tensor, Tensor]:
    """Features [N, D] of the triggered images and their SSIM [N] to the clean ones."""
    features, similar = [], []
    for part in images.split(256):
        clean = to_pixels(part, model.clip.device)
        placed = triggers.apply(trigger, clean)
        features.append(embed_images(model.clip, placed))
        similar.append(ssim_with(placed[None], clean, ssim_statistics(clean))[0])
    return torch.cat(features), torch.cat(similar)


def _plain(rates: dict[int, Rate]) -> dict[str, list[float]]:
    return {str(k): [r.value, r.n, r.low, r.high] for k, r in rates.items()}


def inversion_rows(chain: Chain, attacks: Sequence[str], names: Iterable[str], item: str) -> Rows:
    """Inverted ASR, mask size at equal ASR and SSIM at every compared value of some settings.

    Besides, as extras, the last state of each inversion: what step 2 gives without choosing.
    """
    rows: Rows = []
    several = [n for n in names if len(compared(chain.settings, "inversion", n)) > 1]
    for (attack, seed), name in ((c, n) for c in chosen(chain, attacks) for n in several):
        suspect = steps.poisoned(chain, attack, seed)
        for artifact, values in inversions(chain, attack, seed, name):
            found = found_triggers(chain, artifact)
            done = scored(chain, suspect, [t for t, _ in found], artifact.key, seed)
            for place, (value, (_, kept)) in enumerate(zip(values, found, strict=True)):
                about = {"paper_item": item, "variant": variant(name, value)}
                base = shared_columns(chain, attack, seed, done.key, task="zeroshot", **about)
                asr, last = Rate(*done.metrics["asr"][place]["1"]), kept["states"][-1]
                rows.append(metric_row(base, "inverted_asr", asr, k=1))
                size = kept["mask_l1_at_equal_asr"] or full_mask(chain)
                rows.append(metric_row(base, "mask_l1", size))
                rows.append(metric_row(base, "ssim", done.metrics["ssim"][place]))
                base |= {"paper_item": "extra", "variant": f"{base['variant']};state=last"}
                rows.append(metric_row(base, "inverted_asr", last["inverted_asr"], k=1))
                rows.append(metric_row(base, "mask_l1", last["mask_l1"]))
    return rows


def tuning_rows(chain: Chain, attacks: Sequence[str], names: Iterable[str], item: str) -> Rows:
    """CA and ASR after tuning at every compared value of some settings (Figure 6 and beyond).

    Besides, as extras, the held-out CA and inverted ASR of the last state at the highest rate: what
    step 3 gives without choosing a state.
    """
    rows: Rows = []
    several = [n for n in names if len(compared(chain.settings, "tuning", n)) > 1]
    for (attack, seed), name in ((c, n) for c in chosen(chain, attacks) for n in several):
        for value in compared(chain.settings, "tuning", name):
            other = replace(chain, settings=changed(chain.settings, "tuning", name, value))
            done, text = steps.tuned(other, attack, seed), variant(name, value)
            about = {"paper_item": item, "variant": text}
            rows += _purified_rows(chain, attack, seed, done, (1,), **about)
            last = max(done.metrics["states"], key=lambda state: (state["lr"], state["step"]))
            about = {"task": "zeroshot", "k": 1, "variant": f"{text};state=last"}
            base = shared_columns(chain, attack, seed, done.key, "invertune", **about)
            rows.append(metric_row(base, "ca", last["clean_accuracy"]))
            rows.append(metric_row(base, "inverted_asr", last["inverted_asr"]))
    return rows


def _purified_rows(
    chain: Chain, attack: str, seed: int, artifact: Artifact, ks: Sequence[int], **columns: Any
) -> Rows:
    """Zero-shot CA and ASR under the true trigger of one tuned model."""
    suspect = steps.poisoned(chain, attack, seed)
    if suspect.trigger is None:
        raise ValueError(f"{attack!r} has no trigger of its own; choose an attack")
    set_state(suspect.clip, artifact.tensors("weights"), artifact.key)
    model = replace(suspect, key=artifact.key)
    done = scored(chain, model, [suspect.trigger], suspect.key, seed)
    base = shared_columns(chain, attack, seed, done.key, "invertune", task="zeroshot", **columns)
    return [
        metric_row(base, metric, Rate(*rates[str(k)]), k=k)
        for metric, rates in (("ca", done.metrics["ca"]), ("asr", done.metrics["asr"][0]))
        for k in ks
    ]


def perturbation_tuned(chain: Chain, attack: str, seed: int) -> Artifact:
    """Step 3 with step 1's universal perturbation instead of the inverted trigger (Table 3).

    Of its kinds, the one that drives most images to the target that step 1 names.
    """
    found = steps.identified(chain, attack, seed)
    target = steps.suspected_target(chain, attack, seed)
    points = {kind: float(i.points[target]) for kind, i in increases(found).items()}
    kind = max(points, key=lambda name: points[name])
    tensor = found.tensors("perturbations")[kind].to(chain.device)
    trigger = as_trigger(kind, tensor, chain.settings.data.image_size_px)
    return steps.tuned_with(chain, attack, seed, trigger, found.key)


def table3_rows(chain: Chain) -> Rows:
    """CA and ASR at top 1, 3, 5 and 10 after tuning with either trigger (Table 3)."""
    rows: Rows = []
    for attack, seed in chosen(chain, chain.settings.ablations.perturbation_attacks):
        made = {"inverted": steps.tuned, "uap": perturbation_tuned}
        for name, tuned in made.items():
            about = {"paper_item": "table3", "variant": {"trigger": name}}
            done = tuned(chain, attack, seed)
            rows += _purified_rows(chain, attack, seed, done, RECALL_KS, **about)
    return rows


def update_rows(chain: Chain) -> Rows:
    """Held-out inverted ASR and mask size after every so many updates of the longest inversion."""
    rows: Rows = []
    longest = max(compared(chain.settings, "inversion", "steps"))
    other = replace(chain, settings=changed(chain.settings, "inversion", "steps", longest))
    for attack, seed in chosen(chain, chain.settings.ablations.switch_attacks):
        target = steps.suspected_target(chain, attack, seed)
        found = steps.inverted(other, attack, seed, target)
        base = shared_columns(chain, attack, seed, found.key, task="zeroshot")
        for state in found.metrics["states"]:
            base["variant"] = variant_text({"updates": state["step"]})
            rows.append(metric_row(base, "inverted_asr", state["inverted_asr"], k=1))
            rows.append(metric_row(base, "mask_l1", state["mask_l1"]))
    return rows


def perturbation_rows(chain: Chain) -> Rows:
    """Share of images that each kind of universal perturbation drives to two classes.

    The true target, and the class that gains most; from step 1's artifacts, at no cost.
    """
    rows: Rows = []
    names = datasets.class_names(chain.settings.data)
    for attack, seed in grid(chain, nulls=True):
        done = steps.identified(chain, attack, seed)
        base = shared_columns(chain, attack, seed, done.key, task="zeroshot", k=1)
        for kind, increase in increases(done).items():
            for label in dict.fromkeys((chain.target, int(increase.points.argmax()))):
                share = metrics.rate(torch.arange(int(increase.adversarial.sum())) < increase.adversarial[label])
                about = {"class": names[label], "perturbation": kind}
                rows.append(metric_row(base, "adversarial_share", share, variant=about))
    return rows
