"""The tidy table of results: one row per number, the same columns in every profile.

Rows are kept as the text that stands in the file, so the same run twice gives the same bytes; only
``to_frame`` turns them into numbers. All rates are in percent, all losses of accuracy in points.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import math
import numbers
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from invertune.metrics import Rate
from invertune.models import BACKBONES

REPOSITORY = Path(__file__).resolve().parent.parent
COLUMNS = (
    "profile",
    "paper_item",
    "backbone",
    "attack",
    "target",
    "defense",
    "task",
    "metric",
    "k",
    "variant",
    "seed",
    "value",
    "unit",
    "n",
    "ci_low",
    "ci_high",
    "key",
)
IDENTITY = COLUMNS[: COLUMNS.index("value")]
RUN_COLUMNS = ("key", "step", "seconds", "peak_mb", "device", "versions", "commit")

# One order everywhere: tables, figures and the file itself. Names not listed here come after.
ATTACKS = ("none", "clean_finetuned", "badnet", "blended", "sig", "wanet", "badencoder", "badclip")
DEFENSES = ("none", "ft", "cleanclip", "cleanerclip", "par", "invertune")

METRICS = {
    "ca": "percent",  # clean accuracy; in retrieval, recall@k of an own caption
    "asr": "percent",  # attack success rate without images of the target class
    "asr_all": "percent",  # the same over all images
    "inverted_asr": "percent",  # ASR of the inverted trigger on the suspected model
    "rebound_asr": "percent",  # ASR after benign fine-tuning of the defended model
    "rebound_ca": "percent",
    "ca_loss": "points",  # defense none: clean model's CA minus this; else undefended CA minus this
    "asr_gap": "points",  # |inverted ASR - true trigger's ASR|
    "increase": "points",  # rise of a class's share of the predictions (eq. 1)
    "margin": "points",  # increase of the first candidate minus that of the second
    "clean_count": "images",  # images predicted as the class, without the perturbation
    "adversarial_count": "images",  # the same with the perturbation
    "target_rank": "rank",  # place of the true target among the candidates, from 1
    "mask_l1": "l1",  # smallest mask size (sum of the mask) at equal inverted ASR
    "mask_l1_ratio": "ratio",  # mask_l1 of this model over that of the clean model
    "cosine": "ratio",  # similarity of two features
    "layer_impact": "ratio",  # eq. 8
    "layer_threshold": "ratio",
    "layer_mean": "ratio",
    "layer_std": "ratio",
    "layer_selected": "flag",  # 1: critical layer
    "critical_neurons": "neurons",
    "data_ratio": "ratio",  # clean images used by this defense over those used by the baselines
}

TASKS = ("zeroshot", "retrieval")
ORDERS = {"attack": ATTACKS, "defense": DEFENSES, "task": TASKS, "metric": tuple(METRICS)}
_NUMBER = r"-?\d+(\.\d{1,6})?"
# column: what its text must look like, and the same in words
RULES = {
    "profile": ("smoke|mini|paper", "smoke, mini or paper"),
    "paper_item": ("table([1-9]|1[0-5])|figure[1-7]|extra", "table1..15, figure1..7 or extra"),
    "backbone": ("|".join(("", *BACKBONES)), f"{', '.join(BACKBONES)} or empty"),
    "attack": ("[a-z0-9_]*", "a lower-case name such as badnet"),
    "target": (r"[^\n]*", "a class name"),
    "defense": ("[a-z0-9_]*", "a lower-case name such as invertune"),
    "task": ("|zeroshot|retrieval", "zeroshot, retrieval or empty"),
    "metric": ("|".join(METRICS), f"one of {', '.join(METRICS)}"),
    "k": ("|1|3|5|10", "1, 3, 5, 10 or empty"),
    "variant": (r"|[a-z0-9_]+=[^;=]+(;[a-z0-9_]+=[^;=]+)*", "name=value joined by ;"),
    "seed": (r"|\d+", "a whole number or empty"),
    "value": (_NUMBER, "a finite number with at most six decimals"),
    "unit": (r"[a-z0-9]+", "the unit of its metric"),
    "n": (r"|\d+", "a whole number or empty"),
    "ci_low": (f"|{_NUMBER}", "a finite number or empty"),
    "ci_high": (f"|{_NUMBER}", "a finite number or empty"),
    "key": (r"\S*", "the key of a stored artifact or empty"),
}


class ResultsError(ValueError):
    """A result or a results file that cannot be used: the bad value and what would be right."""


def cell_text(value: object) -> str:
    """The text of one cell: at most six decimals, no trailing zeros, no exponent; None is empty."""
    if value is None:
        return ""
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, numbers.Real):
        if not math.isfinite(value):
            raise ResultsError(f"{value} is not a result; leave the row out or give a number")
        text = f"{float(value):.6f}".rstrip("0").rstrip(".")
        return "0" if text == "-0" else text
    return str(value)


def variant_text(parts: Mapping[str, object]) -> str:
    """``{"lambda4": 0.05}`` as ``lambda4=0.05``; several parts sorted by name, joined by ``;``."""
    return ";".join(f"{name}={cell_text(parts[name])}" for name in sorted(parts))


def row(
    *,
    profile: str,
    paper_item: str,
    metric: str,
    value: float,
    variant: str | Mapping[str, object] = "",
    **others: object,
) -> dict[str, str]:
    """One row of the table as text; columns not given are empty and the unit follows the metric.

    ``others``: backbone, attack, target, defense, task, k, seed, n, ci_low, ci_high, key.
    Raises ``ResultsError`` for an unknown column and for a value that its column does not allow.
    """
    given = {"profile": profile, "paper_item": paper_item, "metric": metric, **others}
    variant = variant if isinstance(variant, str) else variant_text(variant)
    given |= {"value": value, "variant": variant}
    for column in given:
        if column not in COLUMNS or column == "unit":
            raise ResultsError(f"unknown results column {column!r}; columns: {', '.join(COLUMNS)}")
    record = {column: cell_text(given.get(column)) for column in COLUMNS}
    record["unit"] = METRICS.get(metric, "")
    check(record)
    return record


def rate_row(rate: Rate, **columns: Any) -> dict[str, str]:
    """A row for a measured rate: percent, number of images and the 95 % Wilson interval."""
    return row(value=rate.value, n=rate.n, ci_low=rate.low, ci_high=rate.high, **columns)


def check(record: Mapping[str, str]) -> None:
    """Raises ``ResultsError`` naming the first cell of a row that its column does not allow."""
    for column, (pattern, words) in RULES.items():
        if not re.fullmatch(pattern, record[column]):
            raise ResultsError(f"{column} is {record[column]!r}; it must be {words}")
    metric, unit = record["metric"], METRICS[record["metric"]]
    if record["unit"] != unit:
        raise ResultsError(f"unit of {metric} is {record['unit']!r}; it must be {unit!r}")
    if unit == "percent" and not 0 <= float(record["value"]) <= 100:
        raise ResultsError(f"{metric} is {record['value']}; a rate lies between 0 and 100 percent")
    interval = [record[c] for c in ("ci_low", "value", "ci_high")]
    if any(interval[::2]) and ("" in interval or sorted(interval, key=float) != interval):
        raise ResultsError(f"interval of {metric}: both ends are needed, around {interval[1]}")


def to_frame(rows: Iterable[Mapping[str, str]]) -> pd.DataFrame:
    """Rows as a data frame: identity, unit and key are text; the rest are numbers or missing."""
    frame = pd.DataFrame(list(rows), columns=list(COLUMNS), dtype=object)
    for column in ("value", "ci_low", "ci_high"):
        frame[column] = pd.to_numeric(frame[column].where(frame[column] != "")).astype(float)
    frame["n"] = pd.to_numeric(frame["n"].where(frame["n"] != "")).astype("Int64")
    return frame


def write_rows(rows: Iterable[Mapping[str, str]], path: Path) -> pd.DataFrame:
    """Merges ``rows`` into the file: a row of equal identity is replaced, the others stay.

    An old row of the same number under another ``paper_item`` goes where its value differs: it
    belongs to an earlier run, and its own notebook will write it again.
    Safe against a crash and against several writers at once. Returns the whole table. Raises
    ``ResultsError`` when the file or the rows are of another profile or contradict each other.
    """
    for record in (new := list(rows)):
        check(record)
    profiles = sorted({record["profile"] for record in new})
    if len(profiles) > 1:
        raise ResultsError(f"rows of several profiles at once: {', '.join(profiles)}")
    _refuse_contradictions(new)
    with locked(path):
        old = _read_checked(path, profiles[0] if profiles else None) if path.exists() else []
        merged = merge(_not_outdated(old, new), new, IDENTITY)
        write_atomic(path, csv_bytes(merged, COLUMNS))
    return to_frame(merged)


def _not_outdated(
    old: Sequence[Mapping[str, str]], new: Sequence[Mapping[str, str]]
) -> list[Mapping[str, str]]:
    def number(record: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(record[column] for column in IDENTITY if column != "paper_item")

    fresh = {number(record): record["value"] for record in new}
    return [r for r in old if fresh.get(number(r), r["value"]) == r["value"]]


def read_results(path: Path, profile: str | None = None) -> pd.DataFrame:
    """The checked table of one file, typed as in ``to_frame``.

    Raises ``ResultsError`` (one line) for a missing file, other columns, a cell that its column
    does not allow, rows of several profiles, or rows of another profile than ``profile``.
    """
    return to_frame(_read_checked(path, profile))


def publish(profile: str, root: Path = REPOSITORY) -> None:
    """Makes the results of ``profile`` the expected ones, expected/PROFILE.csv; mini only."""
    if profile != "mini":
        raise ResultsError(
            f"only mini is published, not {profile}: expected/paper.csv holds the "
            "paper's own numbers, and smoke's mean nothing"
        )
    rows = merge([], _read_checked(root / "results" / profile / "results.csv", profile), IDENTITY)
    write_atomic(root / "expected" / f"{profile}.csv", csv_bytes(rows, COLUMNS))


def write_runs(runs: Iterable[Mapping[str, object]], path: Path) -> None:
    """Merges one row per key into runs.csv: step, seconds, peak MB, device, versions, commit."""
    new = [{column: cell_text(run[column]) for column in RUN_COLUMNS} for run in runs]
    with locked(path):
        old = _read_text(path, RUN_COLUMNS) if path.exists() else []
        write_atomic(path, csv_bytes(merge(old, new, ("key",)), RUN_COLUMNS))


def read_runs(path: Path) -> pd.DataFrame:
    """runs.csv with seconds and peak_mb as numbers; ``ResultsError`` for other columns."""
    frame = pd.DataFrame(_read_text(path, RUN_COLUMNS), columns=list(RUN_COLUMNS), dtype=object)
    try:
        for column in ("seconds", "peak_mb"):
            frame[column] = pd.to_numeric(frame[column].where(frame[column] != "")).astype(float)
    except ValueError as error:
        raise ResultsError(f"{path}: {column} must be a number ({error})") from None
    return frame


def merge(
    old: Sequence[Mapping[str, str]], new: Sequence[Mapping[str, str]], identity: Sequence[str]
) -> list[Mapping[str, str]]:
    """Rows sorted by ``identity``; of two that share it, the later one stays."""
    table = {tuple(record[c] for c in identity): record for record in (*old, *new)}
    order = sorted(table, key=lambda key: [*map(natural_order, identity, key)])
    return [table[key] for key in order]


def natural_order(column: str, text: str) -> tuple:
    """Sort key of a cell: the fixed orders above, then text in which numbers count as numbers."""
    known = ORDERS.get(column, ())
    parts = [p for p in re.split(r"(\d+(?:\.\d+)?)", text) if p]
    natural = tuple((0, float(p), "") if p[0].isdigit() else (1, 0.0, p) for p in parts)
    return known.index(text) if text in known else len(known), natural, text


def _refuse_contradictions(rows: Sequence[Mapping[str, str]]) -> None:
    seen: dict[tuple[str, ...], Mapping[str, str]] = {}
    for record in rows:
        first = seen.setdefault(tuple(record[c] for c in IDENTITY), record)
        if first != record:
            name = ", ".join(record[c] for c in IDENTITY if record[c])
            raise ResultsError(
                f"two values for one number ({name}): {first['value']} and {record['value']}"
            )


def _read_text(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
    except FileNotFoundError:
        raise ResultsError(f"no results at {path}; run the notebooks first") from None
    if not lines or tuple(lines[0]) != tuple(columns):
        unknown = [c for c in (lines or [[]])[0] if c not in columns]
        odd = f"{unknown[0]!r} is unknown" if unknown else "one is missing or out of order"
        raise ResultsError(f"{path}: {odd}; the columns are {','.join(columns)}")
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(columns):
            raise ResultsError(f"{path}, row {number}: {len(line)} cells, not {len(columns)}")
    return [dict(zip(columns, line, strict=True)) for line in lines[1:]]


def _read_checked(path: Path, profile: str | None) -> list[dict[str, str]]:
    records = _read_text(path, COLUMNS)
    expected = profile or (records[0]["profile"] if records else "")
    for number, record in enumerate(records, 2):
        try:
            check(record)
        except ResultsError as error:
            raise ResultsError(f"{path}, row {number}: {error}") from None
        if record["profile"] != expected:
            raise ResultsError(
                f"{path}, row {number}: profile {record['profile']} in a table "
                f"of profile {expected}; keep one folder per profile"
            )
    return records


def csv_bytes(rows: Iterable[Mapping[str, str]], columns: Sequence[str]) -> bytes:
    """CSV with a header, Unix line ends and UTF-8, the same bytes on every machine."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def write_atomic(path: Path, content: bytes) -> None:
    """Writes ``content`` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)  # mkstemp's 0600 would hide results from a group
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock beside ``path``: read, merge and replace must not interleave between jobs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
