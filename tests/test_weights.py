"""Full-size weights: from a hub cache, a folder or a file; checked, or refused with a reason."""

import functools
import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from invertune import models, weights
from invertune.activations import candidate_layers, prefix_to, tail_from, trainable_rows
from invertune.chain import open_chain, pretrained
from invertune.layouts import DataError
from invertune.models import (
    CONFIG,
    MERGES,
    MODEL_FOLDER,
    WEIGHTS,
    ModelError,
    build_clip,
    image_features,
)
from invertune.settings import load_settings
from invertune.training import Recipe, finetune
from invertune.weights import for_any_backbone, load_clip, state

CONFIGURATIONS: dict[str, dict[str, object]] = {
    "std": {"preprocess_cfg.std": [0.3] * 3},
    "mean": {"preprocess_cfg.mean": [0.4] * 3},
    "activation": {"model_cfg.quick_gelu": True},
    "heads": {"model_cfg.text_cfg.heads": 2},
    "letters": {"model_cfg.text_cfg.tokenizer_kwargs": {"clean": "whitespace"}},
    "merges": {},
}
REPOSITORY, COMMIT = "timm/resnet50_clip.openai", "0" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where RN50's weights lie in an empty cache of the hub, offline, with its own lock file."""
    folder = tmp_path / f"models--{REPOSITORY.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (tmp_path / "weights.lock").write_text('{\n  "RN50": "d6"\n}\n')
    monkeypatch.setattr(weights, "WEIGHTS_LOCK", tmp_path / "weights.lock")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder / "snapshots" / COMMIT / WEIGHTS


@torch.no_grad()
def test_openais_weights_come_from_the_cache_and_stay_what_they_were(
    hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    own = open_clip.create_model("RN50-quickgelu")  # open_clip's own way to OpenAI's activation
    half = {k: v.half() if v.is_floating_point() else v for k, v in own.state_dict().items()}
    save_file(half, hub)
    own.load_state_dict(half)
    digest = hashlib.sha256(hub.read_bytes()).hexdigest()
    exact = {"weights": "openai", "device": "cpu", "precision": "float32"}
    chain = open_chain(load_settings("scenes224", exact))
    assert "not recorded yet" in state("RN50", "openai")
    model = pretrained(chain)
    assert model.key == digest and digest in capsys.readouterr().out
    assert json.loads(weights.WEIGHTS_LOCK.read_text()) == {"RN50": "d6", REPOSITORY: digest}
    assert load_clip("RN50", f"file:{hub}")[1] == digest
    assert state("RN50", "openai") == f"found ({REPOSITORY}), SHA-256 recorded"

    pixels, texts = torch.rand(1, 3, 224, 224), ["a photo of a mushroom"]
    transform = own.eval().visual.preprocess_cfg
    mean, std = (torch.tensor(transform[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    expected = normalize(own.encode_image((pixels - mean) / std), dim=-1)
    torch.testing.assert_close(image_features(model.clip, pixels), expected, atol=1e-5, rtol=0)
    tokens = open_clip.get_tokenizer("RN50")(texts)
    expected = normalize(own.encode_text(tokens), dim=-1)
    torch.testing.assert_close(models.text_features(model.clip, texts), expected, atol=1e-5, rtol=0)

    content = bytearray(hub.read_bytes())
    content[-1] ^= 1
    hub.write_bytes(content)
    changed = hashlib.sha256(content).hexdigest()
    with pytest.raises(ModelError, match=rf"refused: its SHA-256 is {changed}, but .*{digest}"):
        pretrained(chain).load()
    assert json.loads(weights.WEIGHTS_LOCK.read_text())[REPOSITORY] == digest


def test_missing_weights_are_named_and_a_pickle_does_not_replace_them(hub: Path) -> None:
    torch.save({"state_dict": {}}, hub.parent / "open_clip_pytorch_model.bin")
    command, line = f"hf download {REPOSITORY} {WEIGHTS}", state("RN50", "openai")
    with pytest.raises(ModelError, match=rf"{WEIGHTS} of {REPOSITORY} .*{command}"):
        load_clip("RN50", "openai")
    assert line.startswith("not in the cache") and command in line


def test_unknown_weights_are_refused_with_those_that_exist() -> None:
    with pytest.raises(ModelError, match=r"'opena': for RN50, open_clip knows openai, yfcc15m"):
        load_clip("RN50", "opena")
    with pytest.raises(ModelError, match="for ViT-X, open_clip knows no weights"):
        load_clip("RN50", "ViT-X/openai")
    with pytest.raises(ModelError, match=r"image_size_px = 224, but the RN50 .* takes .* 64 px"):
        pretrained(open_chain(load_settings("scenes224", {"weights": "embedded", "device": "cpu"})))


def test_missing_data_is_told_before_weights_are_asked_for(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("INVERTUNE_DATA", raising=False)
    with pytest.raises(DataError, match="set INVERTUNE_DATA"):
        pretrained(open_chain(load_settings("paper", {"device": "cpu"})))


def test_a_folder_or_a_file_gives_the_same_model_and_key() -> None:
    embedded, key = load_clip("RN50", "embedded")
    clip, digest = load_clip("RN50", f"local-dir:{MODEL_FOLDER}/{{backbone}}")
    assert digest == key and clip.tokenizer(["a mushroom"]).shape == (1, 20)
    assert torch.equal(clip.mean, embedded.mean) and clip.image_size == 64
    own = embedded.net.state_dict()
    assert all(torch.equal(own[name], value) for name, value in clip.net.state_dict().items())
    with pytest.raises(ModelError, match=r"is \(20, 128\), but this RN50 needs \(77, 512\)"):
        load_clip("RN50", f"file:{MODEL_FOLDER}/RN50/{WEIGHTS}")  # a smaller RN50 than OpenAI's


def rewritten(folder: Path, backbone: str = "RN50", **changes: object) -> Path:
    """A copy of a shipped model with other values in its configuration, by "part.key"."""
    shutil.copytree(MODEL_FOLDER / backbone, folder)
    config = json.loads((folder / CONFIG).read_text())
    for path, value in changes.items():
        *parts, key = path.split(".")
        functools.reduce(dict.__getitem__, parts, config)[key] = value
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return folder


def test_what_the_weights_mean_is_part_of_the_key(tmp_path: Path) -> None:
    def key(folder: Path) -> str:
        return load_clip("RN50", f"local-dir:{folder}")[1]

    shipped, other = rewritten(tmp_path / "same"), {"preprocess_cfg.std": [0.3] * 3}
    own = {name: rewritten(tmp_path / name, **changes) for name, changes in CONFIGURATIONS.items()}
    merges = own["merges"] / MERGES
    merges.write_bytes(gzip.compress(b"\n".join(gzip.decompress(merges.read_bytes()).split(b"\n"))))
    keys = [key(shipped), *map(key, own.values())]
    assert keys[0] == weights.locked_hash("RN50") and len(set(keys)) == len(keys)
    assert key(rewritten(tmp_path / "again", **other)) == keys[1]


@pytest.mark.parametrize(
    ("tag", "usual"),
    [("openai", True), ("laion2b_s34b_b79k", False), ("ViT-B-32-quickgelu/openai", True)],
)
def test_a_tag_with_another_activation_has_another_key(
    hub: Path, monkeypatch: pytest.MonkeyPatch, tag: str, usual: bool
) -> None:
    monkeypatch.setattr(weights, "_hub_file", lambda *_: hub)
    monkeypatch.setattr(weights, "_read", lambda clip, _: clip)
    monkeypatch.setattr(weights, "random_clip", lambda *_: None)
    hub.write_bytes(b"weights")
    key = load_clip("ViT-B-32", tag)[1]
    assert (key == hashlib.sha256(b"weights").hexdigest()) == usual


def test_only_some_weights_name_another_model_for_another_backbone() -> None:
    assert for_any_backbone("openai") and for_any_backbone("local-dir:/models/{backbone}")
    assert not for_any_backbone("ViT-L-14/openai") and not for_any_backbone("local-dir:models")


def test_no_model_that_open_clip_knows_is_beyond_the_bounds() -> None:
    for name in open_clip.list_models():
        models._check_size(open_clip.get_model_config(name))


def siglip(folder: Path, **text: object) -> Path:
    """A small SigLIP-like folder: timm's ViT with attention pooling, a logit bias, other text."""
    model = {
        "embed_dim": 192,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 224,
            "timm_model_name": "vit_tiny_patch16_224",
            "timm_model_pretrained": True,  # must not make anything download
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 64,
            "heads": 2,
            "layers": 1,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            **text,
        },
    }
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / CONFIG).write_text(json.dumps({"model_cfg": model, "preprocess_cfg": half}))
    return folder


def test_a_siglip_model_loads_and_its_layers_are_found(tmp_path: Path) -> None:
    source = build_clip(siglip(tmp_path), "ViT-B-16")
    own = {name: value.contiguous() for name, value in source.net.state_dict().items()}
    hubs = {"logit_scale": own["logit_scale"].view(1), "logit_bias": torch.tensor([-10.0])}
    save_file(own | hubs, tmp_path / WEIGHTS)
    clip, _ = load_clip("ViT-B-16", f"local-dir:{tmp_path}")
    pixels = torch.rand(2, 3, 224, 224)
    assert clip.image_size == 224 and clip.mean.flatten().tolist() == [0.5] * 3
    layers = candidate_layers(clip)
    assert list(layers) == [f"visual.trunk.blocks.{i}" for i in range(12)]
    third = "visual.trunk.blocks.3"
    features, maps = tail_from(clip, prefix_to(clip, pixels, third), third)
    torch.testing.assert_close(features, image_features(source, pixels))
    assert len(maps) == 9 and maps["visual.trunk.blocks.3"].shape == (2, 197, 192)
    rows = trainable_rows(clip, "visual.trunk.blocks.3", torch.ones(192, dtype=torch.bool))
    names = {name.removeprefix("visual.trunk.blocks.3.") for name in rows}
    assert names == {f"{part}.{x}" for part in ("attn.proj", "mlp.fc2") for x in ("weight", "bias")}
    images, recipe = (pixels * 255).byte(), Recipe(1, 1e-3)
    log = finetune(clip, images, ("a cat", "a dog"), recipe, 2, 0, tmp_path, cycled=False)
    assert torch.tensor(log[0]["loss"]).isfinite()
    assert not torch.equal(clip.net.text.positional_embedding, own["text.positional_embedding"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ({"layers": 10**9}, "'layers' = 1e[+]09, but at most 64 is taken"),
        ({"width": 16384}, "'width' = 16384, but at most 2,048"),
        ({"context_length": 200_000}, "'context_length' = 200000"),
        ({"hf_model_name": "roberta-base"}, "not supported"),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, "tokenizer_kwargs may hold clean only"),
        ({"width": 65}, "no CLIP can be built from"),
    ],
)
def test_a_folder_that_asks_for_more_is_refused(
    tmp_path: Path, text: dict[str, object], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        load_clip("ViT-B-16", f"local-dir:{siglip(tmp_path, **text)}")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_cfg.vision_cfg.layers": [1, 1, 1, 65]}, "'layers' = 65"),
        ({"model_cfg.vision_cfg.patch_size": 0.5}, "image_size = 64, patch_size 0.5: at most 64"),
        ({"preprocess_cfg.std": [0.2, 0.2, 0]}, "std above 0"),
        ({"preprocess_cfg.mean": [0.2, 0.2, float("nan")]}, "must be finite"),
        ({"preprocess_cfg.mean": [0.2, 0.2]}, "no CLIP can be built from"),
        ({"model_cfg.vision_cfg.output_tokens": True}, "encodes no image and text"),
    ],
)
def test_a_configuration_of_no_use_is_refused(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    backbone = "ViT-B-32" if "model_cfg.vision_cfg.output_tokens" in changes else "RN50"
    folder = rewritten(tmp_path / "own", backbone, **changes)
    with pytest.raises(ModelError, match=reason):
        load_clip(backbone, f"local-dir:{folder}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("visual.bn1.running_var", -1.0),
        ("visual.conv1.weight", 3e38),
        ("token_embedding.weight", 3e38),
        ("logit_scale", 100.0),
    ],
)
def test_finite_weights_of_no_use_are_refused(tmp_path: Path, name: str, value: float) -> None:
    state = load_file(MODEL_FOLDER / "RN50" / WEIGHTS)
    state[name] = torch.full_like(state[name], value, dtype=torch.float32)
    save_file(state, rewritten(tmp_path / "own") / WEIGHTS)
    with pytest.raises(ModelError, match="are not finite"):
        load_clip("RN50", f"local-dir:{tmp_path}/own")


def _bomb(folder: Path) -> None:
    (folder / MERGES).write_bytes(gzip.compress(bytes(2**24 + 1)))


def _pipe(folder: Path) -> None:
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)


def _endless(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to("/dev/zero")


def _secret(folder: Path) -> None:
    (folder.parent / "id_rsa").write_text("a key")
    (folder / "vocab.txt").symlink_to("../id_rsa")


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (_bomb, "more than 16,777,216 bytes unpacked"),
        (_pipe, f"not found: .*{CONFIG}"),
        (_endless, f"not found: .*{CONFIG}"),
        (_secret, "vocab.txt leads out of its folder, to .*id_rsa"),
    ],
)
def test_a_hostile_file_in_a_folder_is_refused(
    tmp_path: Path, plant: Callable[[Path], None], reason: str
) -> None:
    plant(rewritten(tmp_path / "own"))
    with pytest.raises(ModelError, match=reason):
        load_clip("RN50", f"local-dir:{tmp_path}/own")


def test_a_snapshot_of_the_hub_links_to_its_blobs(tmp_path: Path) -> None:
    blobs = rewritten(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert load_clip("RN50", f"local-dir:{snapshot}")[1] == weights.locked_hash("RN50")


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"not found: .*{CONFIG}"):
        load_clip("RN50", f"local-dir:{tmp_path}")
    shutil.copy(MODEL_FOLDER / "RN101" / CONFIG, tmp_path)
    torch.save({}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ModelError, match=f"{WEIGHTS} is not a file"):
        load_clip("RN101", f"local-dir:{tmp_path}")


def test_siglips_tokenizer_says_what_it_needs() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        with pytest.raises(ModelError, match="pip install transformers"):
            weights.random_clip("ViT-B-16", "ViT-B-16-SigLIP/webli")
    else:
        pytest.skip("transformers is installed")
