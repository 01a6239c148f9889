"""The loops that optimize perturbations: a thread prepares their batches, and changes nothing."""

import functools

import pytest
import torch

from invertune import prefetch
from invertune.models import embed_images
from invertune.perturbations import View
from invertune.sections import EMBEDDED
from invertune.settings import load_settings
from invertune.target_identification import MAKERS
from invertune.weights import load_clip


@pytest.mark.parametrize("kind", ["patch_feature", "ball_prediction", "generator"])
def test_a_thread_prepares_the_same_batches(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    clip = load_clip("RN50", EMBEDDED)[0]
    settings = load_settings("mini", {"identification": {"steps": 3, "batch": 8}}).identification
    images = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8)
    features = embed_images(clip, images)
    view = View(clip, images, features, features.roll(1, 0))
    made = MAKERS[kind](view, settings, 0)
    monkeypatch.setattr(
        prefetch, "Prefetcher", functools.partial(prefetch.Prefetcher, threaded=True)
    )
    assert torch.equal(MAKERS[kind](view, settings, 0), made)
