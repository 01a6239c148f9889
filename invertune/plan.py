"""What a run would do: steps, planned exposures, what the store holds, minutes, memory.

An exposure is one image's forward and backward pass: what a run on a CPU must economize.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from invertune.settings import Settings, SettingsError, load_settings

REPOSITORY = Path(__file__).resolve().parent.parent
RATES = REPOSITORY / "expected" / "rates.json"
CONTROLS = 2  # the clean model and the clean model fine-tuned without poison (the nulls)


@dataclass(frozen=True)
class Work:
    """One line of the plan: ``runs`` models of ``exposures`` image passes each."""

    notebook: str
    step: str
    runs: int
    exposures: int
    rate: str


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
    """The steps of notebooks 01 to 04 for these settings, over all seeds."""
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
    step1, step3 = settings.identification, settings.tuning
    looks = len(step1.kinds) * step1.steps * step1.batch
    checks = step1.candidates * step1.check_steps * step1.batch
    tunings = len(step3.lrs) * _passes(step3)
    return [
        *work,
        Work("02_target_identification", "perturbations", models, looks, "identification"),
        Work("02_target_identification", "candidate check", models, checks, "inversion"),
        Work("03_trigger_inversion", "inversion", models, _passes(settings.inversion), "inversion"),
        Work("04_activation_tuning", "tuning", models, tunings, "tuning"),
    ]


def _passes(section: Any) -> int:
    return int(section.steps) * int(section.batch)


def minutes(work: Work, rates: Mapping[str, Any], image_size_px: int) -> float | None:
    """Estimated minutes; None where the rate was not measured at this image size."""
    speed = rates["images_per_second"].get(work.rate)
    if not speed or rates["image_size_px"] != image_size_px:
        return None
    return work.runs * work.exposures / speed / 60


def report(
    settings: Settings, held: Sequence[str], only: str | None = None, rates_file: Path = RATES
) -> str:
    """The plan as text. ``held`` names the step of every artifact in the store."""
    rates = json.loads(rates_file.read_text())
    chosen = [w for w in planned(settings) if w.notebook.startswith(only or "")]
    size = settings.data.image_size_px
    lines = [
        f"profile {settings.profile}, {settings.backbone}, {size} px, "
        f"target {settings.target}, seeds {', '.join(map(str, settings.seeds))}",
        "",
        f"{'notebook':25}{'step':17}{'runs':>5}{'exposures':>13}{'minutes':>14}",
    ]
    for work in chosen:
        estimate = _text(minutes(work, rates, size), "not measured")
        lines.append(
            f"{work.notebook:25}{work.step:17}{work.runs:5}"
            f"{work.runs * work.exposures:13,}{estimate:>14}"
        )
    total = sum(w.runs * w.exposures for w in chosen)
    known = [minutes(w, rates, size) for w in chosen]
    whole = None if None in known or not known else sum(m for m in known if m is not None)
    lines.append(f"{'total':47}{total:13,}{_text(whole, 'not measured'):>14}")
    peaks = [rates["peak_mb"].get(w.rate) for w in chosen if rates["image_size_px"] == size]
    memory = f"{max(peaks):,.0f} MB" if peaks and all(peaks) else "not measured yet"
    held_text = ", ".join(f"{n} {step}" for step, n in sorted(Counter(held).items()))
    lines += [
        "",
        f"memory: {memory}",
        f"rates measured on: {rates['device'] or 'nothing yet'}",
        f"the store holds: {held_text or 'nothing'}; what it holds for these settings is "
        "found in 0 s and not computed again",
    ]
    return "\n".join(lines)


def _text(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:.1f}"


def show(options: argparse.Namespace) -> int:
    """Prints the plan for parsed options; computes nothing."""
    settings = load_settings(options.profile, overrides_of(options))
    from invertune import store  # imports torch, which a wrong option should not wait for

    sound = [a for a in store.entries(store.default_root()) if (a.folder / store.META).is_file()]
    print(report(settings, [a.meta.get("step", "unknown") for a in sound], options.only))
    return 0
