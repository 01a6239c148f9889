"""One profile's settings and store, and what every step starts from.

A step's key holds its settings, its upstream keys and the data's manifest, so what exists is found
and what changed is computed again. ``STEP_VERSIONS`` is raised when a step's results change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invertune import data as datasets
from invertune.models import Clip, load_embedded, locked_hash, zero_shot_head
from invertune.sections import Settings
from invertune.store import Artifact, default_root, obtain
from invertune.triggers import Trigger

STEP_VERSIONS = {
    "attack": 1,
    "identification": 2,
    "inversion": 1,
    "sweep": 1,
    "tuning": 2,
    "baseline": 1,
    "rebound": 1,
    "evaluation": 1,
    "scores": 1,
}
TRAINED_TOGETHER = ("attack", "baseline")  # by all processes of a torchrun
NULLS = ("none", "clean_finetuned")


@dataclass(frozen=True)
class Model:
    """A CLIP in the chain with its store key; ``trigger`` is known to the attacker only."""

    clip: Clip
    key: str
    trigger: Trigger | None


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
    made with the profile's chain.
    """

    settings: Settings
    store: Path
    defender: Defender = Defender()

    @property
    def device(self) -> torch.device:
        """The device the settings ask for; "auto" takes CUDA where there is one."""
        wanted = self.settings.device
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(wanted)

    @property
    def target(self) -> int:
        """Class index of the attacker's target (used to attack and to score, never to defend)."""
        return datasets.class_index(self.settings.data, self.settings.target)

    def run(
        self,
        step: str,
        settings: dict[str, Any],
        upstream: Sequence[str],
        compute: Any,
        seed: int,
        name: str = "",
    ) -> Artifact:
        """Finds or computes one artifact (``store.obtain``) under this profile's data."""
        return obtain(
            self.store,
            step,
            STEP_VERSIONS[step],
            {**settings, **self._given(step), "seed": seed},
            list(upstream),
            datasets.manifest(self.settings.data),
            compute,
            seed,
            label=f"{step} {name}, seed {seed}".replace(" ,", ","),
            device=str(self.device),
            together=step in TRAINED_TOGETHER,
        )

    def _given(self, step: str) -> dict[str, Any]:
        """What another defender adds to a key: nothing to an attack's, so that it is shared."""
        return {} if step == "attack" else {k: v for k, v in asdict(self.defender).items() if v}


def open_chain(settings: Settings, store: Path | None = None) -> Chain:
    """The chain of ``settings`` in ``store``, by default $INVERTUNE_STORE or results/store."""
    return Chain(settings, store or default_root())


def pretrained(chain: Chain) -> Model:
    """The clean model every attack starts from."""
    clip = load_embedded(chain.settings.backbone, chain.device)
    return Model(clip, str(locked_hash(clip.backbone)), None)


def pool(chain: Chain, part: str) -> datasets.Labeled:
    """The labeled images of one part: inversion, heldout or evaluation."""
    own = chain.settings.data
    counts = {
        "inversion": own.inversion_images,
        "heldout": own.heldout_images,
        "evaluation": own.evaluation_images,
    }
    found = datasets.labeled_images(own, part, counts[part], chain.store, chain.defender.style)
    if not chain.defender.lacks:
        return found
    lacking = datasets.class_index(own, chain.defender.lacks)
    known = found.labels != lacking
    labels = found.labels - (found.labels > lacking).long()
    return datasets.Labeled(found.images[known], labels[known])


def class_list(chain: Chain) -> tuple[str, ...]:
    """The classes that the defense knows, in label order: the profile's, or all but one."""
    return tuple(n for n in datasets.class_names(chain.settings.data) if n != chain.defender.lacks)


def class_head(chain: Chain, clip: Clip) -> Tensor:
    """The zero-shot head of ``clip`` on the defense's classes and the profile's templates."""
    return zero_shot_head(clip, class_list(chain), datasets.templates(chain.settings.data))
