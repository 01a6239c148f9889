"""Layers, neurons and the weights behind them (paper, section 3.3, algorithm 2, lines 3-27)."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import pixels, tiny
from torch import Tensor, nn

from invertune.activations import (
    batched_inputs,
    candidate_layers,
    critical_channels,
    critical_layers,
    critical_neurons,
    layer_impacts,
    maps_from,
    mean_activations,
    prefix_to,
    rows_to_train,
    tail_from,
    trainable_rows,
    unit_mask,
)
from invertune.models import Clip, ModelError, clone, image_features
from invertune.sections import BACKBONES

EXPECTED = Path(__file__).resolve().parent.parent / "expected" / "paper.csv"


@pytest.fixture(scope="module", params=BACKBONES)
def clip(request) -> Clip:
    return tiny(request.param)


@pytest.mark.parametrize(("item", "backbone"), list(enumerate(BACKBONES, 12)))
def test_the_papers_impacts_give_its_thresholds_and_layers(item, backbone):
    """Tables 12-15; their numbers are rounded to four digits."""
    with EXPECTED.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["paper_item"] == f"table{item}"]
    assert {row["backbone"] for row in rows} == {backbone}
    paper = {(r["metric"], r["variant"].removeprefix("layer=")): float(r["value"]) for r in rows}
    found = critical_layers({k: v for (metric, k), v in paper.items() if metric == "layer_impact"})
    selected = [k for (metric, k), v in paper.items() if metric == "layer_selected" and v == 1]
    assert list(found.layers) == selected
    for name in ("mean", "std", "threshold"):
        assert getattr(found, name) == pytest.approx(paper[f"layer_{name}", ""], abs=1.01e-4)


def test_two_equal_layers_among_four_fall_back_to_one():
    found = critical_layers({"a": 0.5, "b": 0.5, "c": 0.0, "d": 0.0})
    assert found.threshold == 0.5
    assert found.layers == ("a",)


def test_top3_takes_three_layers_in_network_order():
    assert critical_layers({"a": 3.0, "b": 1.0, "c": 2.0, "d": 9.0}, "top3").layers == (
        "a",
        "c",
        "d",
    )


def test_candidate_layers_are_the_stages_or_blocks(clip):
    layers = candidate_layers(clip)
    if clip.backbone.startswith("RN"):
        assert list(layers) == [f"visual.layer{i}" for i in range(1, 5)]
    else:
        assert list(layers) == [f"visual.transformer.resblocks.{i}" for i in range(6)]
    assert all(clip.net.get_submodule(name) is module for name, module in layers.items())


def test_another_image_encoder_is_refused():
    clip = tiny("RN50")
    clip.net.visual = nn.Linear(3, 3)
    with pytest.raises(ModelError, match="type Linear"):
        candidate_layers(clip)


def test_layer_impacts_are_equation_8():
    clean = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    triggered = clean.flip(0)
    pairs = list(zip(clean.flatten().tolist(), triggered.flatten().tolist(), strict=True))
    above = math.sqrt(sum((c - t) ** 2 for c, t in pairs))
    below = math.sqrt(sum(c**2 for c, _ in pairs))
    impacts = layer_impacts({"x": clean}, {"x": triggered})
    assert impacts == {"x": pytest.approx(above / below, rel=1e-6)}


@torch.no_grad()
def test_prefix_and_tail_make_the_whole_encoder(clip):
    images = pixels(3)
    whole = image_features(clip, images)
    for layer in (None, *candidate_layers(clip)):
        features, _ = tail_from(clip, prefix_to(clip, images, layer), layer)
        torch.testing.assert_close(features, whole, atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_tail_keeps_the_maps_that_the_modules_produce(clip):
    images, seen = pixels(3), {}
    layers = candidate_layers(clip)
    hooks = [
        module.register_forward_hook(lambda m, x, y, name=name: seen.update({name: y.clone()}))
        for name, module in layers.items()
    ]
    image_features(clip, images)
    [hook.remove() for hook in hooks]
    maps = tail_from(clip, prefix_to(clip, images, None), None)[1]
    middle = list(layers)[1:3]
    between = maps_from(clip, prefix_to(clip, images, middle[0]), *middle)
    assert list(between) == middle
    assert all(torch.equal(between[name], maps[name]) for name in middle)
    means = mean_activations(clip, images)
    for name, expected in seen.items():
        assert len(expected) == len(images)  # ViT blocks are batch-first
        torch.testing.assert_close(maps[name], expected, atol=1e-6, rtol=0)
        average = expected.double().mean(0).float()
        torch.testing.assert_close(means[name], average, atol=1e-6, rtol=0)


def test_mean_activations_do_not_depend_on_chunks_or_pixel_type(monkeypatch):
    clip, images = tiny("RN50"), (pixels(9) * 255).byte()
    clip.net.double()  # sums of float32 depend on the size of a chunk, on some processors
    clip = replace(clip, mean=clip.mean.double(), std=clip.std.double())
    whole = mean_activations(clip, images)
    monkeypatch.setattr("invertune.activations.BATCH", 4)
    chunked = mean_activations(clip, images.float() / 255)
    for layer in candidate_layers(clip):
        torch.testing.assert_close(chunked[layer], whole[layer], atol=1e-12, rtol=1e-12)


def test_inputs_are_kept_only_within_the_limit():
    calls = []

    def prefix(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x * 2

    images = pixels(4)
    kept = batched_inputs(prefix, images, images.device, limit=images.nbytes)
    fresh = batched_inputs(prefix, images, images.device, limit=images.nbytes - 1)
    calls.clear()
    assert torch.equal(torch.cat(list(kept())), images * 2)
    assert calls == []
    assert torch.equal(torch.cat(list(fresh())), images * 2)
    assert calls == [4]


def maps_with_critical_channels(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    clean = torch.rand(shape, generator=rng)
    shift = 0.1 * torch.rand(shape, generator=rng)
    channels = shift if len(shape) == 3 else shift.T
    channels[[1, 4]] += 1
    return clean, clean - shift


@pytest.mark.parametrize("shape", [(6, 2, 3), (5, 6)])
def test_critical_neurons_are_the_cluster_that_moves_most(shape):
    clean, triggered = maps_with_critical_channels(shape)
    neurons = critical_neurons(clean, triggered, seed=0)
    assert neurons.tolist() == [False, True, False, False, True, False]
    assert torch.equal(critical_channels(neurons), neurons)
    units = critical_neurons(clean, triggered, seed=0, neuron="unit")
    assert units.shape == clean.shape
    assert torch.equal(units, unit_mask(neurons, shape))
    assert torch.equal(critical_channels(units), neurons)


def test_one_critical_unit_makes_its_channel_train():
    clean = torch.zeros(3, 2, 2)
    triggered = clean.clone()
    triggered[2, 0, 1] = 1
    units = critical_neurons(clean, triggered, seed=0, neuron="unit")
    assert units.nonzero().tolist() == [[2, 0, 1]]
    assert critical_channels(units).tolist() == [False, False, True]


def test_clusters_repeat_with_the_seed_and_survive_equal_differences():
    clean, triggered = torch.rand(2, 200, 2, 2, generator=torch.Generator().manual_seed(0))
    first, second = (critical_neurons(clean, triggered, seed=3) for _ in range(2))
    assert torch.equal(first, second)
    assert 0 < first.sum() < 200
    assert critical_neurons(clean, clean, seed=0).all()


def test_trainable_rows_are_what_writes_the_output(clip):
    layer, module = list(candidate_layers(clip).items())[-1]
    width = 512 if clip.backbone.startswith("RN") else clip.net.visual.conv1.out_channels
    channels = torch.zeros(width, dtype=torch.bool)
    channels[:3] = True
    rows = trainable_rows(clip, layer, channels)
    if clip.backbone.startswith("RN"):
        ends = ["conv3.weight", "bn3.weight", "bn3.bias"]
        expected = {f"{layer}.{i}.{end}" for i in range(len(module)) for end in ends}
        expected |= {f"{layer}.0.downsample.{end}" for end in ("0.weight", "1.weight", "1.bias")}
    else:
        ends = ["attn.out_proj.weight", "attn.out_proj.bias", "mlp.c_proj.weight"]
        expected = {f"{layer}.{end}" for end in [*ends, "mlp.c_proj.bias"]}
    assert set(rows) == expected
    parameters = dict(clip.net.named_parameters())
    assert all(len(parameters[name]) == len(mask) == width for name, mask in rows.items())


@torch.no_grad()
def test_trainable_rows_move_the_critical_channels_only(clip):
    """In a stage of one block the rows must not reach the layer's other output channels."""
    layer, module = next(iter(candidate_layers(clip).items()))
    hidden = prefix_to(clip, pixels(2), layer)
    before = module(hidden)
    width = before.shape[1] if before.ndim == 4 else before.shape[2]
    channels = torch.arange(width) < 3
    changed = clone(clip)
    for name, mask in trainable_rows(changed, layer, channels).items():
        if "out_proj" not in name:  # the MLP of the same block reads what attention writes
            changed.net.get_parameter(name)[mask] += 0.5
    moved = candidate_layers(changed)[layer](hidden) != before
    by_channel = moved.any(0).flatten(1).any(1) if before.ndim == 4 else moved.any(0).any(0)
    assert torch.equal(by_channel, channels)


def test_all_visual_trains_every_visual_parameter(clip):
    rows = rows_to_train(clip, {}, "all_visual")
    parameters = dict(clip.net.named_parameters())
    assert set(rows) == {name for name in parameters if name.startswith("visual.")}
    assert all(mask.all() and len(mask) == len(parameters[name]) for name, mask in rows.items())


def test_of_several_clusters_all_but_the_one_that_moves_least_are_critical():
    difference = torch.tensor([0.0, 0.1, 0.0, 2.0, 2.1, 9.0])
    clean = torch.zeros(6, 1, 1)
    two, three = (
        critical_neurons(clean, difference.view(6, 1, 1), 0, "channel", k) for k in (2, 3)
    )
    assert two.tolist() == [False] * 5 + [True]
    assert three.tolist() == [False] * 3 + [True] * 3
    assert critical_neurons(clean, difference.view(6, 1, 1), 0, "channel", 50).sum() == 4
