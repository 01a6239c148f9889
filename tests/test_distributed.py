"""Two gloo processes train as one does; this file is also what torchrun starts in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from invertune import distributed
from invertune.__main__ import main
from invertune.baselines import trained
from invertune.chain import DeviceMemoryError
from invertune.data import Pairs
from invertune.models import Clip
from invertune.sampling import generator
from invertune.settings import load_settings
from invertune.store import entries
from invertune.training import Recipe, contrastive_loss, finetune, fit, pair_features

SIZE, BATCH = 32, 8
VIT = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": SIZE}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "image_size": SIZE}
TEXT = {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
RECIPE = Recipe(4, 0.01, warmup=2)
FILL = """
attacks: {names: [badencoder], badencoder: {steps: 3, batch: 8, lr: 0.00001}}
baselines: {names: [par], pairs: 42, par: {steps: 3, batch: 8, lrs: [0.00001]}}
data: {poisoning_pairs: 210, heldout_images: 42, evaluation_images: 42, retrieval_images: 20}
identification: {kinds: [patch_feature], steps: 1, check_steps: 1}
inversion: {steps: 2, measure_every_steps: 2}
tuning: {steps: 2, measure_every_steps: 2}
rebound: {attacks: []}
"""


def tiny(vision: dict[str, Any]) -> Clip:
    """A random CLIP in float64, in which the order of a sum hardly matters."""
    torch.manual_seed(0)
    net = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=TEXT).double()
    mean, std = (torch.full((1, 3, 1, 1), 0.5, dtype=torch.float64) for _ in "ms")

    def tokenizer(texts: list[str]) -> Tensor:
        return torch.tensor([[int(text) % 19, *range(4), 19] for text in texts])

    return Clip("tiny", net, tokenizer, mean, std, SIZE)


def pairs() -> tuple[Tensor, list[str]]:
    shape = (24, 3, SIZE, SIZE)
    images = torch.randint(256, shape, generator=generator(0), dtype=torch.uint8)
    return images, [str(i) for i in range(24)]


def train_vit(work: Path) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    clip = tiny(VIT)
    log = finetune(clip, *pairs(), RECIPE, BATCH, 0, work, cycled=False)
    return clip.net.state_dict(), log


def train_cleanclip() -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    images, captions = pairs()
    own = {"steps": 3, "batch": BATCH, "warmup_steps": 1}
    settings = load_settings("smoke", {"baselines": {"cleanclip": own}}).baselines
    given = Pairs(images, tuple(captions), torch.full((24, 2), -1))
    run = trained("cleanclip", tiny(VIT), given, settings, 0.01, 0, None)
    return run.clip.net.state_dict(), run.log


def train_resnet() -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Contrastive, with BatchNorm in eval mode."""
    clip, (images, captions) = tiny(RESNET), pairs()
    clip.net.eval()
    tokens = clip.tokenizer(captions)

    def loss_at(step: int) -> dict[str, Tensor]:
        rows = torch.arange(BATCH) + step
        both = pair_features(clip, images[rows], tokens[rows])
        return {"loss": contrastive_loss(*both, clip.net.logit_scale)}

    return clip.net.state_dict(), fit(clip.net, loss_at, RECIPE)


def refusal(vision: dict[str, Any], batch: int) -> str:
    clip = tiny(vision)
    with pytest.raises(distributed.DistributedError) as caught:
        finetune(clip, *pairs(), RECIPE, batch, 0, Path("unused"), cycled=False)
    return str(caught.value)


def in_each_process(out: Path) -> int:
    """What torchrun runs: saves outcomes for the tests below, then fills a store."""
    distributed.start()
    (vit, vit_log), (resnet, resnet_log) = train_vit(out), train_resnet()
    baseline, baseline_log = train_cleanclip()
    said = [refusal(RESNET, BATCH), refusal(VIT, 7)]
    if distributed.first():
        save_file(vit, out / "vit.safetensors")
        save_file(resnet, out / "resnet.safetensors")
        save_file(baseline, out / "cleanclip.safetensors")
        (out / "said.json").write_text(json.dumps([vit_log, resnet_log, baseline_log, said]))
    return main(["fill", "smoke", "--only", "05", "--overrides", FILL])


def start(program: list[str], store: Path) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = Path(__file__).resolve().parents[1]
    more = {"INVERTUNE_STORE": str(store), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    more["CUDA_VISIBLE_DEVICES"] = ""  # gloo, on any machine
    return subprocess.run(
        [*torchrun, *program], cwd=root, env={**os.environ, **more}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("two")
    done = start([__file__, str(out)], out / "store")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], within: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=within, msg=name)


def test_two_processes_train_as_one_does_a_vit_a_resnet_in_eval_mode_and_cleanclip(ended, tmp_path):
    out, _ = ended
    logs = json.loads((out / "said.json").read_text())[:3]
    own = (train_vit(tmp_path), train_resnet(), train_cleanclip())
    names = ("vit", "resnet", "cleanclip")
    for name, (state, log), theirs in zip(names, own, logs, strict=True):
        assert_close(state, load_file(out / f"{name}.safetensors"), 1e-9)
        for own, other in zip(log, theirs, strict=True):
            assert other == pytest.approx(own, abs=1e-9)
        start = tiny(RESNET if name == "resnet" else VIT).net.state_dict()
        assert max((state[k] - start[k]).abs().max() for k in start) > 0.01  # it did train


def test_what_cannot_be_divided_is_refused_with_the_reason(ended):
    resnet, batch = json.loads((ended[0] / "said.json").read_text())[3]
    assert "SyncBatchNorm, which exists on CUDA only, not on gloo" in resnet
    assert batch.startswith("a batch of 7 cannot be divided among 2 processes")


def test_fill_leaves_the_artifacts_that_one_process_looks_for(ended, monkeypatch, tmp_path):
    out, printed = ended
    monkeypatch.setenv("INVERTUNE_STORE", str(tmp_path))
    assert main(["fill", "smoke", "--only", "05", "--overrides", FILL]) == 0
    one, two = entries(tmp_path), entries(out / "store")
    assert [a.key for a in one] == [a.key for a in two]
    assert printed.count("stored (") == len(two)  # by the first process alone
    together = [(a, b) for a, b in zip(one, two, strict=True) if "2 x" in b.meta["device"]]
    assert sorted(a.meta["step"] for a, _ in together) == ["attack", "baseline"]
    for own, other in together:
        assert other.meta["device"] == f"2 x {own.meta['device']}"
        assert own.metrics["log"][-1] == pytest.approx(other.metrics["log"][-1], abs=1e-4)
        mine, theirs = own.tensors("weights"), other.tensors("weights")
        apart = torch.cat([(theirs[k] - v).abs().flatten() for k, v in mine.items()])
        # Rate 1e-5, 3 steps. Where a gradient is all but zero, Adam steps by its rounding's sign.
        assert (apart > 1e-6).double().mean() < 0.01


def test_torchrun_is_for_fill_only(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert main(["check"]) == 2
    assert capsys.readouterr().err == (
        "error: torchrun is for the command fill only; run this one without it\n"
    )


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DeviceMemoryError("too large"), "too large"),
        (OSError(28, "No space left"), "No space left"),
        (distributed.DistributedError("no share"), "no share"),
    ],
)
def test_every_process_tells_its_own_errors(monkeypatch, capsys, error, told):
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr("invertune.__main__._fill", fail)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert main(["fill", "smoke"]) == 2
        assert capsys.readouterr().err == f"error in process {rank}: {told}\n"


if __name__ == "__main__":
    sys.exit(in_each_process(Path(sys.argv[1])))
