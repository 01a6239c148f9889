"""The one door for checkpoints from outside: it lets in tensors and nothing else.

A suspected checkpoint is data from an attacker. Nothing in it is executed, and every refusal says
in one line what was refused and why.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from open_clip.transformer import QuickGELU
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from invertune.models import CONFIG, Clip, ModelError, check_state, read_config

# Versions before 2.10 can be made to run code in spite of weights_only (CVE-2026-24747).
SAFE_TORCH = (2, 10)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Sizes that OpenAI's files keep among the weights, and SigLIP's bias, which nothing here uses.
DESCRIPTION = frozenset({"input_resolution", "context_length", "vocab_size", "logit_bias"})


def import_checkpoint(path: Path, clip: Clip) -> dict[str, Tensor]:
    """The weights in ``path`` for ``clip``, checked and in float32; ``clip`` is not changed.

    Takes safetensors (by its suffix) or a file of ``torch.save`` with a state dict, bare or under
    "state_dict", with or without the "module." of DataParallel, in any floating-point type. Use
    the result with ``models.set_state``. Raises ``ModelError`` for a file that is missing,
    damaged, of another architecture or activation, holds values that are not finite, or anything
    but tensors.
    """
    if not path.is_file():
        raise ModelError(f"checkpoint not found: {path} is not a file")
    safe = path.suffix.lower() == ".safetensors"
    read = _read_safetensors(path) if safe else _read_torch(path, clip.backbone)
    state = _state_dict(read, path)
    scale, own_scale = state.get("logit_scale"), clip.net.logit_scale
    if scale is not None and scale.layout is torch.strided and scale.numel() == 1:
        state["logit_scale"] = scale.reshape(own_scale.shape)  # [] or [1]: both occur
    check_state(clip, state, str(path))
    _check_activation(clip, path.parent / CONFIG)
    return {k: _weight(f"{path}: {k}", state[k], own) for k, own in clip.net.state_dict().items()}


def _read_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} is not a readable safetensors file ({str(error)[:120]!r})"
        ) from None


def _read_torch(path: Path, backbone: str) -> Any:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < SAFE_TORCH:
        raise ModelError(
            f"{path} refused: reading it safely needs torch 2.10 or later, this is "
            f"{torch.__version__}; convert it to safetensors elsewhere"
        )
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path, backbone)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice there is to switch off the protection
            return torch.load(path, map_location="cpu", weights_only=True)
    except ModelError:
        raise
    except Exception as error:  # bytes of an attacker's choice can fail anywhere in the parsers
        calls = re.findall(r"GLOBAL (\S+)", str(error))
        if calls:
            raise _refused_calls(path, calls) from None
        raise ModelError(
            f"{path} refused: it is damaged, or not a checkpoint written by "
            f"torch.save ({type(error).__name__})"
        ) from None


def _check_archive(path: Path, backbone: str) -> None:
    """Looks into the zip file of ``torch.save`` without reading a single pickle."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise ModelError(
                f"{path} refused: it is a TorchScript archive, which holds code; for OpenAI's "
                f"weights use the open_clip tag {backbone}-quickgelu with pretrained 'openai'"
            )
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ModelError(f"{path} refused: it is a compressed zip, not written by torch.save")
        damaged = archive.testzip()
    if damaged:
        raise ModelError(f"{path} refused: it is damaged (checksum of {damaged})")
    calls = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if calls:
        raise _refused_calls(path, calls)


def _refused_calls(path: Path, calls: list[str]) -> ModelError:
    names = ", ".join(sorted(set(calls)))[:200]
    return ModelError(
        f"{path} refused: besides tensors its pickle asks for {names!r}, and nothing "
        "was run; save the state dict alone, best as safetensors"
    )


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The plain name -> tensor dictionary inside ``content``."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise ModelError(f"{path} holds a {type(content).__name__}, not a state dict with weights")
    content = {name: value for name, value in content.items() if name not in DESCRIPTION}
    for name, value in content.items():
        # Later messages show names as they are.
        if not isinstance(name, str) or not name.isprintable() or len(name) > 200:
            raise ModelError(f"{path}: {str(name)[:80]!r} is not a name of a weight")
        if not isinstance(value, Tensor):
            raise ModelError(
                f"{path}: {name[:80]!r} is a {type(value).__name__}, not a "
                "tensor; expected a state dict, bare or as 'state_dict'"
            )
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return content


def _weight(name: str, tensor: Tensor, own: Tensor) -> Tensor:
    """``tensor`` in the type of the model's ``own``, which has the same shape already."""
    dense = tensor.layout is torch.strided and tensor.device.type == "cpu"
    known = tensor.dtype in FLOATS if own.is_floating_point() else not tensor.is_floating_point()
    if not dense or tensor.is_quantized or not known:
        raise ModelError(
            f"{name} is {tensor.dtype} ({tensor.layout}, {tensor.device.type}), which "
            f"cannot become a dense {own.dtype}"
        )
    weight = tensor.detach().to(torch.float32 if own.is_floating_point() else own.dtype)
    if not torch.isfinite(weight).all():
        raise ModelError(f"{name} has values that are not finite")
    return weight.contiguous()


def _check_activation(clip: Clip, config: Path) -> None:
    """Compares the activation with open_clip's configuration beside the checkpoint, if any.

    The weights do not tell QuickGELU from GELU, and the wrong one costs accuracy silently.
    """
    if not config.is_file():
        return
    try:
        wanted = bool(read_config(config)["model_cfg"].get("quick_gelu", False))
    except (LookupError, TypeError, AttributeError):
        raise ModelError(f"{config} is not a configuration of open_clip") from None
    quick = any(isinstance(module, QuickGELU) for module in clip.net.modules())
    if wanted != quick:
        names = {True: "QuickGELU", False: "GELU"}
        raise ModelError(
            f"{config} says {names[wanted]}, but this {clip.backbone} has "
            f"{names[quick]}: build the model with that activation"
        )
