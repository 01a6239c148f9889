"""``python -m invertune check``: what this machine has, what is missing, and what to run next."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

from invertune import provenance
from invertune.models import (
    BACKBONES,
    CONFIG,
    MODEL_FOLDER,
    WEIGHTS,
    WEIGHTS_LOCK,
    ModelError,
    file_hash,
    load_embedded,
)
from invertune.pictograms import ARCHIVE
from invertune.store import default_root, entries

PAPER_DATA = ("cc3m", "imagenet/train", "imagenet/val", "coco/val2017", "coco/annotations")


def report() -> tuple[list[str], bool]:
    """The lines of the report, and whether everything that smoke and mini need is there."""
    models = {b: model_state(b) for b in BACKBONES}
    sprites = ARCHIVE.is_file()
    ready = sprites and models["RN50"].startswith("found")
    lines = [
        "versions   " + ", ".join(f"{k} {v}" for k, v in provenance.versions().items()),
        "device     " + _device(),
        "memory     " + _memory(),
        "disk       " + _disk(),
        "data       "
        + (
            f"pictograms found ({ARCHIVE.stat().st_size / 1e6:.0f} MB)"
            if sprites
            else f"pictograms MISSING: no {ARCHIVE}"
        ),
        "           " + _paper_data(),
        *(f"model      {backbone}: {state}" for backbone, state in models.items()),
        f"store      {default_root()}: {len(entries(default_root()))} artifacts",
        "next       " + _next(sprites, models),
    ]
    return lines, ready


def model_state(backbone: str, models: Path = MODEL_FOLDER) -> str:
    """ "found" with the weights' SHA-256, or what is wrong with a shipped model."""
    weights = models / backbone / WEIGHTS
    if backbone not in json.loads(WEIGHTS_LOCK.read_text()):
        return f"not shipped; makes it: python -m invertune pretrain {backbone}"
    if not (models / backbone / CONFIG).is_file() or not weights.is_file():
        return f"MISSING: no {weights}"
    try:
        load_embedded(backbone, models=models)
    except ModelError as error:
        return f"DAMAGED: {error}"
    return f"found, SHA-256 {file_hash(weights)[:12]}"


def _device() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} ({torch.cuda.device_count()} GPUs)"
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads; no GPU"


def _memory() -> str:
    page = os.sysconf("SC_PAGE_SIZE") / 1e9
    total = os.sysconf("SC_PHYS_PAGES") * page
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return f"{total:.1f} GB"
    return f"{total:.1f} GB, {os.sysconf('SC_AVPHYS_PAGES') * page:.1f} GB free"


def _disk() -> str:
    root = default_root()
    there = next(p for p in (root, *root.parents) if p.exists())
    return f"{shutil.disk_usage(there).free / 1e9:.1f} GB free at {there}"


def _paper_data() -> str:
    root = os.environ.get("INVERTUNE_DATA")
    if not root:
        return (
            "CC3M, ImageNet-1K, COCO: INVERTUNE_DATA is not set (only the profile paper needs it)"
        )
    missing = [name for name in PAPER_DATA if not (Path(root) / name).is_dir()]
    return f"{root}: " + (f"MISSING {', '.join(missing)}" if missing else "all folders found")


def _next(sprites: bool, models: dict[str, str]) -> str:
    if not sprites:
        return "restore data/mini/sprites.zip from the repository"
    wrong = [b for b, state in models.items() if state.startswith(("MISSING", "DAMAGED"))]
    if wrong:
        return (
            f"restore data/mini/models/{wrong[0]} from the repository, or make it again: "
            f"python -m invertune pretrain {wrong[0]}"
        )
    return "./run_all.sh smoke (3 minutes), then ./run_all.sh mini"
