"""Tests are quiet; settings that several of them share."""

import os
import time
from collections.abc import Callable

import pytest
from hypothesis import settings

settings.register_profile("invertune", deadline=None)  # machines may be busy
settings.load_profile("invertune")

os.environ.setdefault("INVERTUNE_PROGRESS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# One barely trained attack and the shortest defense: for tests of what is around the steps.
QUICK = {
    "attacks": {"names": ["blended"], "blended": {"steps": 3}},
    "data": {"heldout_images": 105, "evaluation_images": 105, "retrieval_images": 20},
    "identification": {"kinds": ["patch_feature"], "candidates": 1, "steps": 1, "batch": 8},
    "inversion": {"steps": 2, "measure_every_steps": 1, "batch": 8},
    "tuning": {"steps": 2, "measure_every_steps": 1, "images": 8, "batch": 8},
}

# The same for notebook 06, whose attack is BadCLIP.
QUICK_CASES = {
    "data": {"poisoning_pairs": 210, "evaluation_images": 210, "retrieval_images": 20},
    "attacks": {"names": ["badclip"], "badclip": {"steps": 2, "patch_steps": 2}},
    "identification": {"kinds": ["patch_feature"], "steps": 1, "check_steps": 1},
    "inversion": {"steps": 2, "measure_every_steps": 2},
    "tuning": {"steps": 2, "measure_every_steps": 2},
    "baselines": {"ft": {"steps": 1, "lrs": [0.002, 0.001]}},
    "generalization": {"backbones": ["RN101"], "baseline_lrs": 1},
}


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Waits for something that another process does."""
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, f"{what}: waited for 240 s in vain"
        time.sleep(0.02)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests that look at what notebooks leave behind the notebooks."""
    items.sort(key=lambda item: item.get_closest_marker("after_notebooks") is not None)
