"""The paper's four backbones at 224 px, with random weights, take real steps through every stage.

The settings are the paper's but for counts of steps and images. Random weights show that every
stage runs, changes what it should and nothing else, and stays finite; they show no backdoor.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny import alive
from torch import Tensor, nn

from invertune import triggers
from invertune.activation_tuning import Tuned, tune
from invertune.activations import candidate_layers, rows_to_train
from invertune.attacks import ATTACKS, Poisoned, Victim
from invertune.baselines import trained
from invertune.data import Pairs
from invertune.metrics import attack_success_rate, clean_accuracy, predictions, recall_at_k
from invertune.models import Clip, embed_images, embed_texts, to_pixels, zero_shot_head
from invertune.sections import BACKBONES
from invertune.settings import load_settings
from invertune.target_identification import identify
from invertune.trigger_inversion import InvertedTrigger, Run, initial_trigger, invert_triggers
from invertune.weights import random_clip

EXPECTED = Path(__file__).resolve().parent.parent / "expected" / "paper.csv"
CHEAP = ("RN50", "ViT-B-32")  # these run every stage; the others fine-tuning, inversion and tuning
NAMES, IMAGES = ("mushroom", "banana", "lemon"), 2
KINDS = {"RN50": ["patch_feature", "generator", "fourier"], "ViT-B-32": ["generator"]}
ONE_STEP = {"steps": 1, "batch": 2, "warmup_steps": 0}
FEW = {
    "attacks": {
        "badnet": {**ONE_STEP, "poison_rate": 0.5},
        "badclip": {**ONE_STEP, "poison_rate": 0.5, "patch_steps": 1},
    },
    "identification": {"steps": 1, "batch": 2, "check_steps": 1, "wave_cycles": 1},
    "inversion": {"steps": 2, "batch": 2, "measure_every_steps": 2},
    "tuning": {"steps": 1, "images": IMAGES, "batch": IMAGES, "measure_every_steps": 2},
    "baselines": {"ft": {**ONE_STEP, "lrs": [0.0000045]}},
}
SETTINGS = load_settings("paper", FEW)


@dataclass(frozen=True)
class Case:
    """One clean model with what the stages need; ``before`` are its weights at the start."""

    clip: Clip
    images: Tensor
    labels: Tensor
    head: Tensor
    target: int
    before: dict[str, Tensor]

    @property
    def victim(self) -> Victim:
        captions = tuple(f"a photo of a {NAMES[i]}" for i in range(IMAGES))
        pairs = Pairs(self.images, captions, torch.full((IMAGES, 2), -1), cycled=False)
        return Victim(self.clip, pairs, ("a mushroom",), self.images[:1])


@pytest.fixture(scope="module", params=BACKBONES)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, 224, 224), dtype=torch.uint8)
    clip = alive(random_clip(request.param, "openai"), to_pixels(images, "cpu"))
    features = embed_images(clip, images)
    head = nn.functional.normalize(torch.randn(8, features.shape[1]), dim=1)
    predicted = predictions(features, head)
    target = next(c for c in range(len(head)) if c not in predicted)
    return Case(clip, images, predicted, head, target, weights_of(clip))


@pytest.fixture(scope="module")
def poisoned(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Poisoned:
    attack = ATTACKS["badnet"]
    return attack(case.victim, SETTINGS.attacks, 0, tmp_path_factory.mktemp("badnet"))


@pytest.fixture(scope="module")
def inverted(case: Case) -> InvertedTrigger:
    own = SETTINGS.inversion
    run = Run.of(case.target, own)
    return invert_triggers(case.clip, case.images, case.images, case.head, [run], own, 0)[0]


@pytest.fixture(scope="module")
def tuned(case: Case, inverted: InvertedTrigger) -> Tuned:
    trigger = triggers.mask_trigger(inverted.mask, inverted.pattern)
    own, target = SETTINGS.tuning, case.target
    parts = (case.images, [trigger], case.images, case.labels, case.head, target, own, 0)
    return tune(case.clip, *parts)


def weights_of(clip: Clip) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in clip.net.state_dict().items()}


def moved(clip: Clip, before: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that differ."""
    after = clip.net.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}


def finite(rows: list[dict[str, float]]) -> bool:
    return bool(rows) and bool(torch.tensor([list(row.values()) for row in rows]).isfinite().all())


def only(case: Case, *backbones: str) -> None:
    if case.clip.backbone not in backbones:
        pytest.skip("covered by the cheaper backbones")


def test_it_is_the_papers_backbone(case: Case) -> None:
    assert case.clip.image_size == 224 and case.clip.tokenizer(["a"]).shape == (1, 77)
    with EXPECTED.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "layer_impact"]
    own = [row for row in rows if row["backbone"] == case.clip.backbone]
    layers = {row["variant"].removeprefix("layer=") for row in own}
    assert layers == set(candidate_layers(case.clip))


def test_poisoned_finetuning_moves_both_towers_of_the_copy(case: Case, poisoned: Poisoned) -> None:
    changed = moved(poisoned.clip, case.before)
    towers = {"text_projection", "logit_scale", "token_embedding.weight"}
    assert towers < changed and any(name.startswith("visual.") for name in changed)
    assert len(changed) > 0.9 * len(case.before)
    assert finite(poisoned.log) and poisoned.trigger.size == 224


def test_badclip_optimizes_its_patch_first(case: Case, tmp_path: Path) -> None:
    only(case, "RN50")
    result = ATTACKS["badclip"](case.victim, SETTINGS.attacks, 0, tmp_path)
    patch = result.trigger.tensors["patch"]
    assert patch.shape == (3, 16, 16) and 0 <= patch.min() < patch.max() <= 1
    assert finite(result.log)


def test_identification_ranks_and_leaves_the_model_alone(case: Case) -> None:
    only(case, *CHEAP)
    kinds = KINDS[case.clip.backbone]
    own = SETTINGS.identification.model_copy(update={"kinds": kinds})
    found = identify(
        case.clip, case.images, case.images, case.head, own, SETTINGS.inversion, seed=0
    )
    assert list(found.increases) == kinds and len(found.ranking) == own.candidates
    for kind, increase in found.increases.items():
        assert increase.clean.sum() == increase.adversarial.sum() == IMAGES
        side = own.patch_px if kind in ("patch_feature", "generator") else 224
        assert found.perturbations[kind].shape == (3, side, side)
        assert found.perturbations[kind].isfinite().all()


def test_inversion_moves_mask_and_pattern_only(case: Case, inverted: InvertedTrigger) -> None:
    start, _ = initial_trigger(case.clip, SETTINGS.inversion, 0)
    assert inverted.mask.shape == inverted.pattern.shape == (3, 224, 224)
    for part in (inverted.mask, inverted.pattern):
        assert 0 <= part.min() < part.max() <= 1
    assert (inverted.mask - start).abs().max() > SETTINGS.inversion.lr  # two steps of Adam
    assert finite(list(inverted.log))


def test_tuning_changes_critical_rows_and_nothing_else(case: Case, tuned: Tuned) -> None:
    changed, after = moved(tuned.clip, case.before), tuned.clip.net.state_dict()
    assert set(tuned.selection.layers) <= set(candidate_layers(case.clip))
    rows = rows_to_train(case.clip, tuned.neurons, SETTINGS.tuning.trainable)
    assert changed and changed <= set(rows)
    for name in changed:
        assert torch.equal(case.before[name][~rows[name]], after[name][~rows[name]])
    assert finite(tuned.log)


def test_a_baseline_finetunes_a_copy(case: Case) -> None:
    only(case, *CHEAP)
    own = SETTINGS.baselines
    result = trained("ft", case.clip, case.victim.pairs, own, own.ft.lrs[0], 0, None)
    assert {"text_projection", "logit_scale"} < moved(result.clip, case.before)
    assert finite(result.log)


def test_rates_of_a_poisoned_model_are_measured(case: Case, poisoned: Poisoned) -> None:
    only(case, *CHEAP)
    clip, labels = poisoned.clip, torch.arange(IMAGES)
    head = zero_shot_head(clip, NAMES, ("a photo of a {}", "a {}"))
    attacked = triggers.apply(poisoned.trigger, to_pixels(case.images, clip.device))
    clean, shown = embed_images(clip, case.images), embed_images(clip, attacked)
    recall = recall_at_k(clean, embed_texts(clip, NAMES[:IMAGES]), labels, (1, 2))
    assert 0 <= recall[1].value <= recall[2].value == 100
    assert clean_accuracy(clean, head, labels).n == IMAGES
    assert attack_success_rate(shown, head, labels, 0).n == IMAGES - 1


def test_no_stage_touched_the_clean_model(case: Case) -> None:
    assert not moved(case.clip, case.before)
