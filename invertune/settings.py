"""The typed profile: ``params/NAME.yml`` plus overrides, checked before any work starts."""

from __future__ import annotations

import itertools
import operator
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from invertune.files import REPOSITORY
from invertune.sections import (
    EMBEDDED,
    NULLS,
    OWN_IMAGES,
    PICTOGRAMS,
    PRETRAINED,
    Attack,
    Baseline,
    Settings,
)

PARAMS = REPOSITORY / "params"
LIMITS = (  # a setting, or each of a list, and the one that it may not exceed
    ("identification.patch_px", "data.image_size_px"),
    ("identification.batch", "data.inversion_images"),
    ("inversion.batch", "data.inversion_images"),
    ("tuning.images", "data.inversion_images"),
    ("tuning.batch", "tuning.images"),
)
PATCHES = ("badnet", "badencoder", "badclip")
ATTACKING_LIMITS = (  # checked as well where attacks and baselines are run
    *((f"attacks.{name}.batch", "data.poisoning_pairs") for name in get_args(Attack)),
    *((f"attacks.{name}.patch_px", "data.image_size_px") for name in PATCHES),
    ("attacks.wanet.grid_points", "data.image_size_px"),
    *((f"baselines.{name}.batch", "baselines.pairs") for name in get_args(Baseline)),
    ("rebound.batch", "rebound.pairs"),
    ("identification.batch", "generalization.few_images"),
    ("inversion.batch", "generalization.few_images"),
    ("generalization.few_tuning_images", "generalization.few_images"),
    ("tuning.batch", "generalization.few_tuning_images"),
    ("tuning.batch", "ablations.tuning.images"),
    ("ablations.tuning.images", "data.inversion_images"),
)


class SettingsError(ValueError):
    """A profile, key or value that does not exist or is out of range; says what would be right."""


def load_settings(
    profile: str, overrides: Mapping[str, Any] | None = None, params: Path = PARAMS
) -> Settings:
    """Reads ``params/<profile>.yml`` and applies nested ``overrides``.

    Raises ``SettingsError`` naming the unknown profile or key, or the bad value and its range.
    """
    if not re.fullmatch("[a-z0-9_]+", profile):
        raise SettingsError(f"profile {profile[:200]!r}: its name may hold a-z, 0-9 and _ only")
    path = params / f"{profile}.yml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in params.glob("*.yml")))
        raise SettingsError(f"unknown profile {profile[:200]!r}; choose one of {known}")
    values = yaml.safe_load(path.read_text())
    merged = _merge(values, overrides or {}, "")
    try:
        settings = Settings.model_validate({**merged, "profile": profile})
    except ValidationError as error:
        raise SettingsError(_explain(error)) from None
    _check_limits(settings)
    return settings


def _check_limits(settings: Settings) -> None:
    """Raises ``SettingsError`` for settings that do not fit each other."""
    attacks_too = not settings.data.source.startswith(OWN_IMAGES)
    for name, limit in (*LIMITS, *(ATTACKING_LIMITS if attacks_too else ())):
        found = (operator.attrgetter(n)(settings) for n in (name, limit))
        for value, most in itertools.product(*(f if isinstance(f, tuple) else (f,) for f in found)):
            if value > most:
                raise SettingsError(f"{name} = {value}: must be at most {most}, which is {limit}")
    smallest, largest = settings.baselines.par.erase_area
    if smallest > largest:
        raise SettingsError(f"baselines.par.erase_area = [{smallest}, {largest}]: smallest first")
    if len(set(settings.seeds)) < len(settings.seeds):
        raise SettingsError(f"seeds = {list(settings.seeds)}: a seed stands there twice")


def _merge(values: dict[str, Any], overrides: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    merged = dict(values)
    for key, value in overrides.items():
        if key not in values:
            known, unknown = ", ".join(values), f"{prefix}{key}"[:200]
            raise SettingsError(f"unknown key {unknown!r}; the keys here are: {known}")
        nested = isinstance(values[key], dict) and isinstance(value, Mapping)
        merged[key] = _merge(values[key], value, f"{prefix}{key}.") if nested else value
    return merged


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"][0].lower() + first["msg"][1:]
    if first["type"] in ("missing", "extra_forbidden"):
        return f"{where}: {message}"
    return f"{where} = {repr(first['input'])[:200]}: {message}"


def suspects(
    settings: Settings, nulls: bool = False, among: Collection[str] | None = None
) -> list[tuple[str, int]]:
    """(attack, seed) of every model of the profile, with ``nulls`` the controls' first.

    ``among``: of these attacks only.
    """
    names = [name for name in settings.attacks.names if among is None or name in among]
    return list(itertools.product((*NULLS, *names) if nulls else names, settings.seeds))


def other_models(settings: Settings) -> list[tuple[str, str, str]]:
    """Notebook 06's models: table, setting and its value, for other targets, then backbones."""
    section = settings.generalization
    targets = [("table4", "target", name) for name in section.targets]
    return [*targets, *(("table5", "backbone", name) for name in section.backbones)]


def stay_offline(settings: Settings) -> None:
    """Forbids downloads to this process and its children where none can be needed."""
    if settings.data.source == PICTOGRAMS and settings.weights in (EMBEDDED, PRETRAINED):
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported


def sweep_values(settings: Settings, section: str, name: str) -> tuple[Any, ...]:
    """The values of one setting that the ablations compare: the profile's own, then the others."""
    listed = getattr(getattr(settings.ablations, section), name)
    return tuple(dict.fromkeys((getattr(getattr(settings, section), name), *listed)))


def compared(settings: Settings, section: str, names: Iterable[str]) -> list[str]:
    """Those of some settings that the ablations compare with any other value."""
    return [name for name in names if len(sweep_values(settings, section, name)) > 1]


def changed(settings: Settings, section: str, name: str, value: Any) -> Settings:
    """The settings with one of them changed to a ``value`` that ``sweep_values`` gave."""
    part = getattr(settings, section).model_copy(update={name: value})
    return settings.model_copy(update={section: part})


def as_yaml(settings: BaseModel) -> str:
    """The settings as YAML in the order of the profile files; innermost ones share a line."""
    plain = settings.model_dump(mode="json")
    return yaml.safe_dump(plain, sort_keys=False, width=100, default_flow_style=None)
