"""The plan: exposures of every step."""

from __future__ import annotations

import pytest

from invertune.plan import planned
from invertune.settings import load_settings


def test_two_views_of_an_image_are_two_exposures() -> None:
    settings = load_settings("mini")
    steps = {w.step: w for w in planned(settings) if w.notebook == "05_baselines"}
    for name, views in (("ft", 1), ("par", 1), ("cleanclip", 2), ("cleanerclip", 2)):
        own = getattr(settings.baselines, name)
        assert steps[name].exposures == views * len(own.lrs) * own.steps * own.batch


@pytest.mark.parametrize(("weights", "runs"), [("embedded", []), ("pretrained", [1, 3])])
def test_every_backbone_is_pretrained_once(weights: str, runs: list[int]) -> None:
    settings = load_settings("mini", {"weights": weights, "seeds": [1, 2]})
    found = [w for w in planned(settings) if w.step == "pretraining"]
    assert [w.runs for w in found] == runs
    assert [w.notebook for w in found] == ["01_attacks", "06_generalization"][: len(runs)]
    steps = settings.pretraining.warm_start_steps + settings.pretraining.contrastive_steps
    assert all(w.exposures == 210 * steps for w in found)
