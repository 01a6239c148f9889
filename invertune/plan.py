"""What a run would do: steps, planned exposures, what the store holds, minutes, memory.

An exposure is one image's forward and backward pass: what a run on a CPU must economize. Two views
of an image are two exposures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from invertune.files import REPOSITORY
from invertune.sections import PICTOGRAMS, PRETRAINED, SWEEPS, BadClip, CleanClip, Settings
from invertune.settings import changed, other_models, suspects, sweep_values
from invertune.sprites import load_sprites

RATES = REPOSITORY / "expected" / "rates.json"


@dataclass(frozen=True)
class Work:
    """One line of the plan: ``runs`` models of so many ``exposures`` each."""

    notebook: str
    step: str
    runs: int
    exposures: int
    rate: str

    @property
    def total(self) -> int:
        """Exposures of all runs."""
        return self.runs * self.exposures


def planned(settings: Settings) -> list[Work]:
    """The steps of all notebooks for these settings, over all seeds; baselines: at most."""
    attacks, seeds = settings.attacks, len(settings.seeds)
    models, defended = len(suspects(settings, nulls=True)), len(suspects(settings))
    work = []
    if settings.weights == PRETRAINED:
        work.append(_pretraining("01_attacks", settings, 1))
    work += [
        Work("01_attacks", name, seeds, _exposures(getattr(attacks, name)), "finetune")
        for name in attacks.names
    ]
    control = _exposures(attacks.badnet)
    work.append(Work("01_attacks", "clean_finetuned", seeds, control, "finetune"))
    if "badclip" in attacks.names:
        patch = _patch_exposures(attacks.badclip)
        work.append(Work("01_attacks", "badclip patch", seeds, patch, "badclip_patch"))
    passes = invertune_passes(settings)
    baselines, rebound = settings.baselines, settings.rebound
    again = len(suspects(settings, among=rebound.attacks)) * (len(baselines.names) + 2)
    return [
        *work,
        *(
            Work(notebook, step, models, passes[step], rate)
            for notebook, step, rate in (
                ("02_target_identification", "perturbations", "identification"),
                ("02_target_identification", "candidate check", "inversion"),
                ("03_trigger_inversion", "inversion", "inversion"),
            )
        ),
        Work("04_activation_tuning", "tuning", defended, passes["tuning"], "tuning"),
        *(
            Work("05_baselines", name, defended, len(section.lrs) * _exposures(section), name)
            for name in baselines.names
            for section in (getattr(baselines, name),)
        ),
        Work("05_baselines", "rebound", again, _exposures(rebound), "finetune"),
        *_generalization(settings),
        *_ablations(settings),
    ]


def _generalization(settings: Settings) -> list[Work]:
    """Notebook 06, at most: a backbone without weights is left out, equal models are shared."""
    notebook, other, seeds = "06_generalization", settings.generalization, len(settings.seeds)
    models = seeds * len(other_models(settings))
    attack = getattr(settings.attacks, other.attack)
    work = []
    if settings.weights == PRETRAINED:  # Table 1's backbone is trained in notebook 01
        others = len({*other.backbones} - {settings.backbone})
        work.append(_pretraining(notebook, settings, others))
    work.append(Work(notebook, other.attack, models, _exposures(attack), "finetune"))
    if other.attack == "badclip":
        patch = _patch_exposures(attack)
        work.append(Work(notebook, "badclip patch", models, patch, "badclip_patch"))
    rates = {"perturbations": "identification", "tuning": "tuning"}
    for step, exposures in invertune_passes(settings).items():
        runs = models + seeds * (3 if settings.data.source == PICTOGRAMS else 2)  # variants
        work.append(Work(notebook, step, runs, exposures, rates.get(step, "inversion")))
    for name in other.baselines:
        section = getattr(settings.baselines, name)
        tried = min(len(section.lrs), other.baseline_lrs)
        work.append(Work(notebook, name, models, tried * _exposures(section), name))
    return work


def _pretraining(notebook: str, settings: Settings, runs: int) -> Work:
    """Both stages of so many clean models; their batches show every class once."""
    recipe = settings.pretraining
    exposures = (recipe.warm_start_steps + recipe.contrastive_steps) * len(load_sprites().classes)
    return Work(notebook, "pretraining", runs, exposures, "pretraining")


def _patch_exposures(badclip: BadClip) -> int:
    """Exposures of BadCLIP's patch: half batches, as its own 64 to 128."""
    return badclip.patch_steps * badclip.batch // 2


def _ablations(settings: Settings) -> list[Work]:
    """Notebook 07: one value changed at a time; the profile's own values cost nothing."""
    ablations, work = settings.ablations, []
    for title, sweep in SWEEPS.items():
        step = sweep.step
        cases = [(name, v) for name in sweep.names for v in sweep_values(settings, step, name)[1:]]
        total = sum(invertune_passes(changed(settings, step, *case))[step] for case in cases)
        runs = len(suspects(settings, among=getattr(ablations, sweep.attacks)))
        work.append(Work("07_ablations", title, runs, total, step))
    runs = len(suspects(settings, among=ablations.perturbation_attacks))
    once = invertune_passes(settings)
    again = len(suspects(settings, among=ablations.round_attacks))
    return [
        *work,  # of Table 3's four lines, at most three are not the profile's own
        Work("07_ablations", "Table 3", runs, 3 * once["tuning"], "tuning"),
        Work("07_ablations", "second round", again, once["inversion"] + once["tuning"], "tuning"),
    ]


def invertune_passes(settings: Settings) -> dict[str, int]:
    """Exposures of InverTune's steps on one suspected model, at most."""
    step1, step3 = settings.identification, settings.tuning
    return {
        "perturbations": sum(
            len(step1.waves) * step1.batch if kind == "fourier" else _exposures(step1)
            for kind in step1.kinds
        ),
        "candidate check": step1.candidates * step1.check_steps * step1.batch,
        "inversion": _exposures(settings.inversion),
        "tuning": len(step3.lrs) * _exposures(step3),
    }


def _exposures(section: Any) -> int:
    """Of one training; CleanCLIP and CleanerCLIP encode two views of each image."""
    views = 2 if isinstance(section, CleanClip) else 1
    return int(section.steps) * int(section.batch) * views


def report(settings: Settings, held: Sequence[str], jobs: int, only: str | None = None) -> str:
    """The plan as text. ``held``: lines on what the store holds of it.

    Minutes are those of ``jobs`` processes at the measured rate of one.
    """
    size, rates, peak = settings.data.image_size_px, _measured(settings), peak_mb(settings, only)
    chosen = [w for w in planned(settings) if w.notebook.startswith(only or "")]
    minutes = [alone / jobs for alone in minutes_of(chosen, settings)]
    memory = "not measured yet" if peak is None else f"at most {jobs * peak:,} MB"
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
            f"jobs at once: {jobs}; memory of all: {memory}",
            f"speed of one job, measured on: {rates.get('device', f'nothing yet at {size} px')}",
            "counted at most: baselines and step 3 with every rate of their grids; not counted: "
            "evaluations",
            "jobs whose results the store holds:",
            *(f"  {line}" for line in held),
        ]
    )


def _measured(settings: Settings) -> dict[str, Any]:
    """The rates measured on the profile, else at its image size; empty where there are none."""
    measured: list[dict[str, Any]] = json.loads(RATES.read_text())
    size, name = settings.data.image_size_px, settings.profile
    fitting = [r for r in measured if r["image_size_px"] == size and r.get("profile", name) == name]
    return max(fitting, key=lambda r: "profile" in r, default={})


def minutes_of(chosen: Sequence[Work], settings: Settings) -> list[float]:
    """Minutes of one process for each work, at most; NaN where its rate is not measured."""
    speeds = _measured(settings).get("images_per_second", {})
    return [work.total / speeds.get(work.rate, math.nan) / 60 for work in chosen]


def peak_mb(settings: Settings, only: str | None = None) -> int | None:
    """The highest peak memory of a process among the planned steps; None: not measured."""
    peaks = _measured(settings).get("peak_mb", {})
    rates = {w.rate for w in planned(settings) if w.notebook.startswith(only or "")}
    return max(peaks[r] for r in rates) if rates and rates <= set(peaks) else None


def _text(minutes: float) -> str:
    return "not measured" if math.isnan(minutes) else f"{minutes:.1f}"
