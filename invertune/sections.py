"""The settings of every step, a frozen section each; ``invertune.settings`` loads the profiles."""

from __future__ import annotations

import math
from types import GenericAlias
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, create_model, field_validator

Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, le=1)]
Rates = Annotated[tuple[Rate, ...], Field(min_length=1)]
Weight = Annotated[float, Field(ge=0)]
Percent = Annotated[float, Field(ge=0, le=100)]
Attack = Literal["badnet", "blended", "sig", "wanet", "badencoder", "badclip"]
Baseline = Literal["ft", "cleanclip", "cleanerclip", "par"]
Backbone = Literal["RN50", "RN101", "ViT-B-16", "ViT-B-32"]
BACKBONES = get_args(Backbone)
PICTOGRAMS = "pictograms"  # the embedded benchmark
OWN_IMAGES = "images:"  # "images:FOLDER": a user's folder with one subfolder of images per class
# weights: the shipped ones; trained here with the profile's own recipe
EMBEDDED, PRETRAINED = "embedded", "pretrained"
NULLS = ("none", "clean_finetuned")  # models without a backdoor, beside the attacks


def _has_truth(value: Any, depth: int = 2) -> bool:
    """Whether this is a truth value, or a list of at most so many levels that holds one."""
    listed = value if depth and isinstance(value, list | tuple) else ()
    return isinstance(value, bool) or any(_has_truth(part, depth - 1) for part in listed)


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        if _has_truth(value) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("true and false (in YAML also yes, no, on, off) are no values here")
        return value


class Data(Section):
    """Where images and captions come from, and how many of each (paper, section 4.1)."""

    source: Annotated[str, Field(pattern=f"^({PICTOGRAMS}|folders|{OWN_IMAGES}.+)$")]
    image_size_px: Count
    seed: Annotated[int, Field(ge=0)]
    pretraining_pairs: Count
    poisoning_pairs: Count
    inversion_images: Count
    heldout_images: Count
    evaluation_images: Count
    retrieval_images: Count


class Pretraining(Section):
    """Training of a shipped model: its image tower as a classifier, then both contrastively."""

    warm_start_steps: Steps
    warm_start_lr: Rate
    contrastive_steps: Steps
    contrastive_lr: Rate
    warmup_steps: Steps
    weight_decay: Weight


class Finetuning(Section):
    """Poisoned contrastive fine-tuning (paper, appendix A)."""

    poison_rate: Rate
    lr: Rate
    steps: Count
    batch: Count
    warmup_steps: Steps
    weight_decay: Weight


class BadNet(Finetuning):
    """A square of fixed noise, ``patch_px`` wide (Gu et al. 2017)."""

    patch_px: Count


class Blended(Finetuning):
    """A pattern over the whole image, of opacity ``alpha`` (Chen et al. 2017)."""

    alpha: Rate


class Sig(Finetuning):
    """Vertical stripes of ``amplitude``, in pixel values of 0 to 1 (Barni et al. 2019)."""

    amplitude: Rate
    cycles: Count


class WaNet(Finetuning):
    """A smooth warp, drawn on ``grid_points`` x ``grid_points`` (Nguyen and Tran 2021)."""

    grid_points: Count
    strength: Weight


class BadEncoder(Section):
    """The image tower alone learns the trigger, from images of the target (Jia et al. 2022)."""

    patch_px: Count
    reference_images: Count
    reference_weight: Weight
    utility_weight: Weight
    lr: Rate
    steps: Count
    batch: Count
    warmup_steps: Steps
    weight_decay: Weight


class BadClip(Finetuning):
    """A patch optimized first: toward the target, away from the clean image (Liang et al. 2024)."""

    batch: Annotated[int, Field(ge=2)]  # a step of the patch sees half of one
    patch_px: Count
    location: Literal["corner", "middle"]
    patch_lr: Rate
    patch_steps: Count
    image_weight: Weight
    negative_weight: Weight
    margin: Weight


class Attacks(Section):
    """The six attacks (section 4.1, appendix A), and the gate that each must pass."""

    names: tuple[Attack, ...]
    target_captions: Count
    gate_asr_percent: Percent
    gate_ca_drop_points: Percent
    badnet: BadNet
    blended: Blended
    sig: Sig
    wanet: WaNet
    badencoder: BadEncoder
    badclip: BadClip


Kind = Literal[
    "patch_feature", "patch_prediction", "ball_feature", "ball_prediction", "generator", "fourier"
]


class Identification(Section):
    """Step 1 (paper, section 3.1)."""

    kinds: Annotated[tuple[Kind, ...], Field(min_length=1)]
    patch_px: Count
    ball_radius: Rate
    wave_amplitude: Rate
    wave_cycles: Count
    steps: Count
    batch: Count
    lr: Rate
    generator_lr: Rate
    candidates: Count
    check_steps: Count
    check_lr: Rate

    @property
    def waves(self) -> list[tuple[int, int]]:
        """The wave vectors (down, across) that the kind "fourier" tries, in cycles per image."""
        limit = self.wave_cycles
        return [
            (down, across)
            for down in range(limit + 1)
            for across in range(-limit, limit + 1)
            if (down, across) > (0, 0) and math.hypot(down, across) <= limit
        ]


class Inversion(Section):
    """Step 2 (paper, section 3.2, algorithm 1)."""

    lambda1: Weight
    lambda2: Weight
    lambda3: Weight
    lambda4: Weight
    temperature: Annotated[float, Field(gt=0)]
    lr: Rate
    steps: Count
    batch: Count
    measure_every_steps: Count
    asr_floor_percent: Percent
    emb_reference: Literal["clean", "target_image"]
    mask_init: Literal["uniform", "ones"]
    ssim_space: Literal["pixels", "normalized"]
    clamp: Literal["per_channel", "scalar"]
    mask: Literal["per_channel", "shared"]


class Tuning(Section):
    """Step 3 (paper, section 3.3, algorithm 2)."""

    triggers: Annotated[tuple[Literal["inverted", "universal"], ...], Field(min_length=1)]
    beta: Weight
    lrs: Rates
    steps: Count
    images: Count
    batch: Count
    measure_every_steps: Count
    allowed_ca_drop_points: Percent
    layer_rule: Literal["mean_plus_std", "top3"]
    neuron: Literal["channel", "unit"]
    clusters: Annotated[int, Field(ge=2)]
    trainable: Literal["critical_rows", "all_visual"]
    align_form: Literal["squared", "ratio"]
    preserve_form: Literal["similarity", "feature"]
    reduction: Literal["mean", "sum"]
    bn_mode: Literal["eval", "train"]


class BaselineTraining(Section):
    """Fine-tuning of the suspected model on clean pairs (paper, section 4.1, appendix B)."""

    lrs: Rates
    steps: Count
    batch: Count
    warmup_steps: Steps
    weight_decay: Weight


class CleanClip(BaselineTraining):
    """Adds contrast within each modality, between augmented views (Bansal et al. 2023)."""

    in_modal_weight: Weight
    text_change_rate: Rate


class CleanerClip(CleanClip):
    """Adds counterfactual sub-captions."""

    sub_caption_weight: Weight
    sub_caption_share: Rate
    counterfactuals: Count


class Par(BaselineTraining):
    """Perturb and recover."""

    start_lr_ratio: Annotated[float, Field(gt=0)]
    cutoff: Annotated[float, Field(ge=0, le=4)]
    noise_std: Weight
    noise_probability: Annotated[float, Field(ge=0, le=1)]
    erase_probability: Annotated[float, Field(ge=0, le=1)]
    erase_area: tuple[Rate, Rate]


class Baselines(Section):
    """The defenses the paper compares with (section 4.1, appendix B)."""

    names: tuple[Baseline, ...]
    pairs: Count
    allowed_ca_drop_points: Percent
    legacy_schedule: bool
    synonyms: Literal["keywords", "wordnet"]
    ft: BaselineTraining
    cleanclip: CleanClip
    cleanerclip: CleanerClip
    par: Par


class Rebound(Section):
    """Benign fine-tuning after a defense (not in the paper)."""

    attacks: tuple[Attack, ...]
    pairs: Count
    steps: Count
    batch: Count
    weight_decay: Weight


class Generalization(Section):
    """Other targets and backbones, and claims made in passing (paper, section 4.5, C.1, D.3)."""

    attack: Attack
    targets: tuple[str, ...]
    backbones: tuple[Backbone, ...]
    defenses: tuple[Baseline | Literal["invertune"], ...]
    baseline_lrs: Count
    few_images: Count
    few_heldout_images: Count
    few_tuning_images: Count
    other_style: Literal[
        "noto", "twemoji", "emojione", "fxemoji", "fluent-flat", "fluent-3d", "openclipart"
    ]

    @property
    def baselines(self) -> tuple[str, ...]:
        """The ``defenses`` but InverTune."""
        return tuple(name for name in self.defenses if name != "invertune")


def _changes(section: type[Section], *fixed: str) -> type[Section]:
    """A section that lists alternative values for every setting of ``section`` except ``fixed``."""
    kinds = get_type_hints(section, include_extras=True)
    names = [name for name in section.model_fields if name not in fixed]
    fields: dict[str, Any] = {n: (GenericAlias(tuple, (kinds[n], ...)), ...) for n in names}
    return create_model(f"{section.__name__}Changes", __base__=Section, **fields)


InversionChanges = _changes(Inversion, "lr", "batch", "measure_every_steps", "asr_floor_percent")
TuningChanges = _changes(
    Tuning,
    *("triggers", "steps", "batch", "measure_every_steps", "allowed_ca_drop_points", "reduction"),
)
WEIGHTS = ("lambda1", "lambda2", "lambda3", "lambda4")
INVERSION_SWITCHES = tuple(n for n in InversionChanges.model_fields if n not in WEIGHTS)
TUNING_SWITCHES = tuple(n for n in TuningChanges.model_fields if n != "beta")


class Sweep(NamedTuple):
    """Settings ``names`` of a ``step`` that notebook 07 changes one at a time.

    ``attacks`` is the field of ``Ablations`` that says on which, ``item`` where the rows go.
    """

    step: Literal["inversion", "tuning"]
    names: tuple[str, ...]
    attacks: str
    item: str


SWEEPS = {
    "loss weights": Sweep("inversion", WEIGHTS, "weight_attacks", "table2"),
    "beta": Sweep("tuning", ("beta",), "beta_attacks", "figure6"),
    "inversion forms": Sweep("inversion", INVERSION_SWITCHES, "switch_attacks", "extra"),
    "tuning forms": Sweep("tuning", TUNING_SWITCHES, "switch_attacks", "extra"),
}


class Ablations(Section):
    """What notebook 07 changes (paper, sections 4.3 and 4.4), and on which attacks."""

    weight_attacks: tuple[Attack, ...]
    perturbation_attacks: tuple[Attack, ...]
    beta_attacks: tuple[Attack, ...]
    switch_attacks: tuple[Attack, ...]
    round_attacks: tuple[Attack, ...]
    inversion: InversionChanges  # type: ignore[valid-type]
    tuning: TuningChanges  # type: ignore[valid-type]


class Settings(Section):
    """One resolved profile. ``profile`` is its name; every other key stands in the YAML file."""

    profile: str
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], Field(min_length=1)]
    backbone: Backbone
    weights: Annotated[str, Field(min_length=1)]
    target: str
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["float32", "bfloat16"]
    data: Data
    pretraining: Pretraining
    attacks: Attacks
    identification: Identification
    inversion: Inversion
    tuning: Tuning
    baselines: Baselines
    rebound: Rebound
    generalization: Generalization
    ablations: Ablations
