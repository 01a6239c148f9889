"""The tidy table of results: one row per number, the same columns in every profile.

Rows are kept as the text that stands in the file, so the same run twice gives the same bytes; only
``to_frame`` turns them into numbers. All rates are in percent, all losses of accuracy in points.
"""

from __future__ import annotations

import csv
import functools
import io
import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pandas as pd

from invertune.files import REPOSITORY, locked, write_atomic
from invertune.sections import BACKBONES, NULLS, Attack, Baseline

if TYPE_CHECKING:  # it imports torch, which tables and their comparison do not need
    from invertune.metrics import Rate

Row = Mapping[str, str]  # column to text
# One order everywhere: tables, figures and the file itself. Names not listed here come after.
ATTACKS = (*NULLS, *get_args(Attack))
DEFENSES = ("none", *get_args(Baseline), "invertune")

METRICS = {
    "ca": "percent",  # clean accuracy; in retrieval, recall@k of an own caption
    "asr": "percent",  # attack success rate without images of the target class
    "asr_all": "percent",  # the same over all images
    "inverted_asr": "percent",  # ASR of the inverted trigger on the suspected model
    "suspected_asr": "percent",  # held-out ASR of all suspected triggers in turn, tuned model
    "universal_asr": "percent",  # ASR of step 1's perturbation
    "rebound_asr": "percent",  # ASR after benign fine-tuning of the defended model
    "rebound_ca": "percent",
    "ca_loss": "points",  # defense none: clean model's CA minus this; else undefended CA minus this
    "asr_gap": "points",  # |inverted ASR - true trigger's ASR|
    "increase": "points",  # rise of a class's share of the predictions (eq. 1)
    "clean_count": "images",  # images predicted as the class, without the perturbation
    "adversarial_count": "images",  # the same with the perturbation
    "target_rank": "rank",  # place of the true target among the candidates, from 1
    "increase_rank": "rank",  # the same by the largest increase alone, among all classes
    "similarity_rank": "rank",  # of the class found, among the texts nearest to the target's
    "entropy": "ratio",  # of predictions, over that of equal shares: 1 is uniform
    "largest_share": "percent",  # of predictions that fall into one class
    "mask_l1": "l1",  # smallest mask size (sum of the mask) at the ASR floor
    "ssim": "ratio",  # structural similarity of images with and without the inverted trigger
    "adversarial_share": "percent",  # images predicted as the class under a universal perturbation
    "mask_l1_ratio": "ratio",  # mask_l1 of this model over that of the clean model
    "mask_energy": "percent",  # of the inverted mask's, at the place of the true trigger
    "silhouette": "ratio",  # how far a cluster stands apart in feature space, -1 to 1
    "cosine": "ratio",  # similarity of two features
    "layer_impact": "ratio",  # eq. 8
    "layer_threshold": "ratio",
    "layer_mean": "ratio",
    "layer_std": "ratio",
    "layer_selected": "flag",  # 1: critical layer (above the threshold)
    "layer_overlap": "ratio",  # selected layers shared with 06's attack, over those of either
    "critical_neurons": "neurons",
    "images_available": "images",  # clean images a defense may use
    "images_seen": "passes",  # clean images, each as often as shown, at all rates tried
}

TASKS = ("zeroshot", "retrieval")
ORDERS = {"attack": ATTACKS, "defense": DEFENSES, "task": TASKS, "metric": tuple(METRICS)}
_NUMBER = r"-?\d+(\.\d{1,6})?"
# The columns: what the text of each must look like, and the same in words
RULES = {
    "profile": ("[a-z0-9_]+", "a profile's name: a-z, 0-9 and _"),
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
COLUMNS = tuple(RULES)
PUBLISHED = ("mini", "scenes224")
DEVELOPMENT_SEED = "0"  # settings were chosen on it, so its numbers are not published
IDENTITY = COLUMNS[: COLUMNS.index("value")]
NUMBER = tuple(column for column in IDENTITY if column != "paper_item")  # may serve several items
RUN_COLUMNS = ("key", "step", "seconds", "peak_mb", "device", "versions", "commit")


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
    return ";".join(f"{name}={cell_text(value)}" for name, value in sorted(parts.items()))


def row(
    *, metric: str, value: Rate | float, variant: str | Mapping[str, object] = "", **others: object
) -> dict[str, str]:
    """One row of the table as text; columns not given are empty and the unit follows the metric.

    A measured rate also gives the number of images and the 95 % Wilson interval.
    ``others``: profile and paper_item (both needed), backbone, attack, target, defense, task, k,
    seed, n, ci_low, ci_high, key.
    Raises ``ResultsError`` for an unknown column and for a value that its column does not allow.
    """
    if isinstance(value, tuple):  # a Rate
        value, n, low, high = value
        others |= {"n": n, "ci_low": low, "ci_high": high}
    variant = variant if isinstance(variant, str) else variant_text(variant)
    given = {**others, "metric": metric, "value": value, "variant": variant}
    for column in given:
        if column not in COLUMNS or column == "unit":
            raise ResultsError(f"unknown results column {column!r}; columns: {', '.join(COLUMNS)}")
    record = {column: cell_text(given.get(column)) for column in COLUMNS}
    record["unit"] = METRICS.get(metric, "")
    check(record)
    return record


def check(record: Row) -> None:
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


def to_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Rows as a data frame: identity, unit and key are text; the rest are numbers or missing."""
    frame = pd.DataFrame(rows, columns=COLUMNS, dtype=object)
    for column in ("value", "ci_low", "ci_high"):
        frame[column] = pd.to_numeric(frame[column]).astype(float)
    frame["n"] = pd.to_numeric(frame["n"]).astype("Int64")
    return frame


def write_rows(rows: Iterable[Row], path: Path) -> pd.DataFrame:
    """Merges ``rows`` into the file: a row of equal identity is replaced, the others stay.

    An old row of the same number under another ``paper_item`` goes where its value differs: it
    belongs to an earlier run, and its own notebook will write it again.
    Safe against a crash and against several writers at once. Returns the whole table. Raises
    ``ResultsError`` when the file or the rows are of another profile or contradict each other.
    """
    new = list(rows)
    profile = _check_together(new)
    fresh = {_cells(record, NUMBER): record["value"] for record in new}
    with locked(path):
        old = _read_checked(path, profile) if path.exists() else []
        kept = [r for r in old if fresh.get(_cells(r, NUMBER), r["value"]) == r["value"]]
        merged = merge(kept, new, IDENTITY)
        write_atomic(path, csv_bytes(merged, COLUMNS))
    return to_frame(merged)


def read_results(path: Path, profile: str | None = None) -> pd.DataFrame:
    """The checked table of one file, typed as in ``to_frame``.

    Raises ``ResultsError`` (one line) for a missing file, other columns, a cell that its column
    does not allow, rows of several profiles, or rows of another profile than ``profile``.
    """
    return to_frame(_read_checked(path, profile))


@functools.cache
def read_paper() -> pd.DataFrame:
    """The numbers that the paper prints, expected/paper.csv; read once, so not to be changed."""
    return read_results(REPOSITORY / "expected" / "paper.csv", "paper")


def publish(profile: str, root: Path = REPOSITORY) -> None:
    """Merges the reported seeds' results into expected/PROFILE.csv.

    A published row stays as it is while its artifact key is the same (another machine rounds
    differently); a row with a new key replaces it. Rows that this run lacks stay, too, since seeds
    and notebooks are run at different times. A test names rows whose artifacts the code would not
    make any more.
    """
    if profile not in PUBLISHED:
        raise ResultsError(
            f"{' and '.join(PUBLISHED)} are published, not {profile}: expected/paper.csv holds the "
            "paper's own numbers, and smoke's mean nothing"
        )
    found = _read_checked(root / "results" / profile / "results.csv", profile)
    reported = [row for row in found if row["seed"] != DEVELOPMENT_SEED]
    if not reported:
        raise ResultsError(
            f"results/{profile} holds rows of the development seed {DEVELOPMENT_SEED} only; run "
            f"./run_all.sh {profile} with --seeds first"
        )
    path = root / "expected" / f"{profile}.csv"
    before = _read_checked(path, profile) if path.exists() else []
    known = {_cells(record, (*IDENTITY, "key")) for record in before}
    new = [record for record in reported if _cells(record, (*IDENTITY, "key")) not in known]
    write_atomic(path, csv_bytes(merge(before, new, IDENTITY), COLUMNS))


def write_runs(runs: Iterable[Mapping[str, object]], path: Path) -> None:
    """Merges one row per key into runs.csv: step, seconds, peak MB, device, versions, commit."""
    new = [{column: cell_text(run[column]) for column in RUN_COLUMNS} for run in runs]
    with locked(path):
        old = _read_text(path, RUN_COLUMNS) if path.exists() else []
        write_atomic(path, csv_bytes(merge(old, new, ("key",)), RUN_COLUMNS))


def merge(old: Sequence[Row], new: Sequence[Row], identity: Sequence[str]) -> list[Row]:
    """Rows sorted by ``identity``; of two that share it, the later one stays."""
    table = {_cells(record, identity): record for record in (*old, *new)}
    order = sorted(table, key=lambda cells: [*map(natural_order, identity, cells)])
    return [table[cells] for cells in order]


def _cells(record: Row, columns: Sequence[str]) -> tuple[str, ...]:
    return tuple(record[column] for column in columns)


def natural_order(column: str, text: str) -> tuple:
    """Sort key of a cell: the fixed orders above, then text in which numbers count as numbers."""
    known = ORDERS.get(column, ())
    parts = [p for p in re.split(r"(\d+(?:\.\d+)?)", text) if p]
    natural = tuple((0, float(p), "") if p[0].isdigit() else (1, 0.0, p) for p in parts)
    return known.index(text) if text in known else len(known), natural, text


def _check_together(rows: Sequence[Row]) -> str | None:
    """Checks rows before they are written: each one, and that they agree; their profile."""
    seen: dict[tuple[str, ...], Row] = {}
    for record in rows:
        check(record)
        identity = _cells(record, IDENTITY)
        first = seen.setdefault(identity, record)
        if first != record:
            name = ", ".join(filter(None, identity))
            both = f"{first['value']} and {record['value']}"
            raise ResultsError(f"two values for one number ({name}): {both}")
    profiles = sorted({record["profile"] for record in rows})
    if len(profiles) > 1:
        raise ResultsError(f"rows of several profiles at once: {', '.join(profiles)}")
    return profiles[0] if profiles else None


def _read_text(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
    except FileNotFoundError:
        raise ResultsError(f"no results at {path}; run the notebooks first") from None
    header = lines[0] if lines else []
    if header != list(columns):
        unknown = [c for c in header if c not in columns]
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
            if (named := record["profile"]) != expected:
                raise ResultsError(
                    f"profile {named} in a table of profile {expected}; keep one folder per profile"
                )
        except ResultsError as error:
            raise ResultsError(f"{path}, row {number}: {error}") from None
    return records


def csv_bytes(rows: Iterable[Row], columns: Sequence[str]) -> bytes:
    """CSV with a header, Unix line ends and UTF-8, the same bytes on every machine."""
    frame = pd.DataFrame(rows, columns=columns, dtype=object)
    return frame.to_csv(index=False, lineterminator="\n").encode()
