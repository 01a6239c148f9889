"""The shipped CLIP: it loads, knows its classes, encodes any word, and refuses damaged files."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from invertune import data as datasets
from invertune import weights
from invertune.models import (
    MODEL_FOLDER,
    WEIGHTS,
    ModelError,
    embed_images,
    embed_texts,
    zero_shot_head,
)
from invertune.pictograms import labeled_scene
from invertune.sections import EMBEDDED
from invertune.settings import load_settings
from invertune.sprites import load_sprites
from invertune.weights import load_clip


def test_the_shipped_model_names_what_it_sees() -> None:
    data, sprites = load_settings("mini").data, load_sprites()
    clip = load_clip("RN50", EMBEDDED)[0]
    scenes = [labeled_scene("heldout", i, 64, data.seed, sprites, False) for i in range(210)]
    images = torch.stack([torch.from_numpy(s.image).permute(2, 0, 1) for s in scenes])
    labels = torch.tensor([s.objects[0] for s in scenes])
    head = zero_shot_head(clip, datasets.class_names(data), datasets.templates(data))
    top1 = (embed_images(clip, images) @ head.T).argmax(1) == labels
    assert top1.float().mean() > 0.8


def test_any_word_encodes_to_unit_features() -> None:
    clip = load_clip("RN50", EMBEDDED)[0]
    features = embed_texts(clip, ["a photo of a mushroom", "Zwölf 漢字 qwxz!", "", "dog " * 50])
    assert torch.isfinite(features).all()
    assert torch.allclose(features.norm(dim=1), torch.ones(4), atol=1e-5)
    tokens = clip.tokenizer(["dog " * 50])
    assert tokens.shape == (1, 20) and tokens[0].argmax() == 19  # the end token survives


def test_one_flipped_bit_in_the_weights_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "MODEL_FOLDER", tmp_path)
    shutil.copytree(MODEL_FOLDER / "RN50", tmp_path / "RN50")
    path = tmp_path / "RN50" / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match="its SHA-256 differs"):
        load_clip("RN50", EMBEDDED)
    path.write_bytes(content[:-5000])
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load_clip("RN50", EMBEDDED)
    path.unlink()
    with pytest.raises(ModelError, match=f"not found: {path}; restore it with"):
        load_clip("RN50", EMBEDDED)


def test_hashes_recorded_at_once_are_all_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "WEIGHTS_LOCK", tmp_path / "weights.lock")
    weights.WEIGHTS_LOCK.write_text("{}")
    names = [f"model {number}" for number in range(60)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(weights.record_hash, names, names))
    assert json.loads(weights.WEIGHTS_LOCK.read_text()) == dict(zip(names, names, strict=True))
