"""Forward passes in bfloat16: near float32, over float32 weights, with keys of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from invertune import data, models, training
from invertune.activations import candidate_layers, prefix_to, tail_from
from invertune.chain import STEP_VERSIONS, open_chain, pretrained
from invertune.models import Clip, embed_images, text_features
from invertune.sampling import generator
from invertune.settings import load_settings
from invertune.training import Recipe, contrastive_loss, fit, pair_features
from invertune.trigger_inversion import Run, invert_triggers

GAP = 1e-3  # 1 - cosine; 8 bits of mantissa give 2e-6 to 7e-5 with the shipped weights
KEY = "a30534844dc7fe0fbff258894905bc34718630ec0e24c0e4182cd47dec785736"  # without a precision
TEXTS = ["a photo of a mushroom", "two lemons", "a ski", "a banana on a table"]


@pytest.fixture(params=["RN50", "ViT-B-32"])
def clip(request: pytest.FixtureRequest) -> Clip:
    torch.manual_seed(0)
    return models.build_clip(models.MODEL_FOLDER / request.param, request.param)


def pixels(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 64, 64), generator=generator(1), dtype=torch.uint8)


def low(clip: Clip) -> Clip:
    return replace(clip, precision=torch.bfloat16)


def test_bfloat16_features_are_float32_and_near(clip: Clip) -> None:
    seen: list[torch.dtype] = []
    for layer in candidate_layers(clip).values():
        layer.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    first = list(candidate_layers(clip))[1]
    with torch.no_grad():
        whole, texts = embed_images(clip, pixels(4)), text_features(clip, TEXTS)
        assert set(seen) == {torch.float32}
        seen.clear()
        near = embed_images(low(clip), pixels(4))
        hidden = prefix_to(low(clip), pixels(4).float() / 255, first)
        tail, maps = tail_from(low(clip), hidden, first)
        assert set(seen) == {torch.bfloat16} == {hidden.dtype}
    near_texts = text_features(low(clip), TEXTS)
    for one, other in ((whole, near), (whole, tail), (texts, near_texts)):
        gap = 1 - (one.double() * other.double()).sum(1)
        assert 0 < gap.max() < GAP
        assert other.norm(dim=1).allclose(torch.ones(4), atol=1e-6)
    kept = [near, tail, near_texts, *maps.values(), *clip.net.state_dict().values()]
    assert {t.dtype for t in kept if t.is_floating_point()} == {torch.float32}


def test_training_in_bfloat16_keeps_float32_weights_gradients_and_moments(
    clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, path = clip.tokenizer(TEXTS), tmp_path / "state.safetensors"

    def loss_of(own: Clip) -> Tensor:
        image, text = pair_features(own, pixels(4), tokens)
        return contrastive_loss(image, text, own.net.logit_scale)

    gradients = []
    for own in (clip, low(clip)):
        loss = loss_of(own)
        grads = torch.autograd.grad(loss, list(own.net.parameters()))
        assert {loss.dtype, *(g.dtype for g in grads)} == {torch.float32}
        gradients.append(torch.cat([g.flatten() for g in grads]))
    assert not torch.equal(*gradients)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99

    before = {k: v.clone() for k, v in clip.net.named_parameters()}
    recipe = Recipe(1, 1e-5)  # in bfloat16 most weights would not feel a step of this size
    monkeypatch.setattr(training, "SAVED_APART", 1)
    fit(clip.net, lambda step: {"loss": loss_of(low(clip))}, recipe, checkpoint=path)
    saved = load_file(path)
    assert {v.dtype for v in saved.values() if v.is_floating_point()} == {torch.float32}
    assert any(name.startswith("exp_avg_sq.") for name in saved)
    moved = torch.cat([(p != before[k]).flatten() for k, p in clip.net.named_parameters()])
    assert moved.float().mean() > 0.9


def test_inversion_in_bfloat16_is_near_and_its_trigger_float32(clip: Clip) -> None:
    settings = load_settings("smoke").inversion.model_copy(update={"steps": 2, "batch": 4})
    head = text_features(clip, TEXTS).detach()
    full, near = (
        invert_triggers(own, pixels(8), pixels(4), head, [Run.of(0, settings)], settings, 0)[0]
        for own in (clip, low(clip))
    )
    assert near.mask.dtype == near.pattern.dtype == torch.float32
    assert near.log[-1]["align"] != full.log[-1]["align"]
    for name in ("align", "emb", "sim", "mask"):
        assert near.log[-1][name] == pytest.approx(full.log[-1][name], rel=0.02, abs=0.005)


def test_only_bfloat16_adds_to_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "manifest", lambda own: "m")
    monkeypatch.setitem(STEP_VERSIONS, "attack", 1)
    keys = {}
    for name in ("float32", "bfloat16"):
        chain = open_chain(load_settings("smoke", {"precision": name}), tmp_path)
        assert pretrained(chain).clip.precision == getattr(torch, name)
        keys[name] = chain.run("attack", {"lr": 0.5}, ["u"], lambda work: ({}, {}), 0).key
    assert keys["float32"] == KEY
    assert keys["bfloat16"] != KEY
