"""What a terminal shows: progress bars, and text from outside without control characters."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any


def progress(items: Iterable[Any], label: str, start: int = 0, total: int | None = None) -> Any:
    """A progress bar over ``items``; silent when INVERTUNE_PROGRESS=0."""
    from tqdm import tqdm  # settings are read in Snakemake's environment too, which has none

    off = os.environ.get("INVERTUNE_PROGRESS") == "0"
    return tqdm(items, desc=label, initial=start, total=total, disable=off, mininterval=1)


def quiet_in_a_log() -> None:
    """No bars where they would go to a file, unless INVERTUNE_PROGRESS says otherwise."""
    if not sys.stderr.isatty():
        os.environ.setdefault("INVERTUNE_PROGRESS", "0")


def printable(text: str) -> str:
    """``text`` with escapes for what a terminal would obey or cannot show."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
