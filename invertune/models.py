"""One way to get a CLIP, its two encoders, and the zero-shot head.

Images enter the encoders as [N, 3, H, W] float32 in [0, 1]; normalization happens inside, once.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.fusion import fuse_conv_bn_eval

from invertune.files import REPOSITORY
from invertune.prefetch import Prefetcher

MODEL_FOLDER = REPOSITORY / "data" / "mini" / "models"
WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
MERGES = "merges.txt.gz"
MAX_CONFIG, MAX_MERGES = 10**6, 2**24  # bytes, of the merges unpacked
# What a described model may have at most, above the largest of open_clip's own.
LARGEST = {"layers": 64, "mlp_ratio": 16, "vocab_size": 2**20}
LARGEST_ELSE = 2048
LARGEST_GRID = 64  # patches along a side


@dataclass(frozen=True)
class Clip:
    """A CLIP with everything needed to use it.

    ``net`` is open_clip's module (``encode_image``, ``encode_text``, ``visual``, ``logit_scale``);
    ``tokenizer`` maps a list of strings to token ids [N, context]; ``mean`` and ``std`` are
    [1, 3, 1, 1]; ``image_size`` is in pixels. ``precision`` is what the towers' forward passes
    run in; weights, features, losses and metrics are float32 whatever it is.
    """

    backbone: str
    net: open_clip.CLIP
    tokenizer: Any
    mean: Tensor
    std: Tensor
    image_size: int
    precision: torch.dtype = torch.float32

    @property
    def device(self) -> torch.device:
        return self.mean.device


class ModelError(ValueError):
    """A model or weight file that cannot be used, with the reason and what would be right."""


def build_clip(folder: Path, backbone: str, device: torch.device | str = "cpu") -> Clip:
    """Builds the randomly initialized CLIP that ``folder`` describes (an open_clip local-dir).

    Raises ``ModelError`` where there is no such description, nothing can be built from it, or it
    asks for a model beyond all that are known.
    """
    config = read_config(folder / CONFIG)
    try:
        model, preprocess = config["model_cfg"], config.get("preprocess_cfg", {})
        _check_size(model)
        options: dict[str, Any] = {}
        merges = (folder / MERGES).resolve()
        if set(model["text_cfg"].get("tokenizer_kwargs", {})) - {"clean"}:
            raise ModelError("tokenizer_kwargs may hold clean only")
        if "hf_tokenizer_name" in model["text_cfg"]:
            options = {"trust_remote_code": False}
        elif merges.is_file():
            with gzip.open(merges) as file:
                if len(file.read(MAX_MERGES + 1)) > MAX_MERGES:
                    raise ModelError(f"{MERGES} has more than {MAX_MERGES:,} bytes unpacked")
            options = {"bpe_path": str(merges)}
        tokenizer = load_tokenizer(f"local-dir:{folder}", **options)
        return assemble(backbone, model, preprocess, tokenizer, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a foreign description can be wrong in many ways
        raise ModelError(f"no CLIP can be built from {folder / CONFIG}: {error}") from error


def read_config(path: Path) -> Any:
    """What a file with open_clip's configuration holds; ``ModelError`` where it cannot be one."""
    if not path.is_file():
        raise ModelError(f"not found: {path} (an open_clip local-dir)")
    if path.stat().st_size > MAX_CONFIG:
        raise ModelError(f"{path} is no configuration of open_clip: above {MAX_CONFIG:,} bytes")
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is not a configuration of open_clip") from None


def _check_size(model: Any) -> None:
    """Raises ``ModelError`` for a ``model_cfg`` with a number beyond the ``LARGEST``."""
    _check_numbers(model, "model_cfg")
    vision = model["vision_cfg"]
    resnet = isinstance(vision.get("layers"), list)  # has no patches; its stride is 32 px
    size, patch = vision.get("image_size", 224), vision.get("patch_size") or (32 if resnet else 16)
    if size > LARGEST_GRID * patch:
        raise ModelError(
            f"image_size = {size}, patch_size {patch}: at most {LARGEST_GRID} patches a side"
        )


def _check_numbers(value: Any, key: str) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_numbers(inner, name)
    elif isinstance(value, list):
        for inner in value:
            _check_numbers(inner, key)
    elif isinstance(value, int | float) and not abs(value) <= LARGEST.get(key, LARGEST_ELSE):
        limit = LARGEST.get(key, LARGEST_ELSE)
        raise ModelError(f"{key[:80]!r} = {value:.6g}, but at most {limit:,} is taken")


def load_tokenizer(source: str, **options: Any) -> Any:
    """open_clip's tokenizer of a model or "local-dir:FOLDER"; ``ModelError`` where it is missing.

    SigLIP's needs the package transformers and its files.
    """
    try:
        return open_clip.get_tokenizer(source, **options)
    except ImportError:
        raise ModelError(
            f"the tokenizer of {source} needs a package more: pip install transformers"
        ) from None
    except OSError as error:
        raise ModelError(f"the tokenizer of {source} is not here: {error}") from error


def assemble(
    backbone: str,
    model: Mapping[str, Any],
    preprocess: Mapping[str, Any],
    tokenizer: Any,
    device: torch.device | str,
) -> Clip:
    """A random CLIP from open_clip's ``model_cfg`` and the mean and std of its images.

    Text towers must be open_clip's own, image towers too or timm's; nothing is ever downloaded.
    """
    config = copy.deepcopy(dict(model))
    custom, trunk = config.pop("custom_text", False), config["vision_cfg"].get("timm_model_name")
    if "multimodal_cfg" in config or "hf_model_name" in config["text_cfg"] or ":" in (trunk or ""):
        raise ModelError("CoCa, text towers of transformers and foreign trunks are not supported")
    if trunk:
        config["vision_cfg"]["timm_model_pretrained"] = False
    net = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
    net.logit_bias = None  # SigLIP's moves all logits alike: nothing here depends on it
    usual = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    given = {key: preprocess.get(key, values) for key, values in usual.items()}
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)
        for values in given.values()
    )
    if not (mean.isfinite() & std.isfinite() & (std > 0)).all():
        raise ModelError(f"{given}: mean and std must be finite, and std above 0")
    net = net.eval().to(device, memory_format=torch.channels_last)
    size = int(config["vision_cfg"].get("image_size", 224))
    return Clip(backbone, net, tokenizer, mean, std, size)


def set_state(clip: Clip, state: dict[str, Tensor], source: str = "weights") -> None:
    """Copies ``state`` into the model after checking every name and shape (``ModelError``)."""
    check_state(clip, state, source)
    current = clip.net.state_dict()
    clip.net.load_state_dict({k: v.to(current[k].dtype) for k, v in state.items()})


def check_state(clip: Clip, state: dict[str, Tensor], source: str) -> None:
    """Raises ``ModelError`` with the first name or shape in ``state`` that does not fit."""
    current = clip.net.state_dict()
    for name, tensor in current.items():
        if name not in state:
            raise ModelError(f"{source} lacks {name}: not a {clip.backbone} of this configuration")
        if state[name].shape != tensor.shape:
            raise ModelError(
                f"{source}: {name} is {tuple(state[name].shape)}, but this "
                f"{clip.backbone} needs {tuple(tensor.shape)}"
            )
    extra = sorted(set(state) - set(current))
    if extra:
        raise ModelError(f"{source} has {extra[0]}, which this {clip.backbone} does not have")


def save_weights(clip: Clip, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes the weights as safetensors; floating-point tensors in ``dtype``."""
    state = {
        k: (v.to(dtype) if v.is_floating_point() else v).contiguous()
        for k, v in clip.net.state_dict().items()
    }
    path.write_bytes(save(state))  # save_file's may be read by their owner alone


def clone(clip: Clip) -> Clip:
    """A copy with its own weights; the original stays as it is."""
    return replace(clip, net=copy.deepcopy(clip.net))


def frozen_copy(clip: Clip) -> Clip:
    """A copy for many passes with fixed weights: eval mode, no weight gradients.

    Every batch norm is multiplied into the convolution defined right before it. Features stay the
    same but for rounding, and a pass saves reading and writing a map per layer, both ways.
    """
    frozen = clone(clip)
    frozen.net.eval().requires_grad_(False)
    for parent in list(frozen.net.modules()):
        for (name, layer), (after, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(layer, norm))
                setattr(parent, after, nn.Identity().eval())
    return frozen


def normalize(clip: Clip, images: Tensor) -> Tensor:
    """[0, 1] pixels to the model's input space, channels last in memory."""
    # In place: at these sizes every new tensor costs page faults.
    return (images - clip.mean).div_(clip.std).contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def forward_precision(clip: Clip) -> Iterator[None]:
    """Runs the enclosed code in ``clip.precision``: below float32, by autocast of float32 weights.

    Gradients reach the weights in float32. Every pass of a tower goes through here.
    """
    with contextlib.ExitStack() as inside:
        if clip.precision != torch.float32:
            inside.enter_context(torch.autocast(clip.device.type, clip.precision))
            if clip.device.type == "cpu":
                # torch's flash attention is slow there in bfloat16 (benchmarks/README.md).
                inside.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def image_features(clip: Clip, images: Tensor) -> Tensor:
    """Unit image features [N, D] of ``images`` [N, 3, H, W] in [0, 1]; differentiable."""
    pixels = normalize(clip, images)
    with forward_precision(clip):
        features = clip.net.encode_image(pixels)
    return F.normalize(features.float(), dim=-1)


def token_features(clip: Clip, tokens: Tensor) -> Tensor:
    """Unit text features [N, D] of token ids [N, context]; differentiable."""
    with forward_precision(clip):
        features = clip.net.encode_text(tokens.to(clip.device))
    return F.normalize(features.float(), dim=-1)


def text_features(clip: Clip, texts: Sequence[str]) -> Tensor:
    """Unit text features [N, D] of ``texts``; differentiable."""
    return token_features(clip, clip.tokenizer(list(texts)))


def text_digest(clip: Clip) -> str:
    """SHA-256 of all weights but the visual ones: equal digests, equal text features."""
    digest = hashlib.sha256(clip.backbone.encode())
    for name, tensor in clip.net.state_dict().items():
        if not name.startswith("visual."):
            digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def zero_shot_head(clip: Clip, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Class embeddings [C, D]: the unit mean of each class's unit template embeddings.

    ``templates`` hold one ``{}`` each, for the class name (CLIP, section 3.1.4).
    """
    texts = [template.format(name) for name in names for template in templates]
    features = embed_texts(clip, texts).view(len(names), len(templates), -1)
    return F.normalize(features.mean(1), dim=-1)


@torch.no_grad()
def embed_texts(clip: Clip, texts: Sequence[str]) -> Tensor:
    """Unit features [N, D] of many texts, 512 at a time."""
    chunks = [text_features(clip, texts[i : i + 512]) for i in range(0, len(texts), 512)]
    return torch.cat(chunks)


@torch.no_grad()
def embed_images(
    clip: Clip,
    images: Tensor,
    batch: int = 256,
    change: Callable[[Tensor], Tensor] = lambda pixels: pixels,
) -> Tensor:
    """Unit features [N, D] of many images (uint8 or float in [0, 1]), in batches, eval mode.

    ``change`` is what is done to each batch of pixels, float32 in [0, 1], e.g. a trigger.
    """
    clip.net.eval()
    parts = images.split(batch)
    ahead = Prefetcher(lambda i: (parts[i],), clip.device)
    pixels = (change(to_pixels(ahead(i)[0], clip.device)) for i in range(len(parts)))
    return torch.cat([image_features(clip, part) for part in pixels])


def to_pixels(images: Tensor, device: torch.device | str) -> Tensor:
    """uint8 images to float32 in [0, 1]; float images pass as they are."""
    images = images.to(device)
    return images.float().div_(255) if images.dtype == torch.uint8 else images
