"""What a run would do: steps, planned exposures, what the store holds, minutes, memory.

An exposure is one image's forward and backward pass: what a run on a CPU must economize.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from invertune.settings import Settings, SettingsError, load_settings

RATES = Path(__file__).resolve().parent.parent / "expected" / "rates.json"
CONTROLS = 2  # the clean model and the clean model fine-tuned without poison (the nulls)


@dataclass(frozen=True)
class Work:
    """One line of the plan: ``runs`` models of ``exposures`` image passes each."""

    notebook: str
    step: str
    runs: int
    exposures: int
    rate: str

    @property
    def total(self) -> int:
        """Image passes of all runs."""
        return self.runs * self.exposures


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that a plan and a run share."""
    parser.add_argument("profile", nargs="?", default="mini", help="smoke, mini or paper")
    parser.add_argument("--only", metavar="NN", help="only the notebooks that start with NN")
    parser.add_argument("--seeds", metavar="LIST", help="seeds, separated by commas: 1,2,3")
    parser.add_argument("--overrides", metavar="YAML", help="nested settings as YAML")


def overrides_of(options: argparse.Namespace) -> dict[str, Any]:
    """The nested overrides that ``--overrides`` and ``--seeds`` name (``SettingsError``)."""
    try:
        overrides = yaml.safe_load(options.overrides or "{}")
    except yaml.YAMLError as error:
        raise SettingsError(f"--overrides is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(overrides, dict):
        raise SettingsError(
            f"--overrides {options.overrides!r} is no mapping; write for example "
            "'{inversion: {steps: 50}}'"
        )
    if options.seeds is not None:
        overrides["seeds"] = _seeds(options.seeds)
    return overrides


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise SettingsError(
            f"--seeds {text!r} is no list of different whole numbers; write for example 1,2,3"
        )
    return [int(part) for part in parts]


def planned(settings: Settings) -> list[Work]:
    """The steps of all notebooks for these settings, over all seeds; baselines: at most."""
    attacks, seeds = settings.attacks, len(settings.seeds)
    models = seeds * (len(attacks.names) + CONTROLS)
    work = [
        Work("01_attacks", name, seeds, _passes(getattr(attacks, name)), "finetune")
        for name in attacks.names
    ]
    work.append(Work("01_attacks", "clean_finetuned", seeds, _passes(attacks.badnet), "finetune"))
    if "badclip" in attacks.names:
        badclip = attacks.badclip
        patch = badclip.patch_steps * badclip.batch // 2  # half batches, as BadCLIP's 64 to 128
        work.append(Work("01_attacks", "badclip patch", seeds, patch, "badclip_patch"))
    passes = invertune_passes(settings)
    own, rebound = settings.baselines, settings.rebound
    defended = seeds * len(attacks.names)
    again = seeds * len(set(attacks.names) & set(rebound.attacks)) * (len(own.names) + 1)
    return [
        *work,
        *(
            Work(notebook, step, models, passes[step], rate)
            for notebook, step, rate in (
                ("02_target_identification", "perturbations", "identification"),
                ("02_target_identification", "candidate check", "inversion"),
                ("03_trigger_inversion", "inversion", "inversion"),
                ("04_activation_tuning", "tuning", "tuning"),
            )
        ),
        *(
            Work("05_baselines", name, defended, len(section.lrs) * _passes(section), name)
            for name in own.names
            for section in (getattr(own, name),)
        ),
        Work("05_baselines", "rebound", again, _passes(rebound), "finetune"),
    ]


def invertune_passes(settings: Settings) -> dict[str, int]:
    """Image passes of InverTune's steps on one suspected model."""
    step1, step3 = settings.identification, settings.tuning
    return {
        "perturbations": len(step1.kinds) * _passes(step1),
        "candidate check": step1.candidates * step1.check_steps * step1.batch,
        "inversion": _passes(settings.inversion),
        "tuning": len(step3.lrs) * _passes(step3),
    }


def _passes(section: Any) -> int:
    return int(section.steps) * int(section.batch)


def report(settings: Settings, held: Sequence[str], only: str | None = None) -> str:
    """The plan as text. ``held`` names the step of every artifact in the store."""
    rates, size = json.loads(RATES.read_text()), settings.data.image_size_px
    measured = rates["image_size_px"] == size
    speeds, peaks = (rates[k] if measured else {} for k in ("images_per_second", "peak_mb"))
    chosen = [w for w in planned(settings) if w.notebook.startswith(only or "")]
    minutes = [w.total / speeds.get(w.rate, math.nan) / 60 for w in chosen]
    known = chosen and all(w.rate in peaks for w in chosen)
    memory = f"{max(peaks[w.rate] for w in chosen):,} MB" if known else "not measured yet"
    steps = ", ".join(f"{n} {step}" for step, n in sorted(Counter(held).items())) or "nothing"
    return "\n".join(
        [
            f"profile {settings.profile}, {settings.backbone}, {size} px, "
            f"target {settings.target}, seeds {', '.join(map(str, settings.seeds))}",
            "",
            f"{'notebook':25}{'step':17}{'runs':>5}{'exposures':>13}{'minutes':>14}",
            *(
                f"{w.notebook:25}{w.step:17}{w.runs:5}{w.total:13,}{_text(cost):>14}"
                for w, cost in zip(chosen, minutes, strict=True)
            ),
            f"{'total':47}{sum(w.total for w in chosen):13,}{_text(sum(minutes)):>14}",
            "",
            f"memory: {memory}",
            f"rates measured on: {rates['device']}",
            f"the store holds: {steps}; what it holds for these settings is "
            "found in 0 s and not computed again",
        ]
    )


def _text(minutes: float) -> str:
    return "not measured" if math.isnan(minutes) else f"{minutes:.1f}"


def show(options: argparse.Namespace) -> int:
    """Prints the plan for parsed options; computes nothing."""
    settings = load_settings(options.profile, overrides_of(options))
    from invertune import store  # imports torch, which a wrong option should not wait for

    sound = [a for a in store.entries(store.default_root()) if (a.folder / store.META).is_file()]
    print(report(settings, [a.meta.get("step", "unknown") for a in sound], options.only))
    return 0
