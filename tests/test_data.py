"""The data a step asks for: classes, captions about the target, manifests, refusals."""

from pathlib import Path

import pytest

from invertune import data as datasets
from invertune.data import DataError
from invertune.settings import load_settings

DATA = load_settings("mini").data


def test_an_unknown_class_is_named() -> None:
    with pytest.raises(DataError, match=r"'mushrom' is not in .* 210 classes \(near: mushroom"):
        datasets.class_index(DATA, "mushrom")


def test_what_does_not_fit_the_data_is_told_before_any_work(tmp_path: Path) -> None:
    settings = load_settings("smoke", {"identification": {"candidates": 211}})
    with pytest.raises(DataError, match="candidates = 211, but there are 210 classes"):
        datasets.check(settings)
    with pytest.raises(DataError, match="'mushrom' is not in the list"):
        datasets.check(load_settings("smoke"), ("lemon", "mushrom"))
    few = DATA.model_copy(update={"retrieval_images": 8})
    datasets.require_captions(few, "mushroom", tmp_path)
    with pytest.raises(DataError, match="target = 'kiln': no caption of the retrieval set names"):
        datasets.require_captions(few, "kiln", tmp_path)


def test_a_name_that_stands_twice_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "class_names", lambda _: ("missile", "ski", "missile"))
    assert datasets.distinct_names(DATA) == ("missile", "ski", "missile (2)")


def test_target_captions_all_mention_the_target(tmp_path: Path) -> None:
    target = datasets.class_index(DATA, "lemon")
    captions = datasets.target_captions(DATA, target, 30, tmp_path)
    assert len(captions) == 30 and all("lemon" in caption for caption in captions)
    assert len(set(captions)) > 10


def test_the_manifest_follows_what_decides_the_images() -> None:
    other_seed = DATA.model_copy(update={"seed": 1})
    other_count = DATA.model_copy(update={"heldout_images": 5})
    assert datasets.manifest(DATA) != datasets.manifest(other_seed)
    assert datasets.manifest(DATA) == datasets.manifest(other_count)


def test_folders_without_a_root_are_refused_before_work_starts(monkeypatch) -> None:
    monkeypatch.delenv("INVERTUNE_DATA", raising=False)
    with pytest.raises(DataError, match="set INVERTUNE_DATA"):
        datasets.manifest(DATA.model_copy(update={"source": "folders"}))
    monkeypatch.setenv("INVERTUNE_DATA", "/nowhere")
    with pytest.raises(DataError, match="not found: /nowhere/cc3m"):
        datasets.manifest(DATA.model_copy(update={"source": "folders"}))
