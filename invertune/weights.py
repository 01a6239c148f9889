"""Full-size CLIPs: the profile's ``weights``, read as safetensors and checked by their SHA-256.

``weights`` is "embedded", an open_clip tag of the backbone ("openai"), MODEL/TAG for any other
model of open_clip ("ViT-B-16-SigLIP/webli"), "local-dir:FOLDER" (open_clip's configuration and
safetensors), "file:CHECKPOINT" for weights of OpenAI's architecture of the backbone, or
"pretrained": trained here by the profile's own recipe (``chain.pretrained``). "{backbone}" in it
stands for the backbone's name. Images stay as the data made them: shortest side, center crop, at
the model's size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

from invertune.checkpoints import import_checkpoint
from invertune.files import REPOSITORY, file_hash, locked, write_atomic
from invertune.models import (
    CONFIG,
    MERGES,
    MODEL_FOLDER,
    WEIGHTS,
    Clip,
    ModelError,
    assemble,
    build_clip,
    image_features,
    load_tokenizer,
    set_state,
    text_features,
)
from invertune.sections import BACKBONES, EMBEDDED

OPENAI = "openai"
EMBEDDED_PX = 64  # image size of the shipped models
RESTORE = "restore it with: git checkout data/mini/models"
WEIGHTS_LOCK = REPOSITORY / "params" / "weights.lock"
CONFIGURATION = (".json", ".txt", ".model")  # of open_clip, and of a tokenizer of transformers


def load_clip(backbone: str, weights: str, device: torch.device | str = "cpu") -> tuple[Clip, str]:
    """The CLIP that ``weights`` names, float32 in eval mode, and the key of what it is.

    The key is the SHA-256 of the weights; where they are not described as the shipped model, or as
    OpenAI's, it is one of the weights and their description. A hub file may be downloaded; its hash
    is recorded the first time and must stay the same.
    Raises ``ModelError`` for weights that are unknown, missing, changed, or do not fit.
    """
    kind, place = _parts(backbone, weights)
    if kind == "tag":
        return _from_hub(backbone, place, device)
    if kind == "file":
        return _read(random_clip(backbone, OPENAI, device), Path(place)), file_hash(Path(place))
    folder, path = Path(place), Path(place) / WEIGHTS
    if weights == EMBEDDED and not path.is_file():
        raise ModelError(f"not found: {path}; {RESTORE}")
    clip, digest = _read(build_clip(folder, backbone, device), path), file_hash(path)
    if weights == EMBEDDED and digest != locked_hash(backbone):
        raise ModelError(
            f"{path} is not the file recorded in {WEIGHTS_LOCK.name} (its SHA-256 differs); "
            f"{RESTORE}"
        )
    return clip, _key(digest, _hashes(folder), _hashes(MODEL_FOLDER / backbone))


def _read(clip: Clip, path: Path) -> Clip:
    """``clip`` with the weights in ``path``; ``ModelError`` where it then encodes nothing."""
    set_state(clip, import_checkpoint(path, clip), str(path))
    pixels = torch.linspace(0, 1, 3 * clip.image_size**2, device=clip.device)
    try:
        with torch.no_grad():
            image = image_features(clip, pixels.view(1, 3, clip.image_size, clip.image_size))
            found = (image, text_features(clip, ["a photo"]), clip.net.logit_scale.exp())
            finite = all(bool(values.isfinite().all()) for values in found)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a foreign description can be wrong in many ways
        raise ModelError(f"{path}: its model encodes no image and text ({error})") from error
    if not finite:
        raise ModelError(f"{path}: features or exp(logit_scale) are not finite")
    return clip


def _key(digest: str, described: Any, usual: Any) -> str:
    """``digest`` of weights that are described as usual; else a hash of it and the description."""
    if described == usual:
        return digest
    return hashlib.sha256(json.dumps([digest, described], sort_keys=True).encode()).hexdigest()


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_hash(path) for path in configuration(folder)}


def configuration(folder: Path) -> Iterator[Path]:
    """The files of a local-dir that say what its weights mean: open_clip's, and the tokenizer's.

    Raises ``ModelError`` for a link that leads out of the folder, as those of the hub's cache to
    its blobs do not: whoever publishes a copy would publish the file it leads to.
    """
    root = folder.resolve()
    for path in folder.iterdir():
        if not path.is_file() or (path.name != MERGES and path.suffix not in CONFIGURATION):
            continue
        if not any(path.resolve().is_relative_to(p) for p in (root, root.parent.parent / "blobs")):
            raise ModelError(f"{path} leads out of its folder, to {path.resolve()}; copy it there")
        yield path


def random_clip(backbone: str, weights: str, device: torch.device | str = "cpu") -> Clip:
    """An untrained CLIP for the weights of a tag, with their activation: OpenAI's is QuickGELU."""
    name, config, pixels = _described(backbone, weights)
    return assemble(backbone, config, pixels, load_tokenizer(name), device)


def _described(backbone: str, weights: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """open_clip's model of a tag, its configuration, and the mean and std of its images."""
    name, described = _tagged(backbone, weights)
    config = open_clip.get_model_config(name)
    config["quick_gelu"] = described.get("quick_gelu", False)
    return name, config, {k: described[k] for k in ("mean", "std") if k in described}


def untrained_clip(backbone: str, size_px: int, device: torch.device | str = "cpu") -> Clip:
    """An untrained CLIP for images of 64 px (the embedded one's shape) or 224 px (OpenAI's)."""
    if size_px == EMBEDDED_PX:
        return build_clip(MODEL_FOLDER / backbone, backbone, device)
    if size_px == 224:
        return random_clip(backbone, OPENAI, device)
    raise ModelError(
        f"data.image_size_px = {size_px}: there are networks for {EMBEDDED_PX} and 224"
    )


def for_any_backbone(weights: str) -> bool:
    """Whether ``weights`` name another model for another backbone, and not always the same one."""
    return "{backbone}" in weights or not set(":/") & set(weights)


def local_dir(backbone: str, weights: str) -> Path | None:
    """The folder with open_clip's configuration that ``weights`` name; None for a tag or a file."""
    kind, place = _parts(backbone, weights)
    return Path(place) if kind == "local-dir" else None


def shipped_as(weights: str) -> str | None:
    """The backbone whose shipped model has the configuration of a folder; None for another's."""
    folder = local_dir("", weights)
    if folder is None or not (folder / CONFIG).is_file():
        return None
    held = {b: file_hash(MODEL_FOLDER / b / CONFIG) for b in BACKBONES}
    digest = file_hash(folder / CONFIG)
    return next((backbone for backbone, known in held.items() if known == digest), None)


def state(backbone: str, weights: str) -> str:
    """One line for ``check``: whether the weights are here, or how to get them; reads none."""
    kind, place = _parts(backbone, weights)
    if kind != "tag":
        path = Path(place) / WEIGHTS if kind == "local-dir" else Path(place)
        return f"{'found' if path.is_file() else 'MISSING'}: {path}"
    repository = _repository(_tagged(backbone, place)[1], place)
    if not isinstance(try_to_load_from_cache(repository, WEIGHTS), str):
        return f"not in the cache; the first run downloads it, or: {_command(repository)}"
    recorded = "recorded" if locked_hash(repository) else "not recorded yet"
    return f"found ({repository}), SHA-256 {recorded}"


def _parts(backbone: str, weights: str) -> tuple[str, str]:
    """("local-dir" or "file", path) or ("tag", tag); a shipped model is a local-dir."""
    if weights == EMBEDDED:
        return "local-dir", str(MODEL_FOLDER / backbone)
    named = weights.replace("{backbone}", backbone)
    kind, _, place = named.partition(":")
    return (kind, place) if place and kind in ("local-dir", "file") else ("tag", named)


def _tagged(backbone: str, weights: str) -> tuple[str, dict[str, Any]]:
    """open_clip's model and its description of the tag: hub repository, activation, mean, std."""
    name, _, tag = weights.rpartition("/")
    name = name or backbone
    found = open_clip.get_pretrained_cfg(name, tag)
    if not found:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "no weights"
        raise ModelError(
            f"weights = {weights!r}: for {name}, open_clip knows {known}; "
            "or give embedded, MODEL/TAG, local-dir:FOLDER or file:CHECKPOINT"
        )
    return name, found


def _from_hub(backbone: str, weights: str, device: torch.device | str) -> tuple[Clip, str]:
    repository = _repository(_tagged(backbone, weights)[1], weights)
    path = _hub_file(repository)
    digest, recorded = file_hash(path), locked_hash(repository)
    if recorded not in (None, digest):
        raise ModelError(
            f"{path} refused: its SHA-256 is {digest}, but {WEIGHTS_LOCK.name} records {recorded} "
            f"for {repository}; to download it again, delete {path.parents[2]}"
        )
    clip = _read(random_clip(backbone, weights, device), path)
    if recorded is None:
        record_hash(repository, digest)
        print(f"{repository}: SHA-256 {digest} recorded in {WEIGHTS_LOCK}", flush=True)
    described, usual = (_described(backbone, tag)[1:] for tag in (weights, OPENAI))
    return clip, _key(digest, described, usual)


def _repository(described: dict[str, Any], weights: str) -> str:
    repository = "/".join(described["hf_hub"].split("/")[:2])
    if not repository:
        raise ModelError(f"weights = {weights!r}: open_clip has them as a pickle only, not read")
    return repository


def _hub_file(repository: str) -> Path:
    """The safetensors in the cache of the hub, downloaded if need be; never another file.

    open_clip's own download would go on to a pickle where there is no safetensors file. What is
    in the cache is taken without asking the hub.
    """
    cached = try_to_load_from_cache(repository, WEIGHTS)
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(hf_hub_download(repository, WEIGHTS))
    except Exception as error:  # a network fails in many ways
        reason = str(error).strip().split("\n")[0][:120]
        folder = f"{constants.HF_HUB_CACHE}/models--{repository.replace('/', '--')}"
        raise ModelError(
            f"{WEIGHTS} of {repository} on the Hugging Face hub is not in {folder} and was not "
            f"downloaded ({type(error).__name__}: {reason}); where there is a network, run: "
            f"{_command(repository)}, and copy that folder here"
        ) from error


def _command(repository: str) -> str:
    return f"hf download {repository} {WEIGHTS}"


def locked_hash(name: str) -> str | None:
    """SHA-256 recorded for a shipped backbone or a hub repository; None for no record."""
    return json.loads(WEIGHTS_LOCK.read_text()).get(name)


def record_hash(name: str, digest: str) -> None:
    """Records the SHA-256 of a file that was just written or downloaded."""
    with locked(WEIGHTS_LOCK):
        known = json.loads(WEIGHTS_LOCK.read_text()) | {name: digest}
        write_atomic(WEIGHTS_LOCK, (json.dumps(known, indent=2, sort_keys=True) + "\n").encode())
