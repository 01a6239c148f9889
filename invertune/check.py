"""``python -m invertune check``: what this machine has, what is missing, and what to run next."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
import torch

from invertune import provenance, real_data, weights
from invertune.chain import no_gpu
from invertune.files import file_hash
from invertune.layouts import EXPECTED
from invertune.models import CONFIG, MODEL_FOLDER, WEIGHTS, ModelError
from invertune.sections import BACKBONES, EMBEDDED
from invertune.settings import load_settings
from invertune.sprites import ARCHIVE
from invertune.store import default_root, entries


def report() -> tuple[list[str], bool]:
    """The lines of the report, and whether everything that smoke and mini need is there."""
    models = {b: _model(b) for b in BACKBONES}
    sprites, store = ARCHIVE.is_file(), default_root()
    disk = next(p for p in (store, *store.parents) if p.exists())
    lines = [
        f"versions   {', '.join(f'{k} {v}' for k, v in provenance.versions().items())}",
        f"device     {_device()}",
        f"memory     {_memory()}",
        f"disk       {shutil.disk_usage(disk).free / 1e9:.1f} GB free at {disk}",
        f"data       pictograms {'found' if sprites else 'MISSING'}: {ARCHIVE}",
        *(f"           {line}" for line in _paper_data()),
        *(f"model      {backbone}: {state}" for backbone, state in models.items()),
        *(f"weights    {line}" for line in _paper_weights()),
        f"store      {store}: {len(entries(store))} artifacts",
        f"next       {_next(sprites, models)}",
    ]
    return lines, sprites and not _wrong(models)


def _wrong(models: dict[str, str]) -> list[str]:
    """The shipped models that are not as they were shipped."""
    return [b for b, state in models.items() if state.startswith(("MISSING", "DAMAGED"))]


def _model(backbone: str) -> str:
    """ "found" with the weights' SHA-256, or what is wrong with a shipped model."""
    folder = MODEL_FOLDER / backbone
    path = folder / WEIGHTS
    if weights.locked_hash(backbone) is None:
        return f"not shipped; makes it: python -m invertune pretrain {backbone}"
    if not (folder / CONFIG).is_file() or not path.is_file():
        return f"MISSING: no {path}"
    try:
        weights.load_clip(backbone, EMBEDDED)
    except ModelError as error:
        return f"DAMAGED: {error}"
    return f"found, SHA-256 {file_hash(path)[:12]}"


def _device() -> str:
    if not (why := no_gpu()):
        return f"{torch.cuda.get_device_name()} ({torch.cuda.device_count()} GPUs)"
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {why}"


def _memory() -> str:
    free = provenance.free_bytes()
    return f"{psutil.virtual_memory().total / 1e9:.1f} GB, {free / 1e9:.1f} GB free"


def _paper_data() -> list[str]:
    """What profile paper needs besides: the layouts of its data, and room to decode them."""
    settings, root = load_settings("paper"), os.environ.get("INVERTUNE_DATA")
    pairs = settings.data.poisoning_pairs
    room = (
        f"profile paper decodes its images once into the store: "
        f"{real_data.decoded_bytes(settings) / 1e9:.0f} GB in all, "
        f"{pairs * 3 * settings.data.image_size_px**2 / 1e9:.0f} GB for {pairs:,} pairs"
    )
    if not root:
        lines = [f"{name}: {layout}" for name, layout in EXPECTED.items()]
        return [
            "INVERTUNE_DATA is not set; only profile paper needs it. It must hold",
            *lines,
            room,
        ]
    missing = list(real_data.problems(Path(root)))
    held = [name for name in EXPECTED if not any(p.startswith(f"{name}:") for p in missing)]
    lines = [f"found in {root}: {', '.join(held) or 'nothing'}", *(f"MISSING {p}" for p in missing)]
    return [*lines, room]


def _paper_weights() -> list[str]:
    """Profile paper's weights of each backbone: in the cache and recorded, or how to get them."""
    own = load_settings("paper").weights
    return [f"profile paper, {own}, {b}: {weights.state(b, own)}" for b in BACKBONES]


def _next(sprites: bool, models: dict[str, str]) -> str:
    if not sprites:
        return "restore data/mini/sprites.zip from the repository"
    if wrong := _wrong(models):
        return (
            f"restore data/mini/models/{wrong[0]} from the repository, or make it again: "
            f"python -m invertune pretrain {wrong[0]}"
        )
    return "./run_all.sh smoke (3 minutes), then ./run_all.sh mini"
