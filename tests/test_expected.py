"""Published numbers are valid while the committed code still gives their artifacts these keys."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from invertune import chain as chains
from invertune import comparison, defenses, reports, steps
from invertune import data as datasets
from invertune.evaluation import RECALL_KS
from invertune.models import load_embedded, locked_hash
from invertune.provenance import REPOSITORY
from invertune.settings import load_settings
from invertune.store import artifact_key

PUBLISHED = REPOSITORY / "expected" / "mini.csv"
LAYER = "visual.layer4"
RATE_NAMES = [
    *(f"{task}.ca.{k}" for task in ("zeroshot", "retrieval") for k in RECALL_KS),
    *(f"zeroshot.asr.{k}" for k in RECALL_KS),
    *("zeroshot.asr_all.1", "retrieval.asr.10"),
    *(f"retrieval.t2i.{k}" for k in RECALL_KS),
]


def published() -> list[dict[str, str]]:
    with PUBLISHED.open() as file:
        return list(csv.DictReader(file))


def found_targets(rows: list[dict[str, str]]) -> dict[tuple[str, int], str]:
    """What step 1 named on each model: the one result that later keys depend on."""
    first = "candidate=1;class="
    return {
        (r["attack"], int(r["seed"])): r["variant"].removeprefix(first)
        for r in rows
        if r["metric"] == "mask_l1" and r["variant"].startswith(first)
    }


def results_of(step: str, label: int, classes: int) -> dict[str, Any]:
    """The numbers that the rows read from an artifact of ``step``; all but ``label`` made up."""
    counts = [int(i == label) for i in range(classes)]
    return {
        "identification": {
            "ranking": [label],
            "scores": [1.0],
            "increases": {"ball_feature": {"clean": [1] * classes, "adversarial": counts}},
        },
        "inversion": {"mask_l1_at_equal_asr": 1.0, "target": label},
        "tuning": {
            **dict.fromkeys(("mean", "std", "threshold"), 1.0),
            **{"impacts": {LAYER: 1.0}, "layers": [LAYER], "neurons": {LAYER: 1}},
        },
        "baseline": {"images_seen": 1},
        "evaluation": {name: [50.0, 1, 0.0, 100.0] for name in RATE_NAMES},
    }.get(step, {})


def named_keys(
    seeds: list[int], targets: dict[tuple[str, int], str], store: Path, patch: pytest.MonkeyPatch
) -> set[str]:
    """Keys of all rows of notebooks 01 to 05, by the real steps, with nothing computed."""
    chain = chains.open_chain(load_settings("mini", {"seeds": seeds}), store)
    names = datasets.class_names(chain.settings.data)
    clean = chains.Model(load_embedded("RN50"), str(locked_hash("RN50")), None)

    def name_only(_root: Path, step: str, *given: Any, label: str, **_others: Any) -> Any:
        *identity, _compute, seed = given
        attack = label.split()[-3].rstrip(",") if step != "evaluation" else ""
        target = names.index(targets.get((attack, seed), chain.settings.target))
        zeros = defaultdict(lambda: torch.zeros(3, 64, 64))
        return SimpleNamespace(
            key=artifact_key(step, *identity),
            metrics=results_of(step, target, len(names)),
            tensors=lambda _name: zeros,
        )

    patch.setattr(chains, "obtain", name_only)
    for module in (steps, defenses):
        patch.setattr(module, "set_state", lambda *_: None)
    for module in (steps, reports):
        patch.setattr(module, "pretrained", lambda _chain: clean)
    makers = (
        reports.attack_rows,
        reports.identification_rows,
        reports.inversion_rows,
        reports.tuning_rows,
        comparison.comparison_rows,
        comparison.rebound_rows,
    )
    return {row["key"] for make in makers for row in make(chain)}


def stale(
    rows: list[dict[str, str]], store: Path, patch: pytest.MonkeyPatch
) -> list[dict[str, str]]:
    """Published rows whose artifacts the code would now make under other keys."""
    seeds = sorted({int(r["seed"]) for r in rows})
    valid = named_keys(seeds, found_targets(rows), store, patch)
    return [r for r in rows if r["key"] not in valid]


def test_no_published_row_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = published()
    assert {r["seed"] for r in rows} == {"4", "5", "6"}
    assert not stale(rows, tmp_path, monkeypatch)


def test_rows_of_a_changed_step_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chains.STEP_VERSIONS, "tuning", -1)
    found = stale(published(), tmp_path, monkeypatch)
    assert {r["defense"] for r in found} >= {"invertune"}
    assert not [r for r in found if r["metric"] in ("increase", "mask_l1")]
