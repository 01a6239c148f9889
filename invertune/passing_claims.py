"""Claims that the paper makes in passing, measured (sections 1 and 3.1, appendices C.1 and D.3).

InverTune with few images, with images of another distribution, and with a class list that lacks the
target; how uniform adversarial predictions are; how alike the attacks' layer selections are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pandas as pd
from scipy.stats import entropy
from torch import Tensor

from invertune import data as datasets
from invertune import steps, tables
from invertune.chain import Chain, Defender, class_head, pretrained
from invertune.generalization import one_attack
from invertune.reports import candidate_rows, defense_rows
from invertune.results import to_frame
from invertune.rows import TASK_KS, Rows, mean, metric_row, shared_columns
from invertune.sections import PICTOGRAMS
from invertune.settings import suspects

TITLES = {
    "": "as in Table 1, same seeds",
    "data=few": "few images",
    "data=other_style": "another distribution",
    "list=without_target": "target not in the class list",
}
VARIANTS = tuple(filter(None, TITLES))


def passing_rows(chain: Chain) -> Rows:
    """All of them as rows of the results table, after InverTune's own rows for comparison."""
    attack, rows = chain.settings.generalization.attack, []
    for seed in chain.settings.seeds:
        rows += defense_rows(chain, "invertune", attack, seed)
    return rows + variant_rows(chain) + uniformity_rows(chain) + overlap_rows(chain)


def variants(chain: Chain) -> dict[str, Chain]:
    """InverTune on the same poisoned model with other data or another class list.

    The experiment knows the target that it strikes from the list; the defense does not.
    """
    settings, few = chain.settings, chain.settings.generalization
    images = {"inversion_images": few.few_images, "heldout_images": few.few_heldout_images}
    fewer = {
        "data": settings.data.model_copy(update=images),
        "tuning": settings.tuning.model_copy(update={"images": few.few_tuning_images}),
    }
    style = {}
    if settings.data.source == PICTOGRAMS:  # no other data have styles
        other = replace(one_attack(chain), defender=Defender(style=few.other_style))
        style = {"data=other_style": other}
    return {
        "data=few": one_attack(chain, **fewer),
        **style,
        "list=without_target": replace(one_attack(chain), defender=Defender(lacks=settings.target)),
    }


def variant_rows(chain: Chain, among: Collection[str] = VARIANTS) -> Rows:
    """CA and ASR of both tasks, always with the profile's evaluation images and full class list.

    Of the variants ``among`` those that the data have.
    """
    rows: Rows = []
    attack = chain.settings.generalization.attack
    chosen = [item for item in variants(chain).items() if item[0] in among]
    for (variant, other), seed in itertools.product(chosen, chain.settings.seeds):
        measured = defense_rows(chain, "invertune", attack, seed, other)
        own = [r for r in measured if r["paper_item"] == "table1" or r["metric"] == "ca_loss"]
        rows += [{**r, "paper_item": "extra", "variant": variant} for r in own]
        found = steps.identified(other, attack, seed)
        base = shared_columns(chain, attack, seed, found.key, "invertune")
        candidates = candidate_rows(other, found, base)
        rows += [{**r, "variant": f"{variant};{r['variant']}".strip(";")} for r in candidates]
        if other.defender.lacks:
            about = {"key": own[0]["key"], "task": "zeroshot", "variant": variant}
            rank = similarity_rank(chain, steps.first_candidate(other, attack, seed))
            rows.append(metric_row(base, "similarity_rank", rank, **about))
    return rows


def similarity_rank(chain: Chain, name: str) -> int:
    """Place of class ``name`` (from 1) among the texts nearest to the target's, clean model.

    0 for the target itself.
    """
    head = class_head(chain, pretrained(chain).clip)
    similar = head @ head[chain.target]
    similar[chain.target] = math.inf
    return int((similar > similar[datasets.class_index(chain.settings.data, name)]).sum())


def uniformity(counts: Tensor) -> tuple[float, float]:
    """Entropy of predicted ``counts`` [C] over log C (1: uniform); the largest share in percent."""
    evenness = float(entropy(counts, base=len(counts)))
    return min(evenness, 1.0), 100 * float(counts.max().double() / counts.sum())


def uniformity_rows(chain: Chain) -> Rows:
    """How evenly predictions spread over the classes, on nulls and attacked models (3.1).

    ``perturbation=none`` are the clean images' predictions; without a variant the mean over the
    kinds of perturbation.
    """
    rows: Rows = []
    for attack, seed in suspects(chain.settings, nulls=True):
        done = steps.identified(chain, attack, seed)
        found = steps.increases(done)
        counts = {"none": next(iter(found.values())).clean}
        counts |= {kind: increase.adversarial for kind, increase in found.items()}
        base = shared_columns(chain, attack, seed, done.key, task="zeroshot")
        entropies = []
        for kind, count in counts.items():
            columns = {**base, "variant": {"perturbation": kind}, "n": int(count.sum())}
            evenness, share = uniformity(count)
            rows.append(metric_row(columns, "entropy", evenness))
            rows.append(metric_row(columns, "largest_share", share))
            if kind != "none":
                entropies.append(evenness)
        rows.append(metric_row(base, "entropy", sum(entropies) / len(entropies)))
    return rows


def overlap_rows(chain: Chain) -> Rows:
    """Layers selected for an attack and for notebook 06's, over those of either (D.3; 1: equal)."""
    rows: Rows = []
    for attack, seed in suspects(chain.settings):
        reference = chain.settings.generalization.attack
        one, two = (set(steps.critical(chain, name, seed).layers) for name in (attack, reference))
        base = shared_columns(chain, attack, seed, steps.impacts(chain, attack, seed).key)
        rows.append(metric_row(base, "layer_overlap", len(one & two) / len(one | two)))
    return rows


def variant_table(chain: Chain, results: pd.DataFrame) -> pd.DataFrame:
    """InverTune as in Table 1 and its variants: the class found in each seed, CA, ASR, CA loss."""
    settings, attack = chain.settings, chain.settings.generalization.attack
    shared = {"backbone": settings.backbone, "target": settings.target, "attack": attack}
    lines = []
    for variant, other in {"": chain, **variants(chain)}.items():
        found = [steps.first_candidate(other, attack, seed) for seed in settings.seeds]
        line: dict[str, Any] = {"InverTune": TITLES[variant], "found": ", ".join(found)}
        line["its rank by text"] = ", ".join(str(similarity_rank(chain, name)) for name in found)
        for (task, k), metric in itertools.product(TASK_KS, ("ca", "asr", "ca_loss")):
            where = {**shared, "task": task, "k": k, "variant": variant, "metric": metric}
            title = "CA loss" if metric == "ca_loss" else tables.label("metric", metric)
            value = mean(results, defense="invertune", **where)
            line[f"{tables.label('task', task)} {title}"] = value
        lines.append(line)
    return pd.DataFrame(lines)


def uniformity_table(chain: Chain) -> pd.DataFrame:
    """Per model: entropy (1: uniform) of clean and of adversarial predictions, largest share."""
    frame = to_frame(uniformity_rows(chain))
    frame = frame[frame.variant != ""]
    lines = []
    for attack in dict.fromkeys(frame.attack):
        rows = frame[frame.attack == attack]
        clean = rows.variant == "perturbation=none"
        entropy, share = rows.metric == "entropy", rows.metric == "largest_share"
        lines.append(
            {
                "model": tables.label("attack", attack),
                "entropy, clean": rows[clean & entropy].value.mean(),
                "entropy, adversarial (mean)": rows[~clean & entropy].value.mean(),
                "entropy, adversarial (lowest)": rows[~clean & entropy].value.min(),
                "largest share, clean (%)": rows[clean & share].value.max(),
                "largest share, adversarial (%, highest)": rows[~clean & share].value.max(),
            }
        )
    return pd.DataFrame(lines)


def selection_table(chain: Chain) -> pd.DataFrame:
    """Per attack and seed: critical layers, and their overlap with those of 06's attack (D.3)."""
    return pd.DataFrame(
        {
            "attack": tables.label("attack", row["attack"]),
            "seed": int(row["seed"]),
            "critical layers": tables.layers(
                steps.critical(chain, row["attack"], int(row["seed"])).layers
            ),
            "overlap": float(row["value"]),
        }
        for row in overlap_rows(chain)
    )
