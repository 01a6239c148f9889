"""Notebooks 01 to 05: the steps' artifacts as rows of the results table; ``record`` writes them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from invertune import data as datasets
from invertune import defenses, steps, target_identification, triggers
from invertune.chain import Chain, class_list, pretrained
from invertune.evaluation import evaluated
from invertune.files import REPOSITORY
from invertune.results import write_rows, write_runs
from invertune.rows import TASK_KS, Rows, mask_size, metric_row, rates, shared_columns
from invertune.sections import NULLS
from invertune.settings import suspects
from invertune.store import Artifact
from invertune.target_identification import Increase, ranked_increases, strongest

IDENTIFICATION_TABLES = {
    "badnet": "table6",
    "blended": "table7",
    "sig": "table8",
    "wanet": "table9",
    "badencoder": "table10",
    "badclip": "table11",
}
LAYER_TABLES = {"RN50": "table12", "RN101": "table13", "ViT-B-16": "table14", "ViT-B-32": "table15"}


def figures_folder(chain: Chain) -> Path:
    """figures/PROFILE, where tables and figures go."""
    return REPOSITORY / "figures" / chain.settings.profile


def record(chain: Chain, rows: Sequence[dict[str, str]]) -> pd.DataFrame:
    """Merges rows into results.csv and their artifacts' costs into runs.csv; counts the artifacts.

    Returns the table's rows of the profile's seeds, those of other notebooks too.
    """
    folder = REPOSITORY / "results" / chain.settings.profile
    keys = dict.fromkeys(r["key"] for r in rows if (chain.store / r["key"]).is_dir())
    write_runs([_run(Artifact(key, chain.store / key)) for key in keys], folder / "runs.csv")
    results = write_rows(rows, folder / "results.csv")
    print(chain.count())
    return results[results.seed.isin([str(seed) for seed in chain.settings.seeds])]


def _run(artifact: Artifact) -> dict[str, Any]:
    versions = ";".join(f"{k}={v}" for k, v in artifact.meta["versions"].items())
    return {**artifact.meta, "key": artifact.key, "versions": versions}


def attack_rows(chain: Chain) -> Rows:
    """Notebook 01: CA and ASR of every undefended model, its floors and the clean model's null."""
    rows = [r for case in suspects(chain.settings) for r in undefended_rows(chain, *case)]
    for attack, seed in itertools.product(NULLS, chain.settings.seeds):
        model = steps.poisoned(chain, attack, seed)
        done = evaluated(chain, model, None, "none", seed)
        found = _table1(done, shared_columns(chain, attack, seed, done.key), "extra")
        rows += [r for r in found if r["metric"] == "ca"]
    return rows


def undefended_rows(chain: Chain, attack: str, seed: int) -> Rows:
    """CA and ASR of one poisoned model, its floors, and its CA loss to the clean model."""
    clean, model = pretrained(chain), steps.poisoned(chain, attack, seed)
    done = evaluated(chain, model, model.trigger, model.key, seed)
    null = evaluated(chain, clean, model.trigger, model.key, seed)
    floor = evaluated(chain, model, None, "none", seed)
    base = shared_columns(chain, attack, seed, done.key)
    rows = _table1(done, base)
    drop = rates(null)["zeroshot.ca.1"].value - rates(done)["zeroshot.ca.1"].value
    rows.append(metric_row(base, "ca_loss", drop, task="zeroshot", k=1))
    for name, artifact in (("untriggered", floor), ("clean_model", null)):
        for task, k in TASK_KS:
            asr = rates(artifact)[f"{task}.asr.{k}"]
            place = {"task": task, "k": k, "key": artifact.key, "variant": {"floor": name}}
            rows.append(metric_row(base, "asr", asr, **place))
    return rows


def _table1(artifact: Artifact, base: dict[str, Any], item: str = "table1") -> Rows:
    """CA and ASR rows of both tasks; other k and the all-images ASR are extras."""
    rows = []
    for name, rate in rates(artifact).items():
        task, metric, k = name.split(".")
        columns: dict[str, Any] = {"task": task, "k": k}
        if metric == "t2i":
            metric, columns["variant"] = "ca", "direction=text_to_image"
        elif metric in ("ca", "asr") and (task, k) in TASK_KS:
            columns["paper_item"] = item
        rows.append(metric_row(base, metric, rate, **columns))
    return rows


def identification_rows(chain: Chain) -> Rows:
    """Notebook 02: rank of the true target among the candidates and by its increase alone, and the
    twenty largest increases of every kind.
    """
    names = datasets.distinct_names(chain.settings.data)
    rows: Rows = []
    for attack, seed in suspects(chain.settings, nulls=True):
        done = steps.identified(chain, attack, seed)
        base = shared_columns(chain, attack, seed, done.key, task="zeroshot")
        table = IDENTIFICATION_TABLES.get(attack)
        rows += candidate_rows(chain, done, base, table or "extra")
        gains = increases_by_class(chain, attack, seed)
        rank = 1 + sum(gain > gains[chain.settings.target] for gain in gains.values())
        rows.append(metric_row(base, "increase_rank", rank))
        rows += _increase_rows(steps.increases(done), names, table, base)
    return rows


def candidate_rows(chain: Chain, done: Artifact, base: dict[str, Any], item: str = "extra") -> Rows:
    """The true target's rank (the last, where it is no candidate) as a number of ``item``, and
    every candidate's mask.
    """
    ranking, names = done.metrics["ranking"], class_list(chain)
    known = names.index(chain.settings.target) if chain.settings.target in names else None
    rank = ranking.index(known) + 1 if known in ranking else len(names)
    rows = [metric_row(base, "target_rank", rank, paper_item=item)]
    for place, (label, score) in enumerate(zip(ranking, done.metrics["scores"], strict=True)):
        variant = {"candidate": place + 1, "class": names[label]}
        rows.append(metric_row(base, "mask_l1", mask_size(chain, score), variant=variant))
    return rows


def _increase_rows(
    found: dict[str, Increase], names: Sequence[str], table: str | None, base: dict[str, Any]
) -> Rows:
    """Tables 6-11 from the perturbation that drives a class most; the other kinds as extras."""
    most, rows = strongest(found), []
    for kind, increase in found.items():
        for name, before, after, points in ranked_increases(increase, names):
            shared = {**base, "n": int(increase.clean.sum())}
            extra = {"class": name, "perturbation": kind}
            rows.append(metric_row(shared, "increase", points, variant=extra))
            if table and kind == most:
                shared |= {"paper_item": table, "variant": {"class": name}}
                rows.append(metric_row(shared, "increase", points))
                rows.append(metric_row(shared, "clean_count", before))
                rows.append(metric_row(shared, "adversarial_count", after))
    return rows


def increases_by_class(chain: Chain, attack: str, seed: int) -> dict[str, float]:
    """Class name to its largest increase over the kinds of perturbation, in points."""
    found = steps.increases(steps.identified(chain, attack, seed))
    points = target_identification.largest_increases(found)
    return dict(zip(datasets.distinct_names(chain.settings.data), points.tolist(), strict=True))


def inversion_rows(chain: Chain) -> Rows:
    """Notebook 03: inverted ASR on the evaluation set, mask size and place, beside the nulls."""
    rows: Rows = []
    masks: dict[tuple[str, int], float] = {}
    for attack, seed in suspects(chain.settings, nulls=True):
        model, found = steps.poisoned(chain, attack, seed), steps.inverted(chain, attack, seed)
        trigger = steps.inverted_trigger(chain, found)
        inverted_asr = rates(evaluated(chain, model, trigger, found.key, seed))["zeroshot.asr.1"]
        base = shared_columns(chain, attack, seed, found.key, task="zeroshot")
        figure = {**base, "paper_item": "figure5", "k": 1}
        rows.append(metric_row(figure, "inverted_asr", inverted_asr))
        right = found.metrics["target"] == chain.target  # a wrong target's mask proves nothing
        size = found.metrics["mask_l1_at_equal_asr"] if right else None  # None: never reached
        masks[attack, seed] = mask = mask_size(chain, size)
        rows.append(metric_row(base, "mask_l1", mask))
        if attack != "none":
            rows.append(metric_row(base, "mask_l1_ratio", mask / masks["none", seed]))
        if model.trigger is not None:
            true = rates(evaluated(chain, model, model.trigger, model.key, seed))
            asr = true["zeroshot.asr.1"]
            rows.append(metric_row(figure, "asr", asr))
            rows.append(metric_row(base, "asr_gap", abs(asr.value - inverted_asr.value), k=1))
            for variant, name in (({}, attack), ({"floor": "clean_model"}, "none")):
                for place, share in inverted_energy(chain, attack, name, seed).items():
                    figure7 = {
                        **base,
                        "paper_item": "figure7",
                        "variant": variant | ({"place": place} if place else {}),
                    }
                    rows.append(metric_row(figure7, "mask_energy", share))
    return rows


def inverted_energy(chain: Chain, attack: str, suspect: str, seed: int) -> dict[str, float]:
    """Percent of the energy of ``suspect``'s inverted mask at the place of ``attack``'s trigger
    (named ""), and in that quarter of the image; empty where the trigger covers the whole image.
    """
    trigger = steps.planted_trigger(chain, attack, seed)
    place = None if trigger is None else triggers.covered(trigger)
    found = steps.inverted_trigger(chain, steps.inverted(chain, suspect, seed))
    places = {} if place is None else {"": place, "quarter": triggers.quarter(place)}
    return {name: triggers.energy_share(found.tensors["mask"], p) for name, p in places.items()}


def defense_rows(
    chain: Chain, defense: str, attack: str, seed: int, defender: Chain | None = None
) -> Rows:
    """CA, ASR (Table 1) and CA loss of one defended model, under the true trigger.

    ``defender``: the chain that defends, where it is another one.
    """
    suspect = steps.poisoned(chain, attack, seed)
    model = defenses.defended(defender or chain, defense, attack, seed)
    before = rates(evaluated(chain, suspect, suspect.trigger, suspect.key, seed))
    done = evaluated(chain, model, model.trigger, suspect.key, seed)
    base = shared_columns(chain, attack, seed, done.key, defense=defense)
    rows = _table1(done, base)
    for task, k in TASK_KS:
        name = f"{task}.ca.{k}"
        loss = before[name].value - rates(done)[name].value
        rows.append(metric_row(base, "ca_loss", loss, task=task, k=k))
    return rows


def tuning_rows(chain: Chain) -> Rows:
    """Notebook 04: layer impacts, and CA and ASR of the purified models (Tables 12 and 1)."""
    rows: Rows = []
    for attack, seed in suspects(chain.settings):
        rows += defense_rows(chain, "invertune", attack, seed)
        rows += _universal_rows(chain, attack, seed)
        rows += layer_rows(chain, attack, seed)
    return rows


def _universal_rows(chain: Chain, attack: str, seed: int) -> Rows:
    """ASR of step 1's strongest perturbation before and after tuning: a defender can see it.

    Toward the class that step 1 found, whether or not it is the attacker's target.
    """
    (trigger, *_), source = steps.universal_triggers(chain, attack, seed)
    suspecting = chain.with_settings(target=steps.first_candidate(chain, attack, seed))
    rows = []
    for defense in ("none", "invertune"):
        model = defenses.defended(chain, defense, attack, seed)
        done = evaluated(suspecting, model, trigger, source, seed)
        base = shared_columns(chain, attack, seed, done.key, defense, task="zeroshot", k=1)
        rows.append(metric_row(base, "universal_asr", rates(done)["zeroshot.asr.1"]))
    return rows


def layer_rows(chain: Chain, attack: str, seed: int) -> Rows:
    """Tables 12-15 (BadCLIP; other attacks: extras): layer impacts, their statistics, selection.

    All of the inverted trigger alone; as extras, the neurons that step 3 tuned in its layers.
    """
    done, critical = steps.impacts(chain, attack, seed), steps.critical(chain, attack, seed)
    item = LAYER_TABLES[chain.settings.backbone] if attack == "badclip" else "extra"
    base = shared_columns(chain, attack, seed, done.key, paper_item=item)
    statistics = {"mean": critical.mean, "std": critical.std, "threshold": critical.threshold}
    rows = [metric_row(base, f"layer_{name}", value) for name, value in statistics.items()]
    for layer, impact in steps.layer_impacts(chain, attack, seed).items():
        columns = {**base, "variant": {"layer": layer}}
        rows.append(metric_row(columns, "layer_impact", impact))
        rows.append(metric_row(columns, "layer_selected", int(layer in critical.layers)))
    tuned = steps.tuned(chain, attack, seed)
    for layer, count in tuned.metrics["neurons"].items():
        columns = {**base, "paper_item": "extra", "variant": {"layer": layer}, "key": tuned.key}
        rows.append(metric_row(columns, "critical_neurons", count))
    return rows
