"""InverTune on a model of one's own: the folder it leaves, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import QUICK
from PIL import Image

from invertune import data as datasets
from invertune.__main__ import main
from invertune.models import MODEL_FOLDER
from invertune.purify import PurifyError, _candidate, comparison, known_scores, purify
from invertune.sections import NULLS
from invertune.settings import load_settings
from invertune.store import entries
from invertune.weights import load_clip

DATA = load_settings("smoke").data


def test_the_folder_holds_the_purified_model_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INVERTUNE_STORE", str(tmp_path / "store"))
    suspect = shutil.copytree(MODEL_FOLDER / "RN50", tmp_path / "suspect")
    (suspect / "special_tokens_map.json").write_text("{}")  # as of a tokenizer of transformers
    settings = load_settings("smoke", {**QUICK, "weights": f"local-dir:{suspect}"})
    out = tmp_path / "purified"
    report = purify(settings, out, rounds=2)
    assert (out / "README.md").read_text() == report and (out / "trigger.png").is_file()
    assert report.startswith(f"# InverTune on local-dir:{suspect} (RN50)")
    assert (out / "special_tokens_map.json").read_text() == "{}"
    assert "| score |" in report and "## 1 Suspected target: " in report and "\n| 2 |" in report
    made = {a.meta["step"]: a for a in entries(tmp_path / "store")}
    clip, _ = load_clip("RN50", f"local-dir:{out}")
    kept = made["second_round"].tensors("weights")
    assert all(torch.equal(v, kept[k]) for k, v in clip.net.state_dict().items())
    before = load_clip("RN50", settings.weights)[0].net.state_dict()
    changed = {".".join(k.split(".")[:2]) for k, v in kept.items() if not torch.equal(v, before[k])}
    critical = {
        layer for step in ("tuning", "second_round") for layer in made[step].metrics["layers"]
    }
    assert changed and changed <= critical
    with pytest.raises(PurifyError, match="not an empty folder"):
        purify(settings, out)


def test_images_of_ones_own_are_all_that_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INVERTUNE_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("INVERTUNE_DATA", raising=False)
    names, store = datasets.class_names(DATA), tmp_path / "scenes"
    scenes = datasets.labeled_images(DATA, "inversion", 5 * len(names), store)
    for number, (image, label) in enumerate(zip(scenes.images, scenes.labels, strict=True)):
        if label < 20:
            folder = tmp_path / "images" / names[int(label)].replace(" ", "_")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    arguments = ["--images", str(tmp_path / "images"), "--out", str(tmp_path / "purified")]
    arguments += ["--overrides", json.dumps({**QUICK, "precision": "float32"})]
    assert main(["purify", f"local-dir:{MODEL_FOLDER}/RN50", "paper", *arguments]) == 2
    small = {"data": {**QUICK["data"], "image_size_px": 64}}
    arguments[-1] = json.dumps({**QUICK, **small, "device": "cpu", "precision": "float32"})
    assert main(["purify", f"local-dir:{MODEL_FOLDER}/RN50", "paper", *arguments]) == 0
    report = (tmp_path / "purified/README.md").read_text()
    assert f"20 classes, 60 images (images:{tmp_path}/images)" in report
    assert "on 20 others held out" in report and "a model known to be clean" in report


def test_an_empty_mask_is_not_taken_for_none() -> None:
    empty, none = (_candidate("ski", 60.0, size) for size in (0.0, None))
    assert (empty["mask L1"], empty["score"]) == (0.0, 0.0)
    assert (none["mask L1"], none["score"]) == ("never", "none")


def test_known_models_stand_beside_it() -> None:
    found = known_scores("RN50")
    attacked = [value for attack, value in found if attack not in NULLS]
    clean = [value for attack, value in found if attack in NULLS]
    assert len(attacked) >= 18 and len(clean) >= 6
    said = comparison(load_settings("mini"))
    assert f"{min(clean):.0f} to" in said and f"to {max(attacked):.0f}." in said
    assert "known to be clean" in comparison(load_settings("smoke"))
    other = load_settings("mini", {"weights": f"local-dir:{MODEL_FOLDER}/ViT-B-32"})
    assert "known to be clean" in comparison(other)


def test_the_backbone_is_the_folders_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("invertune.purify.purify", lambda settings, *_: seen.append(settings))
    command = ["purify", f"local-dir:{MODEL_FOLDER}/ViT-B-32", "--out", "purified"]
    assert main(command) == main([*command, "--overrides", "{backbone: RN101}"]) == 0
    assert [settings.backbone for settings in seen] == ["ViT-B-32", "RN101"]


@pytest.mark.parametrize("name", [".", "empty/..", "link"])
def test_a_folder_that_cannot_be_replaced_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(PurifyError, match="name a new one"):
        purify(load_settings("smoke"), Path(name))


def test_an_empty_folder_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["purify", "embedded", "smoke", "--images", "", "--out", "/tmp/none"]) == 2
    assert "data.source = 'images:'" in capsys.readouterr().err


def test_unknown_weights_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["purify", "nosuch", "smoke", "--out", str(tmp_path / "out")]) == 2
    assert "nosuch" in capsys.readouterr().err and not (tmp_path / "out").exists()
