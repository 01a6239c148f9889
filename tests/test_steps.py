"""The chain on disk: one seed gives the same artifacts twice, and keys follow what matters."""

import warnings
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch

from invertune import data as datasets
from invertune import exhibits, reports, steps
from invertune.chain import (
    Chain,
    DeviceError,
    DeviceMemoryError,
    class_head,
    class_list,
    no_gpu,
    open_chain,
    pool,
    pretrained,
)
from invertune.evaluation import evaluated
from invertune.layouts import DataError
from invertune.models import zero_shot_head
from invertune.perturbations import as_trigger
from invertune.results import row, to_frame
from invertune.settings import load_settings
from invertune.trigger_inversion import Run

QUICK = {
    "attacks": {"names": ["blended"], "blended": {"steps": 3}},
    "identification": {"steps": 2, "check_steps": 2},
    "inversion": {"steps": 4, "measure_every_steps": 2},
    "tuning": {"steps": 4, "measure_every_steps": 2},
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return open_chain(load_settings("smoke", QUICK), tmp_path_factory.mktemp("store"))


def test_a_target_that_is_no_class_is_told_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="class 'mushrom' is not in the list"):
        steps.attacked(
            open_chain(load_settings("smoke", {"target": "mushrom"}), tmp_path), "sig", 0
        )
    assert not any(tmp_path.iterdir())


def test_target_images_are_needed_where_they_are_the_reference(tmp_path: Path) -> None:
    few = {"data": {"inversion_images": 32}, "inversion": {"emb_reference": "target_image"}}
    few["ablations"] = {"tuning": {"images": []}}
    chain = open_chain(load_settings("smoke", few), tmp_path)
    absent = set(range(210)).difference(pool(chain, "inversion").labels.tolist())
    run = Run.of(min(absent), chain.settings.inversion)
    with pytest.raises(DataError, match="none of the 32 images of inversion shows the suspected"):
        steps.invert(chain, pretrained(chain), [run], 0)


def test_why_no_gpu_is_used_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_old() -> bool:
        warnings.warn("The NVIDIA driver\nis too old", stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    no_gpu.cache_clear()
    with pytest.raises(DeviceError, match="device = 'cuda', but The NVIDIA driver is too old"):
        _ = open_chain(load_settings("smoke", {"device": "cuda"})).device
    assert open_chain(load_settings("smoke")).device.type == "cpu"
    assert capsys.readouterr().err == "no GPU is used: The NVIDIA driver is too old\n"
    no_gpu.cache_clear()


def test_impacts_are_those_of_the_inverted_trigger_alone(chain: Chain) -> None:
    alone = chain.settings.tuning.model_copy(update={"triggers": ("inverted",)})
    other = replace(chain, settings=chain.settings.model_copy(update={"tuning": alone}))
    found = steps.impacts(chain, "blended", 0).metrics["impacts"]
    assert found == pytest.approx(steps.tuned(other, "blended", 0).metrics["impacts"])
    assert found != pytest.approx(steps.tuned(chain, "blended", 0).metrics["impacts"])
    assert steps.critical(chain, "blended", 0).mean == pytest.approx(mean(found.values()))


def test_the_same_seed_twice_gives_equal_results(chain: Chain, tmp_path: Path) -> None:
    again = open_chain(chain.settings, tmp_path)
    first, second = (steps.tuned(c, "blended", 0) for c in (chain, again))
    assert first.key == second.key and first.metrics == second.metrics
    weights, others = first.tensors("weights"), second.tensors("weights")
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert reports.tuning_rows(chain) == reports.tuning_rows(again)


def test_another_seed_or_setting_gives_other_keys_downstream_only(chain: Chain) -> None:
    beta = load_settings("smoke", {**QUICK, "tuning": {**QUICK["tuning"], "beta": 0.25}})
    other = Chain(beta, chain.store)
    assert steps.inverted(other, "blended", 0).key == steps.inverted(chain, "blended", 0).key
    assert steps.tuned(other, "blended", 0).key != steps.tuned(chain, "blended", 0).key
    assert steps.attacked(chain, "blended", 1).key != steps.attacked(chain, "blended", 0).key


def test_tuning_changes_critical_rows_of_the_image_tower_only(chain: Chain) -> None:
    before = steps.attacked(chain, "blended", 0).tensors("weights")
    after = steps.tuned(chain, "blended", 0).tensors("weights")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = tuple(steps.tuned(chain, "blended", 0).metrics["layers"])
    assert changed and all(name.startswith(layers) for name in changed)
    assert not any("running" in name or "num_batches" in name for name in changed)


@pytest.mark.parametrize(("driven", "taken"), [((5, 10), [1, 0]), ((1, 4), [1]), ((9, 4), [0])])
def test_universal_triggers_are_the_perturbations_that_drive_half_of_the_images(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, driven: tuple[int, int], taken: list[int]
) -> None:
    found = steps.identified(chain, "blended", 0)
    kinds = list(found.tensors("perturbations"))[:2]
    size, target = chain.settings.data.image_size_px, int(found.metrics["ranking"][0])
    counts = {kind: torch.zeros(210, dtype=int) for kind in kinds}
    for kind, count in zip(kinds, driven, strict=True):
        counts[kind][target], counts[kind][target - 1] = count, 10 - count
    increases = {kind: {"adversarial": c.tolist()} for kind, c in counts.items()}
    monkeypatch.setitem(found.metrics, "increases", increases)
    triggers, key = steps.universal_triggers(chain, "blended", 0)
    tensors = found.tensors("perturbations")
    expected = [as_trigger(kinds[i], tensors[kinds[i]], size) for i in taken]
    assert key == found.key and [t.kind for t in triggers] == [t.kind for t in expected]
    for trigger, other in zip(triggers, expected, strict=True):
        assert all(torch.equal(trigger.tensors[k], v) for k, v in other.tensors.items())


def test_rates_lie_in_their_intervals_and_grow_with_k(chain: Chain) -> None:
    model = steps.poisoned(chain, "blended", 0)
    rates = evaluated(chain, model, model.trigger, model.key, 0).metrics
    assert all(0 <= low <= value <= high <= 100 for value, _, low, high in rates.values())
    assert rates["zeroshot.asr.1"][0] <= rates["zeroshot.asr.3"][0] <= rates["zeroshot.asr.10"][0]


def test_a_full_gpu_names_a_smaller_batch(chain: Chain) -> None:
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free. See the docs."

    def compute(_: Path) -> None:
        raise torch.OutOfMemoryError(text)

    with pytest.raises(
        DeviceMemoryError,
        match=r"seed 0: set its batch to 32 \(now 64\) and its steps to 8.* 1.00 GiB",
    ):
        own = {"batch": 16, "inversion": {"batch": 64, "steps": 4}}
        chain.run("inversion", own, [], compute, 0)


def test_notebook_03_shows_the_chains_inversion_not_notebook_07s(chain: Chain) -> None:
    about = dict(profile="smoke", backbone="RN50", target="mushroom", attack="blended", seed=0, k=1)
    about |= dict(paper_item="extra", metric="inverted_asr", task="zeroshot", defense="none")
    rows = [row(**about, value=v, variant=t) for v, t in ((90, ""), (10, "steps=9"))]  # type: ignore
    shown = exhibits.inversion_table(chain, to_frame(rows)).set_index("attack")["inverted ASR"]
    assert shown["Blended"] == 90


def test_artifacts_are_counted_since_the_last_count(chain: Chain, tmp_path: Path) -> None:
    own = Chain(chain.settings, tmp_path)
    for seed in (0, 1, 1):
        own.run("scores", {}, [], lambda _: ({}, {"ca": 1}), seed)
    assert own.count() == "artifacts: 0 found in the store, 2 computed (0 s)"
    own.run("scores", {}, [], lambda _: ({}, {"ca": 1}), 1)
    assert own.count() == "artifacts: 1 found in the store, 0 computed (0 s)"
    assert own.count().startswith("artifacts: 0 found")


def test_a_head_is_kept_while_the_text_side_stays(chain: Chain) -> None:
    clip = pretrained(chain).clip
    templates = datasets.templates(chain.settings.data)
    head = class_head(chain, clip)
    assert torch.equal(head, zero_shot_head(clip, class_list(chain), templates))
    with torch.no_grad():
        clip.net.visual.conv1.weight.mul_(2)
        assert class_head(chain, clip) is head
        clip.net.positional_embedding.mul_(2)
    assert torch.equal(class_head(chain, clip), zero_shot_head(clip, class_list(chain), templates))
    assert not torch.equal(class_head(chain, clip), head)


def test_layers_come_first_to_last() -> None:
    names = [f"visual.transformer.resblocks.{i}" for i in range(12)]
    assert list(steps.in_depth(dict.fromkeys(sorted(names), 1.0))) == names
