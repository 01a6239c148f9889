"""Tests are quiet and use one small random CLIP where weights do not matter."""

import os

from hypothesis import settings

settings.register_profile("invertune", deadline=None)  # machines may be busy
settings.load_profile("invertune")

os.environ.setdefault("INVERTUNE_PROGRESS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
