"""One profile's settings and store, and what every step starts from.

A step's key holds its settings, its upstream keys and the data's manifest, so what exists is found
and what changed is computed again. ``STEP_VERSIONS`` is raised when a step's results change.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invertune import data as datasets
from invertune.models import Clip, ModelError, set_state, text_digest, zero_shot_head
from invertune.pretraining import pretrain
from invertune.sections import PRETRAINED, Settings
from invertune.store import Artifact, Compute, Made, default_root, obtain
from invertune.triggers import Trigger
from invertune.weights import load_clip, untrained_clip

STEP_VERSIONS = {
    "pretraining": 1,
    "attack": 2,
    "attack blended": 3,  # its pattern was the mask that inversion began with
    "identification": 2,
    "inversion": 1,
    "sweep": 1,
    "impacts": 1,
    "tuning": 4,
    "baseline": 2,
    "rebound": 2,
    "evaluation": 1,
    "scores": 1,
    "second_round": 1,
}
TRAINED_TOGETHER = ("attack", "baseline")  # by all processes of a torchrun


class DeviceError(ValueError):
    """A device that the settings ask for and this machine does not have."""


class DeviceMemoryError(RuntimeError):
    """A step that does not fit into the device's memory, with the batch size to try."""


@dataclass(frozen=True)
class Model:
    """A CLIP in the chain with its store key; ``trigger`` is known to the attacker only.

    Its ``clip`` is loaded when it is first needed: what is found in the store asks for keys alone.
    ``name`` is for messages.
    """

    load: Callable[[], Clip]
    key: str
    trigger: Trigger | None
    name: str = "the clean model"

    @functools.cached_property
    def clip(self) -> Clip:
        """The model itself, this ``Model``'s own."""
        return self.load()

    def after(self, artifact: Artifact, name: str) -> Model:
        """The same network with the weights that a step left."""

        def load() -> Clip:
            clip = self.load()
            set_state(clip, artifact.tensors("weights"), artifact.key)
            return clip

        return replace(self, load=load, key=artifact.key, name=name)


@dataclass(frozen=True)
class Defender:
    """Where what a defense is given differs from the profile's: a class its list lacks
    (appendix C.1), or images with drawings of one ``style`` alone. Empty: as in the profile.
    """

    lacks: str = ""
    style: str = ""


@dataclass(frozen=True)
class Chain:
    """One profile's settings and store: what every step needs.

    With another ``defender``, class indices after step 1 count in its own list; evaluate what it
    made with the profile's chain. ``heads`` keeps zero-shot heads: half the time of an evaluation
    on mini, and InverTune leaves the text side as it is. ``used`` collects artifacts for ``count``.
    A chain that ``only_finds`` computes no step: ``MissingError`` for what the store lacks.
    """

    settings: Settings
    store: Path
    defender: Defender = Defender()
    heads: dict[tuple[object, ...], Tensor] = field(default_factory=dict, compare=False)
    used: dict[str, Artifact] = field(default_factory=dict, compare=False)
    only_finds: bool = field(default=False, compare=False)

    @property
    def device(self) -> torch.device:
        """The device that is asked for (``DeviceError``); "auto": CUDA where there is one."""
        if self.settings.device == "cpu":
            return torch.device("cpu")
        why = no_gpu()
        if why and self.settings.device == "cuda":
            raise DeviceError(f"device = 'cuda', but {why}; mend that, or set device to cpu")
        return torch.device("cpu" if why else "cuda")

    @property
    def target(self) -> int:
        """Class index of the attacker's target (used to attack and to score, never to defend)."""
        return datasets.class_index(self.settings.data, self.settings.target)

    def with_settings(self, **others: Any) -> Chain:
        """The chain with other settings in the same store, where what is equal is found."""
        return replace(self, settings=self.settings.model_copy(update=others))

    def run(
        self,
        step: str,
        settings: dict[str, Any],
        upstream: Sequence[str],
        compute: Compute,
        seed: int,
        name: str = "",
    ) -> Artifact:
        """Finds or computes one artifact (``store.obtain``) under this profile's data.

        Raises ``DeviceMemoryError`` where a GPU has too little memory for it.
        """
        label = f"{step} {name}, seed {seed}".replace(" ,", ",")

        def within_memory(work: Path) -> Made:
            try:
                return compute(work)
            except torch.OutOfMemoryError as error:
                raise DeviceMemoryError(_too_large(label, settings, error)) from None

        found = obtain(
            self.store,
            step,
            STEP_VERSIONS.get(f"{step} {name}", STEP_VERSIONS[step]),
            {**settings, **self._given(step)},
            upstream,
            datasets.manifest(self.settings.data),
            None if self.only_finds else within_memory,
            seed,
            label=label,
            device=str(self.device),
            together=step in TRAINED_TOGETHER,
        )
        return self.used.setdefault(found.key, found)

    def count(self) -> str:
        """How many artifacts were found and computed since the last count, in a line."""
        made = [artifact for artifact in self.used.values() if artifact.computed]
        found, seconds = len(self.used) - len(made), sum(a.meta["seconds"] for a in made)
        self.used.clear()
        spent = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
        return f"artifacts: {found} found in the store, {len(made)} computed ({spent})"

    def _given(self, step: str) -> dict[str, Any]:
        """What a precision below float32 and another defender add to a key.

        A defender adds nothing to what comes before the defense, so that it is shared.
        """
        precision = self.settings.precision
        given = {} if precision == "float32" else {"precision": precision}
        defender = {} if step in ("pretraining", "attack") else asdict(self.defender)
        return given | {k: v for k, v in defender.items() if v}


def _too_large(label: str, settings: dict[str, Any], error: Exception) -> str:
    """What a user can do about a full GPU: torch's numbers, and half of the largest batch."""
    sections = (settings, *(v for v in settings.values() if isinstance(v, dict)))
    part = max(
        (p for p in sections if "batch" in p), key=lambda p: p["batch"], default={"batch": 0}
    )
    batch, smaller = part["batch"], "free that memory"
    if batch > 1:
        smaller = f"set its batch to {batch // 2} (now {batch})"
        if "steps" in part:
            smaller += f" and its steps to {2 * part['steps']}, for as many images,"
    numbers = ". ".join(str(error).split(". ")[:3])
    return f"{label}: {smaller} or use a larger device; {numbers}"


@functools.cache
def no_gpu() -> str:
    """Why no GPU can be used, e.g. torch's words for a driver that is too old; "" if one can."""
    with warnings.catch_warnings(record=True) as said:  # torch says it once
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return ""
    if not said:
        return "torch finds no GPU"
    why = " ".join(str(said[0].message).split())
    print(f"no GPU is used: {why}", file=sys.stderr, flush=True)
    return why


def open_chain(settings: Settings, store: Path | None = None) -> Chain:
    """The chain of ``settings`` in ``store``, by default $INVERTUNE_STORE or results/store."""
    torch.backends.cudnn.allow_tf32 = False  # torch's default rounds float32 convolutions on CUDA
    return Chain(settings, store or default_root())


def pretrained(chain: Chain) -> Model:
    """The clean model every attack starts from; trained now where weights are "pretrained".

    Data that is missing is an error before weights are downloaded.
    """
    settings = chain.settings
    datasets.manifest(settings.data)
    if settings.weights == PRETRAINED:
        return _trained_here(chain)

    def load() -> Clip:
        return _at_precision(chain, load_clip(settings.backbone, settings.weights, chain.device)[0])

    size = settings.data.image_size_px
    return Model(
        load, _checked_weights(settings.backbone, settings.weights, chain.device, size), None
    )


def _trained_here(chain: Chain) -> Model:
    settings, data = chain.settings, chain.settings.data

    def untrained() -> Clip:
        clip = untrained_clip(settings.backbone, data.image_size_px, chain.device)
        return _at_precision(chain, clip)

    def compute(work: Path) -> Made:
        pairs = datasets.caption_pairs(data, "pretraining", data.pretraining_pairs, chain.store)
        torch.manual_seed(data.seed)
        clip, classes = untrained(), len(datasets.class_names(data))
        log = pretrain(clip, pairs, classes, settings.pretraining, data.seed, work)
        return {"weights": clip.net.state_dict()}, {"log": log}

    recipe = settings.pretraining.model_dump(mode="json")
    keyed = {"backbone": settings.backbone, **recipe, "pairs": data.pretraining_pairs}
    artifact = chain.run("pretraining", keyed, [], compute, data.seed, settings.backbone)
    return Model(untrained, artifact.key, None).after(artifact, "the clean model")


def _at_precision(chain: Chain, clip: Clip) -> Clip:
    return replace(clip, precision=getattr(torch, chain.settings.precision))


@functools.lru_cache(maxsize=128)
def _checked_weights(backbone: str, weights: str, device: torch.device, size_px: int) -> str:
    """The key of the clean model's weights, which fit the data; else ``ModelError``."""
    clip, key = load_clip(backbone, weights, device)
    if clip.image_size != size_px:
        raise ModelError(
            f"data.image_size_px = {size_px}, but the {backbone} of weights "
            f"{weights!r} takes images of {clip.image_size} px"
        )
    return key


def pool(chain: Chain, part: str) -> datasets.Labeled:
    """The labeled images of one part: inversion, heldout or evaluation."""
    data = chain.settings.data
    count = getattr(data, f"{part}_images")
    found = datasets.labeled_images(data, part, count, chain.store, chain.defender.style)
    if not chain.defender.lacks:
        return found
    kept = torch.tensor([n != chain.defender.lacks for n in datasets.class_names(data)])
    known = kept[found.labels]
    return datasets.Labeled(found.images[known], (kept.cumsum(0) - 1)[found.labels[known]])


def class_list(chain: Chain) -> tuple[str, ...]:
    """The classes that the defense knows, in label order: the profile's, or all but one name."""
    return tuple(n for n in datasets.class_names(chain.settings.data) if n != chain.defender.lacks)


def class_head(chain: Chain, clip: Clip) -> Tensor:
    """The zero-shot head of ``clip`` on the defense's classes and the profile's templates."""
    names, templates = class_list(chain), tuple(datasets.templates(chain.settings.data))
    key = (text_digest(clip), names, templates)
    if key not in chain.heads:
        chain.heads[key] = zero_shot_head(clip, names, templates)
    return chain.heads[key]
