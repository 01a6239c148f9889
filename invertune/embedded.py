"""The shipped CLIPs of the embedded benchmark: how they are made, and their model cards.

One resumable command each: ``python -m invertune pretrain RN50``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from invertune import data as datasets
from invertune.chain import Chain, open_chain, pretrained
from invertune.evaluation import utility
from invertune.files import file_hash
from invertune.models import MODEL_FOLDER, WEIGHTS, Clip, ModelError, save_weights
from invertune.provenance import commit, versions
from invertune.sections import EMBEDDED, PRETRAINED
from invertune.settings import load_settings
from invertune.store import Artifact
from invertune.weights import EMBEDDED_PX, load_clip, record_hash


def pretrain_embedded(backbone: str, profile: str, overrides: Mapping[str, Any]) -> Path:
    """Pretrains one embedded CLIP and writes its weights (float16) and model card.

    ``overrides`` are nested settings that differ from the profile's; the card names both. Resumes
    after a kill, as every step of the store. Returns the model's folder.
    """
    own = {**overrides, "backbone": backbone, "weights": PRETRAINED}
    settings = load_settings(profile, own)
    if (size := settings.data.image_size_px) != EMBEDDED_PX:
        raise ModelError(f"data.image_size_px = {size}: the shipped models take {EMBEDDED_PX}")
    chain = open_chain(settings)
    model, folder = pretrained(chain), MODEL_FOLDER / backbone
    seconds = Artifact(model.key, chain.store / model.key).meta["seconds"]
    command = f"python -m invertune pretrain {backbone}"
    if profile != "mini":
        command += f" {profile}"
    if overrides:
        one_line = yaml.safe_dump(dict(overrides), default_flow_style=True, width=math.inf).strip()
        command += f" --overrides '{one_line}'"
    publish_weights(chain, model.clip, folder, f"{seconds / 3600:.2f}", command)
    return folder


def publish_weights(chain: Chain, clip: Clip, folder: Path, hours: str, command: str) -> None:
    """Writes float16 weights and the model card, with scores of float32 and float16 weights."""
    full = utility(chain, clip)
    save_weights(clip, folder / WEIGHTS, torch.float16)
    record_hash(clip.backbone, file_hash(folder / WEIGHTS))
    stored, _ = load_clip(clip.backbone, EMBEDDED, chain.device)
    half = utility(chain, replace(stored, precision=clip.precision))
    parameters = sum(p.numel() for p in clip.net.parameters())
    lines = [
        f"| {name} | {full[name].value:.2f} | {half[name].value:.2f} | {half[name].n} |"
        for name in full
    ]
    recipe = ", ".join(f"{k}: {v}" for k, v in chain.settings.pretraining)
    (folder / "README.md").write_text(
        CARD.format(
            backbone=clip.backbone,
            parameters=parameters,
            scores="\n".join(lines),
            hours=hours,
            command=command,
            recipe=recipe,
            seed=chain.settings.data.seed,
            pairs=chain.settings.data.pretraining_pairs,
            manifest=datasets.manifest(chain.settings.data),
            device=chain.device.type,
            versions=", ".join(f"{k} {v}" for k, v in versions().items()),
            commit=commit(),
            bytes=(folder / WEIGHTS).stat().st_size,
        )
    )


CARD = """# {backbone}-like CLIP of the embedded benchmark

A small CLIP that mirrors the family of OpenAI's {backbone}: {parameters:,} parameters, float16
safetensors of {bytes:,} bytes, an open_clip `local-dir:` folder. It knows pictograms only: never
read its behavior as that of a model of natural images. License: MIT.

- Command: `{command}` (resumable), seed {seed}, {hours} hours
  ({device}); code at commit {commit}; {versions}.
- Data: {pairs:,} caption pairs of the embedded benchmark (manifest {manifest:.12}).
- Recipe: a supervised warm start of the image tower on class labels, then contrastive training of
  both towers; {recipe}; batches show every class once.

| evaluation set (never trained on) | float32 | float16 | images or captions |
|---|---|---|---|
{scores}

Zero-shot top-1 is over 210 classes with 12 prompt templates; half of its images show drawings that
were never trained on. Recall@k: image to text, 1,000 two-object scenes, 5,000 captions.
"""
