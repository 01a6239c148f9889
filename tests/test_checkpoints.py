"""Checkpoints from outside: real files, honest and crafted, through the one import function."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor, nn

from invertune import models
from invertune.checkpoints import import_checkpoint
from invertune.models import Clip, ModelError


@pytest.fixture(scope="module")
def clip() -> Clip:
    torch.manual_seed(0)
    return models.build_clip(models.MODEL_FOLDER / "RN50", "RN50")


@pytest.fixture
def weights(clip: Clip) -> dict[str, Tensor]:
    """Other weights than the model's own, of the same architecture."""
    return {
        k: (v + 0.5 if v.is_floating_point() else v + 3).contiguous()
        for k, v in clip.net.state_dict().items()
    }


@pytest.fixture(autouse=True)
def model_stays_as_it_is(clip: Clip) -> Iterator[None]:
    before = {k: v.clone() for k, v in clip.net.state_dict().items()}
    yield
    assert all(torch.equal(before[k], v) for k, v in clip.net.state_dict().items())


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name


def refusal(path: Path, clip: Clip) -> str:
    """The message of the refusal, which is one line and names the file."""
    with pytest.raises(ModelError) as caught:
        import_checkpoint(path, clip)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path.parent) in message
    assert "weights_only" not in message  # torch's own text advises to switch it off
    return message


def test_safetensors(clip: Clip, weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(weights, tmp_path / "w.safetensors")
    assert_same(import_checkpoint(tmp_path / "w.safetensors", clip), weights)


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("wrap", ["bare", "state_dict", "module", "parameters", "described"])
def test_state_dicts_of_torch_save(
    clip: Clip, weights: dict[str, Tensor], tmp_path: Path, wrap: str, zip_format: bool
) -> None:
    moved = {f"module.{k}": v for k, v in weights.items()}
    content = {
        "bare": weights,
        "state_dict": {"epoch": 10, "name": "badclip", "state_dict": weights, "optimizer": {}},
        "module": {"epoch": 10, "state_dict": moved},
        "parameters": {
            k: nn.Parameter(v) if v.is_floating_point() else v for k, v in weights.items()
        },
        "described": {**weights, "context_length": torch.tensor(20), "vocab_size": 7},
    }[wrap]
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zip_format)
    state = import_checkpoint(tmp_path / "w.pt", clip)
    assert_same(state, weights)
    assert not any(tensor.requires_grad for tensor in state.values())


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(
    clip: Clip, weights: dict[str, Tensor], tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    narrow = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
    (torch.save if name == "w.pt" else save_file)(narrow, tmp_path / name)
    expected = {k: v.float() if v.is_floating_point() else v for k, v in narrow.items()}
    assert_same(import_checkpoint(tmp_path / name, clip), expected)


def test_the_result_fits_set_state(clip: Clip, weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "w.pt")
    other = models.clone(clip)
    models.set_state(other, import_checkpoint(tmp_path / "w.pt", clip))
    assert_same(dict(other.net.state_dict()), weights)


class Payload:
    """Unpickling this runs a shell command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "pickle2"])
def test_a_payload_is_refused_and_never_runs(
    clip: Clip, weights: dict[str, Tensor], tmp_path: Path, form: str
) -> None:
    proof, path = tmp_path / "it-ran", tmp_path / "w.pt"
    content = {**weights, "note": Payload(f"touch {proof}")}
    if form.startswith("pickle"):
        plain = {"note": content["note"]}
        path.write_bytes(pickle.dumps(plain, protocol=2 if form == "pickle2" else 4))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    message = refusal(path, clip)
    assert not proof.exists()
    if form != "pickle":  # of newer pickle protocols nothing is read, so nothing is named
        assert f"{os.system.__module__}.system" in message
        assert "nothing was run" in message
    torch.load(path, weights_only=False) if form in ("zip", "legacy") else pickle.loads(
        path.read_bytes()
    )
    assert proof.exists()  # the payload was live


def test_all_foreign_globals_are_named(
    clip: Clip, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    content = {"state_dict": weights, "args": argparse.Namespace(lr=1), "path": Path("x")}
    torch.save(content, tmp_path / "w.pt")
    message = refusal(tmp_path / "w.pt", clip)
    assert "argparse.Namespace" in message
    assert "pathlib.PosixPath" in message


def test_a_whole_pickled_model_is_refused(clip: Clip, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "w.pt")
    assert "torch.nn.modules.linear.Linear" in refusal(tmp_path / "w.pt", clip)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_names_the_tag_to_use(clip: Clip, tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "RN50.pt")
    message = refusal(tmp_path / "RN50.pt", clip)
    assert "TorchScript" in message
    assert "RN50-quickgelu" in message
    assert "'openai'" in message


def zipped(name: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged"),
        (b"<html>not found</html>", "damaged"),
        (zipped("hello.txt", b"hello"), "damaged"),
        (zipped("a/data.pkl", b"."), "damaged"),
        (zipped("a/data.pkl", bytes(100_000), zipfile.ZIP_DEFLATED), "compressed"),
    ],
)
def test_files_that_are_no_checkpoints(
    clip: Clip, tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    assert words in refusal(tmp_path / "w.pt", clip)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_truncated_files(
    clip: Clip, weights: dict[str, Tensor], tmp_path: Path, name: str, share: float
) -> None:
    path = tmp_path / name
    (torch.save if name == "w.pt" else save_file)(weights, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refusal(path, clip)


def test_a_flipped_byte_in_the_weights_is_noticed(
    clip: Clip, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "w.pt"
    torch.save(weights, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "checksum" in refusal(path, clip)


def small(kind: str) -> bytes:
    if kind == "safetensors":
        return save({"a": torch.ones(3)})
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3)}, buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["safetensors", "zip", "legacy"]),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    keep=st.floats(0.5, 1),
)
def test_random_damage_ends_in_a_refusal_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, kind: str, edits: list[tuple[float, int]], keep: float
) -> None:
    content = bytearray(small(kind))
    for place, value in edits:
        content[int(place * len(content))] = value
    suffix = "safetensors" if kind == "safetensors" else "pt"
    path = tmp_path_factory.mktemp("fuzz", numbered=True) / f"w.{suffix}"
    path.write_bytes(content[: int(keep * len(content))])
    net = nn.Linear(2, 2)
    net.logit_scale = nn.Parameter(torch.zeros(()))
    tiny = Clip("RN50", net, None, torch.zeros(1), torch.ones(1), 1)
    refusal(path, tiny)


def test_missing_files_and_folders(clip: Clip, tmp_path: Path) -> None:
    assert "not found" in refusal(tmp_path / "nowhere.pt", clip)
    (tmp_path / "folder.pt").mkdir()
    assert "not a file" in refusal(tmp_path / "folder.pt", clip)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("change", ["shape", "missing", "extra", "nan", "inf", "integer", "float8"])
def test_the_first_mismatch_is_named(
    clip: Clip, weights: dict[str, Tensor], tmp_path: Path, name: str, change: str
) -> None:
    key = "visual.conv1.weight"
    replacement = {
        "shape": torch.zeros(5, 5),
        "nan": torch.full_like(weights[key], float("nan")),
        "inf": weights[key].double() * 1e300,  # finite in float64 only
        "integer": weights[key].long(),
        "float8": weights[key].to(torch.float8_e5m2),
    }
    if change == "missing":
        del weights[key]
    elif change == "extra":
        key = "visual.surprise"
        weights[key] = torch.zeros(1)
    else:
        weights[key] = replacement[change]
    (torch.save if name == "w.pt" else save_file)(weights, tmp_path / name)
    message = refusal(tmp_path / name, clip)
    assert key in message
    words = {
        "shape": "(5, 5)",
        "missing": "lacks",
        "extra": "does not have",
        "nan": "not finite",
        "inf": "not finite",
        "integer": "int64",
        "float8": "float8_e5m2",
    }
    assert words[change] in message


def test_another_backbone_is_refused(clip: Clip, tmp_path: Path) -> None:
    other = models.build_clip(models.MODEL_FOLDER / "ViT-B-32", "ViT-B-32")
    models.save_weights(other, tmp_path / "w.safetensors")
    assert "RN50" in refusal(tmp_path / "w.safetensors", clip)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "a list"),
        ({}, "a dict"),
        (torch.zeros(2), "a Tensor"),
        ({"model": {"a": torch.zeros(1)}}, "'model' is a dict"),
        ({3: torch.zeros(1)}, "'3' is not a name"),
        ({"a\n\x1b[2J": torch.zeros(1)}, r"'a\n\x1b[2J'"),
        ({"a" * 10_000: torch.zeros(1)}, "not a name"),
    ],
)
def test_content_that_is_no_state_dict(
    clip: Clip, tmp_path: Path, content: object, words: str
) -> None:
    torch.save(content, tmp_path / "w.pt")
    assert words in refusal(tmp_path / "w.pt", clip)


@pytest.mark.parametrize("layout", ["sparse", "meta"])
def test_tensors_without_plain_storage_are_refused(
    clip: Clip, weights: dict[str, Tensor], tmp_path: Path, layout: str
) -> None:
    key = "text_projection"
    weights[key] = weights[key].to_sparse() if layout == "sparse" else weights[key].to("meta")
    torch.save(weights, tmp_path / "w.pt")
    assert key in refusal(tmp_path / "w.pt", clip)


def test_a_huge_view_of_one_number_is_refused_before_it_is_copied(
    clip: Clip, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    weights["text_projection"] = torch.zeros(1, dtype=torch.float16).expand(10**7, 10**7)
    torch.save(weights, tmp_path / "w.pt")
    assert "text_projection" in refusal(tmp_path / "w.pt", clip)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_cfg": {"quick_gelu": True}}, "says QuickGELU, but this RN50 has GELU"),
        ({"model_cfg": []}, "not a configuration"),
        ([], "not a configuration"),
        ("x" * 1_000_001, "no configuration of open_clip: above 1,000,000 bytes"),
    ],
)
def test_the_activation_beside_the_weights_is_checked(
    clip: Clip, weights: dict[str, Tensor], tmp_path: Path, config: object, words: str
) -> None:
    save_file(weights, tmp_path / "w.safetensors")
    (tmp_path / models.CONFIG).write_text(json.dumps(config))
    assert words in refusal(tmp_path / "w.safetensors", clip)


def test_an_own_folder_comes_back_in(
    clip: Clip, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    config = models.MODEL_FOLDER / "RN50" / models.CONFIG
    (tmp_path / models.CONFIG).write_text(config.read_text())
    save_file(weights, tmp_path / "w.safetensors")
    assert_same(import_checkpoint(tmp_path / "w.safetensors", clip), weights)


def test_an_old_torch_reads_no_pickle(
    clip: Clip, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(weights, tmp_path / "w.pt")
    save_file(weights, tmp_path / "w.safetensors")
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    assert "2.10" in refusal(tmp_path / "w.pt", clip)
    assert_same(import_checkpoint(tmp_path / "w.safetensors", clip), weights)
