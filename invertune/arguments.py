"""Command-line options shared by the commands that take a profile, and how they are parsed."""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from invertune.settings import PARAMS, SettingsError


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that name settings."""
    known = ", ".join(sorted(path.stem for path in PARAMS.glob("*.yml")))
    parser.add_argument("profile", nargs="?", default="mini", help=known)
    parser.add_argument("--seeds", metavar="LIST", help="seeds, separated by commas: 1,2,3")
    parser.add_argument("--overrides", metavar="YAML", help="nested settings as YAML")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of what goes through the notebooks, besides those that name settings."""
    parser.add_argument("--only", metavar="NN", help="only the notebooks that start with NN")
    about = "processes at once (default: one a core, as memory allows; one on a GPU and on smoke)"
    parser.add_argument("--jobs", metavar="N", type=_count, help=about)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def overrides_of(options: argparse.Namespace) -> dict[str, Any]:
    """The nested overrides that ``--overrides`` and ``--seeds`` name (``SettingsError``)."""
    overrides = mapping_of(options.overrides)
    if options.seeds is not None:
        overrides["seeds"] = _seeds(options.seeds)
    return overrides


def mapping_of(text: str | None) -> dict[str, Any]:
    """The nested settings that the value of ``--overrides`` writes as YAML (``SettingsError``)."""
    try:
        overrides = yaml.safe_load(text or "{}")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SettingsError(f"--overrides is not YAML: {reason}") from None
    if not isinstance(overrides, dict):
        raise SettingsError(
            f"--overrides {str(text)[:200]!r} is not a mapping; "
            "write for example '{inversion: {steps: 50}}'"
        )
    return overrides


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 19 for part in parts):
        raise SettingsError(
            f"--seeds {text[:200]!r} is not a list of whole numbers; for example 1,2,3"
        )
    return [int(part) for part in parts]
