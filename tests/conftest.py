"""Tests are quiet and use one small random CLIP where weights do not matter."""

import os

import pytest
from hypothesis import settings

settings.register_profile("invertune", deadline=None)  # machines may be busy
settings.load_profile("invertune")

os.environ.setdefault("INVERTUNE_PROGRESS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests that look at what notebooks leave behind the notebooks."""
    items.sort(key=lambda item: item.get_closest_marker("after_notebooks") is not None)
