"""What the notebooks show: the steps' artifacts as rows of the results table, frames and images.

Each ``*_rows`` function runs (or finds) one step for every attack and seed of the profile and
returns rows for ``results.write_rows``; ``record`` writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from invertune import data as datasets
from invertune import steps
from invertune.metrics import Rate
from invertune.provenance import REPOSITORY
from invertune.results import rate_row, row, write_rows, write_runs
from invertune.steps import NULLS, Chain
from invertune.store import Artifact
from invertune.target_identification import Increase, ranked_increases

IDENTIFICATION_TABLES = {
    "badnet": "table6",
    "blended": "table7",
    "sig": "table8",
    "wanet": "table9",
    "badencoder": "table10",
    "badclip": "table11",
}
LAYER_TABLES = {"RN50": "table12", "RN101": "table13", "ViT-B-16": "table14", "ViT-B-32": "table15"}


def results_folder(chain: Chain) -> Path:
    """results/PROFILE, where results.csv and the executed notebooks go."""
    return REPOSITORY / "results" / chain.settings.profile


def figures_folder(chain: Chain) -> Path:
    """figures/PROFILE, where tables and figures go."""
    return REPOSITORY / "figures" / chain.settings.profile


def record(chain: Chain, rows: Sequence[dict[str, str]]) -> pd.DataFrame:
    """Merges rows into results.csv and their artifacts' costs into runs.csv."""
    folder = results_folder(chain)
    keys = dict.fromkeys(r["key"] for r in rows if (chain.store / r["key"]).is_dir())
    write_runs([_run(Artifact(key, chain.store / key)) for key in keys], folder / "runs.csv")
    return write_rows(rows, folder / "results.csv")


def _run(artifact: Artifact) -> dict[str, Any]:
    meta = artifact.meta
    versions = ";".join(f"{k}={v}" for k, v in meta["versions"].items())
    return {
        "key": artifact.key,
        "step": meta["step"],
        "seconds": meta["seconds"],
        "peak_mb": meta["peak_mb"],
        "device": meta["device"],
        "versions": versions,
        "commit": meta["commit"] or "",
    }


def _base(chain: Chain, attack: str, seed: int, key: str, **columns: Any) -> dict[str, Any]:
    own = chain.settings
    return {
        "profile": own.profile,
        "backbone": own.backbone,
        "attack": attack,
        "target": own.target,
        "seed": seed,
        "key": key,
        **columns,
    }


def _rates(artifact: Artifact) -> dict[str, Rate]:
    return {name: Rate(*value) for name, value in artifact.metrics.items()}


def _grid(chain: Chain, nulls: bool = False) -> Iterable[tuple[str, int]]:
    names = (*NULLS, *chain.settings.attacks.names) if nulls else chain.settings.attacks.names
    return [(attack, seed) for attack in names for seed in chain.settings.seeds]


def attack_rows(chain: Chain) -> list[dict[str, str]]:
    """Notebook 01: CA and ASR of every undefended model, its floors and the clean model's null."""
    rows: list[dict[str, str]] = []
    clean = steps.pretrained(chain)
    for attack, seed in _grid(chain):
        model = steps.poisoned(chain, attack, seed)
        done = steps.evaluated(chain, model, model.trigger, model.key, seed)
        null = steps.evaluated(chain, clean, model.trigger, model.key, seed)
        floor = steps.evaluated(chain, model, None, "none", seed)
        base = _base(chain, attack, seed, done.key, defense="none")
        rows += _table1(done, base)
        drop = _rates(null)["zeroshot.ca.1"].value - _rates(done)["zeroshot.ca.1"].value
        shown: dict[str, Any] = {"paper_item": "extra", "task": "zeroshot", "k": 1}
        rows.append(row(**base, **shown, metric="ca_loss", value=drop))
        rows.append(
            rate_row(
                _rates(floor)["zeroshot.asr.1"],
                **{**base, "key": floor.key},
                **shown,
                metric="asr",
                variant="floor=untriggered",
            )
        )
        rows.append(
            rate_row(
                _rates(null)["zeroshot.asr.1"],
                **{**base, "key": null.key},
                **shown,
                metric="asr",
                variant="floor=clean_model",
            )
        )
    for attack, seed in ((a, s) for a in NULLS for s in chain.settings.seeds):
        model = steps.poisoned(chain, attack, seed)
        done = steps.evaluated(chain, model, None, "none", seed)
        base = _base(chain, attack, seed, done.key, defense="none")
        rows += [r for r in _table1(done, base, "extra") if r["metric"] == "ca"]
    return rows


def _table1(artifact: Artifact, base: dict[str, Any], item: str = "table1") -> list[dict[str, str]]:
    """CA and ASR rows of both tasks; other k and the all-images ASR are extras."""
    rows = []
    for name, rate in _rates(artifact).items():
        task, metric, k = name.split(".")
        if metric == "t2i":
            metric, variant = "ca", "direction=text_to_image"
        else:
            variant = ""
        main = metric in ("ca", "asr") and k == {"zeroshot": "1", "retrieval": "10"}[task]
        rows.append(
            rate_row(
                rate,
                **base,
                paper_item=item if main and not variant else "extra",
                task=task,
                metric=metric,
                k=k,
                variant=variant,
            )
        )
    return rows


def identification_rows(chain: Chain) -> list[dict[str, str]]:
    """Notebook 02: rank of the true target, and the twenty largest increases of every kind."""
    names = datasets.class_names(chain.settings.data)
    rows: list[dict[str, str]] = []
    for attack, seed in _grid(chain, nulls=True):
        done = steps.identified(chain, attack, seed)
        base = _base(chain, attack, seed, done.key, defense="none")
        ranking = done.metrics["ranking"]
        rank = ranking.index(chain.target) + 1 if chain.target in ranking else len(names)
        rows.append(
            row(**base, paper_item="extra", task="zeroshot", metric="target_rank", value=rank)
        )
        for place, (label, score) in enumerate(zip(ranking, done.metrics["scores"], strict=True)):
            size = _full_mask(chain) if score is None else score
            rows.append(
                row(
                    **base,
                    paper_item="extra",
                    task="zeroshot",
                    metric="mask_l1",
                    variant={"candidate": place + 1, "class": names[label]},
                    value=size,
                )
            )
        rows += _increase_rows(increases(done), names, IDENTIFICATION_TABLES.get(attack), base)
    return rows


def _increase_rows(
    found: dict[str, Increase], names: Sequence[str], table: str | None, base: dict[str, Any]
) -> list[dict[str, str]]:
    """Tables 6-11 from the perturbation that drives a class most; the other kinds as extras."""
    strongest = max(found, key=lambda kind: float(found[kind].points.max()))
    rows = []
    for kind, increase in found.items():
        for name, before, after, points in ranked_increases(increase, names):
            shared = {**base, "task": "zeroshot", "n": int(increase.clean.sum())}
            extra = {"class": name, "perturbation": kind}
            rows.append(
                row(**shared, paper_item="extra", metric="increase", variant=extra, value=points)
            )
            if table and kind == strongest:
                shared |= {"paper_item": table, "variant": {"class": name}}
                rows.append(row(**shared, metric="increase", value=points))
                rows.append(row(**shared, metric="clean_count", value=before))
                rows.append(row(**shared, metric="adversarial_count", value=after))
    return rows


def increases(artifact: Artifact) -> dict[str, Increase]:
    """Predicted counts under each kind of perturbation, from step 1's artifact."""
    return {
        kind: Increase(torch.tensor(c["clean"]), torch.tensor(c["adversarial"]))
        for kind, c in artifact.metrics["increases"].items()
    }


def largest_increases(chain: Chain, attack: str, seed: int) -> dict[str, float]:
    """Class name to its largest increase over the kinds of perturbation, in points."""
    found = increases(steps.identified(chain, attack, seed)).values()
    points = torch.stack([i.points for i in found]).amax(0).tolist()
    return dict(zip(datasets.class_names(chain.settings.data), points, strict=True))


def _full_mask(chain: Chain) -> int:
    """Number of mask entries: the size given to a run that never reached the ASR floor."""
    return 3 * chain.settings.data.image_size_px**2


def inversion_rows(chain: Chain) -> list[dict[str, str]]:
    """Notebook 03: inverted ASR on the evaluation set, mask size at equal ASR, beside the nulls."""
    rows: list[dict[str, str]] = []
    sizes: dict[tuple[str, int], float] = {}
    for attack, seed in _grid(chain, nulls=True):
        model, found = steps.poisoned(chain, attack, seed), steps.inverted(chain, attack, seed)
        trigger = steps.inverted_trigger(chain, found)
        fake = _rates(steps.evaluated(chain, model, trigger, found.key, seed))["zeroshot.asr.1"]
        base = _base(chain, attack, seed, found.key, defense="none", task="zeroshot")
        rows.append(rate_row(fake, **base, k=1, paper_item="figure5", metric="inverted_asr"))
        size = found.metrics["mask_l1_at_equal_asr"] or _full_mask(chain)
        sizes[attack, seed] = size
        rows.append(row(**base, paper_item="extra", metric="mask_l1", value=size))
        if attack != "none":
            ratio = size / sizes["none", seed]
            rows.append(row(**base, paper_item="extra", metric="mask_l1_ratio", value=ratio))
        if model.trigger is not None:
            real = _rates(steps.evaluated(chain, model, model.trigger, model.key, seed))
            asr = real["zeroshot.asr.1"]
            rows.append(rate_row(asr, **base, k=1, paper_item="figure5", metric="asr"))
            rows.append(
                row(
                    **base,
                    k=1,
                    paper_item="extra",
                    metric="asr_gap",
                    value=abs(asr.value - fake.value),
                )
            )
    return rows


def tuning_rows(chain: Chain) -> list[dict[str, str]]:
    """Notebook 04: layer impacts, and CA and ASR of the purified models (Tables 12 and 1)."""
    rows: list[dict[str, str]] = []
    for attack, seed in _grid(chain):
        suspect, model = steps.poisoned(chain, attack, seed), steps.purified(chain, attack, seed)
        before = _rates(steps.evaluated(chain, suspect, suspect.trigger, suspect.key, seed))
        done = steps.evaluated(chain, model, model.trigger, suspect.key, seed)
        base = _base(chain, attack, seed, done.key, defense="invertune")
        rows += _table1(done, base)
        for task, k in (("zeroshot", 1), ("retrieval", 10)):
            name = f"{task}.ca.{k}"
            rows.append(
                row(
                    **base,
                    paper_item="extra",
                    task=task,
                    k=k,
                    metric="ca_loss",
                    value=before[name].value - _rates(done)[name].value,
                )
            )
        rows += _layer_rows(chain, attack, seed)
    return rows


def _layer_rows(chain: Chain, attack: str, seed: int) -> list[dict[str, str]]:
    done = steps.tuned(chain, attack, seed)
    found = done.metrics
    item = LAYER_TABLES[chain.settings.backbone] if attack == "badclip" else "extra"
    base = _base(chain, attack, seed, done.key, defense="none", paper_item=item)
    rows = [
        row(**base, metric=f"layer_{name}", value=found[name])
        for name in ("mean", "std", "threshold")
    ]
    for layer, impact in found["impacts"].items():
        variant = {"layer": layer}
        rows.append(row(**base, metric="layer_impact", variant=variant, value=impact))
        selected = int(layer in found["layers"])
        rows.append(row(**base, metric="layer_selected", variant=variant, value=selected))
        if selected:
            rows.append(
                row(
                    **base,
                    metric="critical_neurons",
                    variant=variant,
                    value=found["neurons"][layer],
                )
            )
    return rows
