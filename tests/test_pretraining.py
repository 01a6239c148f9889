"""Pretraining: balanced batches, augmentation, and a clean model that the profile trains itself."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from invertune.chain import open_chain, pretrained
from invertune.files import REPOSITORY
from invertune.models import WEIGHTS, ModelError
from invertune.sampling import balanced_indices
from invertune.settings import load_settings
from invertune.store import entries
from invertune.weights import untrained_clip


@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 3))
def test_a_balanced_batch_shows_every_class_once(classes: int, per_class: int, seed: int) -> None:
    labels = torch.arange(classes * per_class) * 5 % classes
    if len(labels[:classes].unique()) < classes:
        labels = torch.arange(classes * per_class) % classes
    epoch = [balanced_indices(labels, classes, seed, step) for step in range(per_class)]
    assert all(torch.equal(labels[rows].sort().values, torch.arange(classes)) for rows in epoch)
    assert len(torch.cat(epoch).unique()) == len(labels)


def test_weights_that_are_pretrained_here_are_made_once_and_found_again(tmp_path: Path) -> None:
    settings = load_settings("smoke", {"weights": "pretrained"})
    model = pretrained(open_chain(settings, tmp_path))
    (made,) = [a for a in entries(tmp_path) if a.meta["step"] == "pretraining"]
    assert made.key == model.key and {row["step"] for row in made.metrics["log"]} == {0, 1}
    torch.manual_seed(settings.data.seed)
    start, trained = untrained_clip("RN50", 64).net.state_dict(), model.clip.net.state_dict()
    towers = ("visual.conv1.weight", "transformer.resblocks.0.attn.in_proj_weight", "logit_scale")
    assert not any(torch.equal(start[name], trained[name]) for name in towers)
    again = pretrained(open_chain(settings, tmp_path))
    other = settings.model_copy(update={"backbone": "ViT-B-32"})
    assert again.key == model.key and not again.clip.net.training
    assert all(torch.equal(trained[k], v) for k, v in again.clip.net.state_dict().items())
    assert pretrained(open_chain(other, tmp_path)).key != model.key


def test_the_command_writes_weights_that_load_and_a_card_that_names_it(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for folder in ("invertune", "params", "data"):
        shutil.copytree(REPOSITORY / folder, copy / folder)
    env = {**os.environ, "PYTHONPATH": str(copy), "INVERTUNE_STORE": str(tmp_path / "store")}
    run = functools.partial(subprocess.run, cwd=copy, env=env, check=True)
    weights = copy / "data" / "mini" / "models" / "ViT-B-32" / WEIGHTS
    before = weights.read_bytes()
    command = ["-m", "invertune", "pretrain", "ViT-B-32", "smoke", "--overrides"]
    run([sys.executable, *command, "{data: {seed: 1}}"])
    assert weights.read_bytes() != before
    card = weights.with_name("README.md").read_text()
    assert f"`python {' '.join(command)} '{{data: {{seed: 1}}}}'`" in card
    run([sys.executable, "-c", "from invertune.weights import *; load_clip('ViT-B-32', EMBEDDED)"])


def test_there_are_networks_for_two_image_sizes() -> None:
    assert untrained_clip("RN50", 64).image_size == 64
    with pytest.raises(ModelError, match="image_size_px = 96: there are networks for 64 and 224"):
        untrained_clip("RN50", 96)
