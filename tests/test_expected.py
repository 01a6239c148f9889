"""Published numbers are valid while the committed code still gives their artifacts these keys."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from notebook_rows import ROWS

from invertune import chain as chains
from invertune import data as datasets
from invertune import passing_claims, reports, steps, triggers
from invertune.evaluation import RECALL_KS
from invertune.files import REPOSITORY
from invertune.sections import BACKBONES, EMBEDDED, Settings
from invertune.settings import load_settings, sweep_values
from invertune.store import artifact_key
from invertune.weights import load_clip, locked_hash

ONE = {"attacks": {"names": ["badclip"]}}
CASES: dict[str, dict[str, Any]] = {"mini": {}, "scenes224": ONE}
LAYER = "visual.layer4"
SWEPT = len(sweep_values(load_settings("mini"), "inversion", "lambda1")[1:])  # as of every weight
AT_EVERY_K = {str(k): [50.0, 1, 0.0, 100.0] for k in RECALL_KS}
STATE = {"step": 1, "inverted_asr": 50.0, "mask_l1": 1.0}
INVERTED = {"mask_l1_at_equal_asr": 1.0, "states": [STATE]}
RATE_NAMES = [
    *(f"{task}.ca.{k}" for task in ("zeroshot", "retrieval") for k in RECALL_KS),
    *(f"zeroshot.asr.{k}" for k in RECALL_KS),
    *("zeroshot.asr_all.1", "retrieval.asr.10"),
    *(f"retrieval.t2i.{k}" for k in RECALL_KS),
]


def published(profile: str = "mini") -> list[dict[str, str]]:
    with (REPOSITORY / "expected" / f"{profile}.csv").open() as file:
        return list(csv.DictReader(file))


def found_targets(rows: list[dict[str, str]]) -> dict[str, str]:
    """What step 1 named, by its artifact's key: the one result that most later keys depend on."""
    first = "candidate=1;class="
    return {r["key"]: r["variant"].split(first)[1] for r in rows if first in r["variant"]}


def results_of(step: str, label: int, classes: int, lr: float) -> dict[str, Any]:
    """The numbers that the rows read from an artifact of ``step``; all but two made up."""
    counts = [int(i == label) for i in range(classes)]
    return {
        "identification": {
            "ranking": [label],
            "scores": [1.0],
            "increases": {"ball_feature": {"clean": [1] * classes, "adversarial": counts}},
        },
        "inversion": {"target": label, **INVERTED},
        "second_round": {"inversion": INVERTED},
        "sweep": {"runs": [INVERTED] * SWEPT},
        "scores": {"ca": AT_EVERY_K, "asr": [AT_EVERY_K] * SWEPT, "ssim": [1.0] * SWEPT},
        "tuning": {
            "states": [{"lr": 1.0, "step": 1, "clean_accuracy": 50.0, "inverted_asr": 50.0}],
            **{"neurons": {LAYER: 1}, "log": []},
        },
        "impacts": {"impacts": {LAYER: 1.0}},
        "baseline": {"images_seen": 1, "lr": lr},
        "evaluation": {name: [50.0, 1, 0.0, 100.0] for name in RATE_NAMES},
    }.get(step, {})


def named_keys(
    settings: Settings, targets: dict[str, str], place: int, store: Path, patch: pytest.MonkeyPatch
) -> set[str]:
    """Keys of all rows of all notebooks (scenes224: of the first five), with nothing computed.

    Every baseline is taken to have chosen the rate at ``place`` (0: the largest) of its grid.
    """
    chain, size = chains.open_chain(settings, store), settings.data.image_size_px
    names = datasets.class_names(chain.settings.data)
    clean = {
        b: chains.Model(lambda b=b: load_clip(b, EMBEDDED)[0], str(locked_hash(b)), None)
        for b in BACKBONES
    }

    def name_only(_root: Path, step: str, *given: Any, **_others: Any) -> Any:
        version, settings, upstream, data, _compute, seed = given
        key = artifact_key(step, version, {**settings, "seed": seed}, upstream, data)
        known = [n for n in names if n != settings.get("lacks")]
        label = settings["target"] if step == "inversion" else known.index(targets.get(key, "ski"))
        rates = sorted(settings.get("lrs", [0]), reverse=True)
        shape = (SWEPT, 3, size, size) if step == "sweep" else (3, size, size)
        zeros = defaultdict(lambda: torch.zeros(shape))
        return SimpleNamespace(
            key=key,
            metrics=results_of(step, label, len(known), rates[: place + 1][-1]),
            tensors=lambda _name: zeros,
        )

    patch.setattr(chains, "obtain", name_only)
    patch.setattr(triggers, "required", lambda trigger, _: trigger)
    if settings.weights == EMBEDDED:
        for module in (steps, reports, passing_claims):
            patch.setattr(module, "pretrained", lambda c: clean[c.settings.backbone])
    ran = [name for name in ROWS if settings.profile == "mini" or name < "06"]
    return {row["key"] for name in ran for make in ROWS[name] for row in make(chain)}


def stale(
    profile: str, rows: list[dict[str, str]], store: Path, patch: pytest.MonkeyPatch
) -> list[dict[str, str]]:
    """Published rows whose artifacts the code would now make under other keys."""
    seeds = sorted({int(r["seed"]) for r in rows})
    settings = load_settings(profile, CASES[profile] | {"seeds": seeds})
    targets, most = found_targets(rows), len(settings.baselines.ft.lrs)
    found = [named_keys(settings, targets, i, store / str(i), patch) for i in range(most)]
    valid = set().union(*found)
    return [r for r in rows if r["key"] not in valid]


@pytest.mark.parametrize(("profile", "seeds"), [("mini", {"7", "8", "9"}), ("scenes224", {"1"})])
def test_no_published_row_is_stale(
    profile: str, seeds: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = published(profile)
    assert {r["seed"] for r in rows} == seeds
    assert not stale(profile, rows, tmp_path, monkeypatch)


def test_rows_of_a_changed_step_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chains.STEP_VERSIONS, "tuning", -1)
    found = stale("mini", published(), tmp_path, monkeypatch)
    assert {r["defense"] for r in found} >= {"invertune"}
    before = [r for r in found if r["defense"] == "none"]  # of steps 1 and 2
    assert not [r for r in before if r["metric"] in ("increase", "mask_l1")]
