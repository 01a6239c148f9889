"""The layers of an image encoder, the neurons that answer to a trigger, the weights behind them.

Paper, section 3.3 and algorithm 2, lines 3-27. Images are [N, 3, H, W], uint8 or float32 in
[0, 1]; an activation map is [C, H, W] for a ResNet stage and [tokens, width] for a ViT block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from threadpoolctl import threadpool_limits
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from invertune.models import Clip, ModelError, forward_precision, normalize, to_pixels
from invertune.sections import Tuning

BATCH = 256
CACHE_BYTES = 2 * 2**30
OUTPUTS = {"conv3", "bn3", "downsample", "out_proj", "c_proj", "proj", "fc2"}  # the last: timm's


@dataclass(frozen=True)
class Selection:
    """Statistics of the layer impacts (population std) and the critical ``layers`` in order."""

    mean: float
    std: float
    threshold: float
    layers: tuple[str, ...]


def _stem_layers_head(
    clip: Clip,
) -> tuple[Callable[..., Tensor], dict[str, nn.Module], Callable[..., Tensor]]:
    """The image encoder as stem, layers by parameter prefix, and head, to be run in this order."""
    visual = clip.net.visual
    if isinstance(visual, ModifiedResNet):
        stages = {k: m for k, m in visual.named_children() if isinstance(m, nn.Sequential)}
        return visual.stem, {f"visual.{k}": m for k, m in stages.items()}, visual.attnpool
    if isinstance(visual, VisionTransformer) and visual.transformer.batch_first:
        blocks = visual.transformer.resblocks.named_children()

        def head(tokens: Tensor) -> Tensor:
            pooled = visual._pool(tokens)[0]
            return pooled if visual.proj is None else pooled @ visual.proj

        return visual._embeds, {f"visual.transformer.resblocks.{k}": m for k, m in blocks}, head
    trunk = getattr(visual, "trunk", visual)
    if isinstance(visual, TimmModel) and isinstance(trunk, timm_vit.VisionTransformer):
        blocks = trunk.blocks.named_children()

        def stem(x: Tensor) -> Tensor:
            return trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(x))))

        def timm_head(tokens: Tensor) -> Tensor:
            return visual.head(trunk.forward_head(trunk.norm(tokens)))

        return stem, {f"visual.trunk.blocks.{k}": m for k, m in blocks}, timm_head
    raise ModelError(
        f"no candidate layers in an image encoder of type {type(trunk).__name__}; "
        "a ModifiedResNet or a batch-first VisionTransformer (of open_clip or timm) is needed"
    )


def candidate_layers(clip: Clip) -> dict[str, nn.Module]:
    """ResNet stages or ViT blocks, by their full names, first to last (tables 12-15).

    Raises ``ModelError`` for an image encoder that is neither.
    """
    return _stem_layers_head(clip)[1]


def prefix_to(clip: Clip, pixels: Tensor, first: str | None) -> Tensor:
    """The input of layer ``first`` (None: of the encoder) for ``pixels`` in [0, 1]."""
    hidden = normalize(clip, pixels)
    if first is None:
        return hidden
    stem, layers, _ = _stem_layers_head(clip)
    names = list(layers)
    with forward_precision(clip):
        hidden = stem(hidden)
        for name in names[: names.index(first)]:
            hidden = layers[name](hidden)
    return hidden


def maps_from(
    clip: Clip, hidden: Tensor, first: str | None, last: str | None = None
) -> dict[str, Tensor]:
    """Activation maps [N, *map], float32, of layer ``first`` (None: of the first) to ``last``.

    ``hidden`` is what ``prefix_to`` gives for the same layer. ``last`` None: to the last layer.
    """
    stem, layers, _ = _stem_layers_head(clip)
    names, maps = list(layers), {}
    start = names.index(first) if first else 0
    with forward_precision(clip):
        hidden = hidden if first else stem(hidden)
        for name in names[start : names.index(last) + 1 if last else None]:
            hidden = layers[name](hidden)
            maps[name] = hidden.float()
    return maps


def tail_from(clip: Clip, hidden: Tensor, first: str | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Unit image features [N, D] from the input of layer ``first``, and the maps on the way.

    ``tail_from(c, prefix_to(c, x, l), l)[0]`` equals ``image_features(c, x)``: while nothing before
    ``first`` changes, its input needs to be computed only once.
    """
    maps, head = maps_from(clip, hidden, first), _stem_layers_head(clip)[2]
    with forward_precision(clip):
        features = head(list(maps.values())[-1])
    return nn.functional.normalize(features.float(), dim=-1), maps


def batched_inputs(
    prefix: Callable[[Tensor], Tensor],
    images: Tensor,
    device: torch.device,
    limit: int = CACHE_BYTES,
) -> Callable[[], Iterable[Tensor]]:
    """A function that yields what ``in_batches`` yields.

    Results that take at most ``limit`` bytes in all are computed once and kept on the device;
    larger ones are computed anew at every call.
    """
    with torch.no_grad():
        one = prefix(to_pixels(images[:1], device))
    if one.nbytes * len(images) > limit:
        return partial(in_batches, prefix, images, device)
    kept = list(in_batches(prefix, images, device))
    return lambda: kept


@torch.no_grad()
def in_batches(
    prefix: Callable[[Tensor], Tensor], images: Tensor, device: torch.device
) -> Iterator[Tensor]:
    """``prefix`` of the images' pixels, 256 images at a time, without gradient."""
    for part in images.split(BATCH):
        yield prefix(to_pixels(part, device))


@torch.no_grad()
def mean_activations(clip: Clip, images: Tensor) -> dict[str, Tensor]:
    """mu: the mean over images of the whole map of each candidate layer, float32, eval mode."""
    clip.net.eval()
    sums: dict[str, Tensor] = {}
    for hidden in in_batches(partial(normalize, clip), images, clip.device):
        for name, map_ in maps_from(clip, hidden, None).items():
            part = map_.double().sum(0)
            sums[name] = sums[name] + part if name in sums else part
    return {name: (total / len(images)).float() for name, total in sums.items()}


def layer_impacts(clean: Mapping[str, Tensor], triggered: Mapping[str, Tensor]) -> dict[str, float]:
    """Eq. 8: ||mu_clean - mu_triggered|| / ||mu_clean|| of every layer, over the whole map."""
    return {k: ((mu - triggered[k]).norm() / mu.norm()).item() for k, mu in clean.items()}


def critical_layers(impacts: Mapping[str, float], rule: str = "mean_plus_std") -> Selection:
    """The layers whose impact exceeds mean + population std; if none does, the largest one.

    The strict inequality can be empty: two equal layers among four put the threshold exactly on
    themselves. ``rule`` "top3" takes the three largest impacts, as the released code does.
    """
    values = torch.tensor(list(impacts.values()), dtype=torch.float64)
    mean, std = values.mean().item(), values.std(correction=0).item()
    ranked = sorted(impacts, key=lambda name: -impacts[name])
    above = {name for name in impacts if impacts[name] > mean + std}
    chosen = set(ranked[:3]) if rule == "top3" else above or set(ranked[:1])
    return Selection(mean, std, mean + std, tuple(name for name in impacts if name in chosen))


def critical_neurons(
    clean: Tensor, triggered: Tensor, seed: int, neuron: str = "channel", clusters: int = 2
) -> Tensor:
    """The neurons of one layer that answer to the trigger: k-means on |mu_clean - mu_triggered|.

    ``clean`` and ``triggered`` are mean maps. A neuron is an output channel [C] or width index [W]
    (its difference: the mean over positions), or with ``neuron`` "unit" each unit of the map.
    Returns a bool mask of that shape, True in all ``clusters`` but the one with the smallest
    centroid (of two: in the larger one); all True where every difference is the same.
    """
    difference = (clean - triggered).abs().double()
    if neuron == "channel":
        difference = difference.mean((1, 2) if difference.ndim == 3 else 0)
    points = difference.flatten().cpu().numpy()[:, None]
    distinct = len(difference.unique())
    if distinct == 1:
        return torch.ones_like(difference, dtype=torch.bool)
    from sklearn.cluster import KMeans  # a second that finding everything need not wait for

    with threadpool_limits(limits=1):  # a few hundred numbers: more threads only get in the way
        found = KMeans(min(clusters, distinct), n_init=10, random_state=seed).fit(points)
    critical = torch.from_numpy(found.labels_ != found.cluster_centers_.argmin())
    return critical.view_as(difference).to(clean.device)


def critical_channels(neurons: Tensor) -> Tensor:
    """Bool [C] or [W]: the output channels or width indices that hold any critical neuron."""
    if neurons.ndim == 1:
        return neurons
    return neurons.flatten(1).any(1) if neurons.ndim == 3 else neurons.any(0)


def unit_mask(neurons: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool mask of critical neurons spread over an activation map of ``shape``."""
    if neurons.ndim == 1 and len(shape) == 3:
        neurons = neurons[:, None, None]
    return neurons.expand(*shape)


def impacts_of(
    clip: Clip, clean: Tensor, triggered: Tensor
) -> tuple[dict[str, float], dict[str, Tensor], dict[str, Tensor]]:
    """Eq. 8 for every candidate layer, with the mean maps that it compares: clean, triggered."""
    mu_clean, mu_triggered = (mean_activations(clip, x) for x in (clean, triggered))
    return layer_impacts(mu_clean, mu_triggered), mu_clean, mu_triggered


def locate(
    clip: Clip, clean: Tensor, triggered: Tensor, settings: Tuning, seed: int
) -> tuple[dict[str, float], Selection, dict[str, Tensor]]:
    """Phases 1 and 2: layer impacts, critical layers, and the critical neurons of each."""
    impacts, mu_clean, mu_triggered = impacts_of(clip, clean, triggered)
    selection = critical_layers(impacts, settings.layer_rule)
    neurons = {
        layer: critical_neurons(
            mu_clean[layer], mu_triggered[layer], seed, settings.neuron, settings.clusters
        )
        for layer in selection.layers
    }
    return impacts, selection, neurons


def trainable_rows(clip: Clip, layer: str, channels: Tensor) -> dict[str, Tensor]:
    """The parameters that write the output of ``layer``, each with its bool mask of rows.

    ``channels`` is the bool mask [C] or [W] of critical channels. ResNet stage: conv3 and bn3 of
    every block and the downsample; ViT block: the last layer of attention and of the MLP. Rows
    transfer because the residual stream has the same channels in every block of a stage.
    """
    names = (name for name, _ in candidate_layers(clip)[layer].named_parameters())
    return {f"{layer}.{name}": channels for name in names if OUTPUTS & set(name.split("."))}


def rows_to_train(clip: Clip, neurons: Mapping[str, Tensor], trainable: str) -> dict[str, Tensor]:
    """Row masks of all layers' ``neurons``; with "all_visual", every row of the image encoder."""
    if trainable == "all_visual":
        visual = clip.net.get_submodule("visual").named_parameters(prefix="visual")
        return {name: torch.ones(len(p), dtype=torch.bool, device=p.device) for name, p in visual}
    masks = [trainable_rows(clip, layer, critical_channels(m)) for layer, m in neurons.items()]
    return {name: rows for mask in masks for name, rows in mask.items()}


def train_only(net: nn.Module, rows: Mapping[str, Tensor]) -> None:
    """Lets gradients reach the masked ``rows`` only (algorithm 2, lines 25-27).

    Without weight decay a gradient that has always been zero gives an Adam update of exactly
    zero, so every other entry stays bit-identical.
    """
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in rows)
        if name in rows:
            frozen = ~rows[name].view(-1, *[1] * (parameter.ndim - 1))
            parameter.register_hook(lambda g, frozen=frozen: g.masked_fill(frozen, 0))
