"""Claims: what should transfer from the paper to any data set, judged on the results over seeds.

A claim has one relation. In every seed it comes down to one margin: how far the decisive number is
on the right side (>= 0) or the wrong side (< 0), in the unit of its metric.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import yaml

from invertune.files import REPOSITORY
from invertune.results import IDENTITY, cell_text, natural_order
from invertune.tables import label

CLAIMS = REPOSITORY / "expected" / "claims.yml"
RELATIONS = ("lowest", "at_most", "at_least", "rank_at_most")
REQUIRED = ("id", "text", "source", "filter")
OPTIONAL = ("each", "mean_over", "in_at_least")
JUDGED = ("mini", "scenes224", "paper")  # smoke is too short to mean anything
DECIMALS = 6  # as in the results file: a mean of 2.0 must not miss a bound of 2 by rounding

Filter = dict[str, tuple[str, ...]]


class ClaimError(ValueError):
    """A claim that cannot be judged as written; names the claim and the offending column or key."""


@dataclass(frozen=True)
class Claim:
    """One claim; see the head of expected/claims.yml for the meaning of the parts.

    ``bound`` is the number of at_most and at_least and the rank of rank_at_most; ``subject`` is the
    (column, value) whose rank is asked, ``best`` the end from which ranks count.
    """

    id: str
    text: str
    source: str
    filters: tuple[Filter, ...]
    relation: str
    bound: float
    subject: tuple[str, str] | None = None
    best: str = "lowest"
    each: tuple[str, ...] = ()
    mean_over: tuple[str, ...] = ()
    in_at_least: int | None = None

    @property
    def grouped(self) -> tuple[str, ...]:
        """The columns by which the rows of one seed are told apart."""
        return (*self.each, *self.mean_over, *(self.subject or ())[:1])


def load_claims(group: str = "") -> list[Claim]:
    """The claims of expected/claims.yml whose id starts with ``group`` and a dot ("" for all).

    Groups: attacks, identification, inversion, tuning, table1, generalization, ablations. Raises
    ``ClaimError`` naming the claim and the unknown key, column or group.
    """
    claims = [parse_claim(raw) for raw in yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))]
    ids = [claim.id for claim in claims]
    twice = [name for name in ids if ids.count(name) > 1]
    if twice:
        raise ClaimError(f"claim {twice[0]} stands twice in {CLAIMS}")
    chosen = [claim for claim in claims if not group or claim.id.startswith(f"{group}.")]
    if not chosen:
        raise ClaimError(f"no claim of group {group!r} in {CLAIMS}")
    return chosen


def parse_claim(raw: Mapping[str, Any]) -> Claim:
    """One entry of the file as a ``Claim``; ``ClaimError`` for anything it does not know."""
    name = f"claim {raw.get('id', 'without id')}"
    for key in raw:
        if key not in (*REQUIRED, *OPTIONAL, *RELATIONS):
            raise ClaimError(f"{name}: unknown key {key!r}")
    for key in REQUIRED:
        if key not in raw:
            raise ClaimError(f"{name}: {key} is missing")
    relations = [key for key in raw if key in RELATIONS]
    if len(relations) != 1:
        raise ClaimError(f"{name}: needs exactly one relation of {', '.join(RELATIONS)}")
    claim = Claim(
        id=raw["id"],
        text=raw["text"],
        source=raw["source"],
        filters=tuple(
            {column: tuple(map(cell_text, _listed(values))) for column, values in part.items()}
            for part in _listed(raw["filter"])
        ),
        relation=relations[0],
        each=tuple(raw.get("each", ())),
        mean_over=tuple(raw.get("mean_over", ())),
        in_at_least=raw.get("in_at_least"),
        **_relation(f"{name}: {relations[0]}", relations[0], raw[relations[0]]),
    )
    _check_columns(claim, name)
    return claim


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _relation(name: str, relation: str, value: Any) -> dict[str, Any]:
    if relation in ("at_most", "at_least"):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ClaimError(f"{name} needs a number, not {value!r}")
        return {"bound": float(value)}
    given = dict(value) if isinstance(value, Mapping) else {}
    best, rank = given.pop("best", "lowest"), given.pop("rank", 1)
    ranked = relation == "rank_at_most" or (best, rank) == ("lowest", 1)
    if len(given) != 1 or best not in ("lowest", "highest") or rank < 1 or not ranked:
        raise ClaimError(
            f"{name} needs one column: value, and for rank_at_most "
            f"a rank from 1 and best: lowest or highest; found {value!r}"
        )
    [(column, subject)] = given.items()
    return {"bound": float(rank), "subject": (column, cell_text(subject)), "best": best}


def _check_columns(claim: Claim, name: str) -> None:
    for rows in claim.filters:
        for column in (*rows, *claim.grouped):
            if column not in IDENTITY or column in ("profile", "seed"):
                raise ClaimError(f"{name}: {column!r} is not a column to filter by")
            if column not in rows:
                raise ClaimError(f"{name}: column {column} must stand in its filter")
        if claim.subject and claim.subject[1] not in rows[claim.subject[0]]:
            raise ClaimError(f"{name}: {claim.subject[1]} is not in its filter")
    cells = {c for rows in claim.filters for c in itertools.product(*(rows[k] for k in claim.each))}
    if claim.in_at_least is not None and not 1 <= claim.in_at_least <= len(cells):
        raise ClaimError(
            f"{name}: in_at_least is {claim.in_at_least}; it must lie between 1 and {len(cells)}"
        )


def judge(claims: Iterable[Claim], results: pd.DataFrame) -> pd.DataFrame:
    """Judges each claim on ``results`` (as read by ``results.read_results``).

    Columns: id, text, source, relation, threshold, seeds (how many), values (what decides, per
    seed), margin (mean over seeds), spread (max - min of the margin), verdict, note. What decides
    is the number on which the claim turns, with its cell, and the rival's where ranks are compared;
    of a claim that need not be true everywhere, in how many cells it is.
    HOLDS: true in every seed and the mean margin exceeds the spread, or there is no spread. FAILS:
    false in every seed. UNDECIDED: neither. UNTESTED: no seed has all rows. A seed that lacks rows
    is left out, and the note says so.
    """
    return pd.DataFrame([_judged(claim, results) for claim in claims])


def shown(judged: pd.DataFrame) -> pd.DataFrame:
    """What a page has room for: id, claim, source, required, what came out, and the verdict.

    A column that is empty in every line is left out: on smoke, all numbers.
    """
    required = judged["relation"].str.replace("_", " ") + judged["threshold"].map(" {:g}".format)
    frame = judged.assign(claim=judged["text"], required=required.replace("lowest 1", "lowest"))
    columns = ("id", "claim", "source", "required", "values", "margin", "spread", "verdict", "note")
    return frame[[c for c in columns if frame[c].replace("", None).notna().any()]]


def _judged(claim: Claim, results: pd.DataFrame) -> dict[str, object]:
    line: dict[str, object] = {
        "id": claim.id,
        "text": claim.text,
        "source": claim.source,
        "relation": claim.relation,
        "threshold": claim.bound,
        "seeds": 0,
        "values": "",
        "margin": float("nan"),
        "spread": float("nan"),
        "verdict": "UNTESTED",
    }
    if not set(results["profile"]) <= set(JUDGED):
        named = f"{', '.join(JUDGED[:-1])} and {JUDGED[-1]}"
        return line | {"note": f"claims are judged on {named} only"}
    rows = select(claim, results)
    found = sorted(rows["seed"].unique(), key=lambda seed: natural_order("seed", seed))
    gaps = {seed: missing(claim, rows[rows["seed"] == seed]) for seed in found or [""]}
    seeds = [seed for seed, gap in gaps.items() if not gap]
    if not seeds:
        seed, gap = next(iter(gaps.items()))
        return line | {"note": gap + (f" in seed {seed}" if seed else "")}
    lacking = ", ".join(seed for seed, gap in gaps.items() if gap)
    notes = [f"without seed {lacking}: rows are missing"] if lacking else []
    notes += ["one seed: the spread is unknown"] * (len(seeds) == 1)
    decisive = [_decisive(claim, rows[rows["seed"] == seed]) for seed in seeds]
    margins = [margin for _, margin in decisive]
    return line | {
        "seeds": len(seeds),
        "values": "; ".join(
            f"{seed or '-'}: {text}" for seed, (text, _) in zip(seeds, decisive, strict=True)
        ),
        "margin": sum(margins) / len(margins),
        "spread": _spread(margins),
        "verdict": decide(margins),
        "note": "; ".join(notes),
    }


def _spread(margins: Sequence[float]) -> float:
    return round(max(margins) - min(margins), DECIMALS)


def decide(margins: Sequence[float]) -> str:
    """HOLDS, FAILS or UNDECIDED from one margin per seed; a margin of 0 is still true.

    Without any spread (a rank that is 1 in every seed) there is nothing for the margin to exceed.
    """
    spread = _spread(margins)
    if max(margins) < 0:
        return "FAILS"
    if min(margins) >= 0 and (spread == 0 or sum(margins) / len(margins) > spread):
        return "HOLDS"
    return "UNDECIDED"


def select(claim: Claim, results: pd.DataFrame) -> pd.DataFrame:
    """The rows of the claim, one per number: a number that serves two paper items counts once.

    Raises ``ClaimError`` naming the column in which rows differ that the claim does not mention.
    """
    parts = [results[results[list(f)].isin(f).all(axis=1)] for f in claim.filters]
    named = {column for wanted in claim.filters for column in wanted}
    keys = [column for column in IDENTITY if column != "paper_item" or column in named]
    rows = pd.concat(parts)[[*keys, "value"]].drop_duplicates()
    cell = ["seed", *claim.grouped]
    if rows.duplicated(cell).any():
        group = next(part for _, part in rows.groupby(cell) if len(part) > 1)
        odd = next(column for column in (*keys, "value") if group[column].nunique() > 1)
        raise ClaimError(f"claim {claim.id}: several rows for one number; they differ in {odd}")
    return rows


def missing(claim: Claim, rows: pd.DataFrame) -> str:
    """The first combination of filter values that one seed's rows lack, in words; "" for none."""
    for wanted in claim.filters:
        have = set(rows[list(wanted)].itertuples(index=False, name=None))
        for combination in itertools.product(*wanted.values()):
            if combination not in have:
                cells = [f"{c}={v}" for c, v in zip(wanted, combination, strict=True) if v]
                return f"no row with {', '.join(cells)}"
    return ""


def _decisive(claim: Claim, rows: pd.DataFrame) -> tuple[str, float]:
    """(what decides in words, margin) of one seed, in the cell on which the claim turns.

    With cells sorted by margin, best first, a claim that must be true in q of them is true exactly
    when the q-th is.
    """
    if not claim.each:
        return _cell(claim, rows)
    cells = sorted(
        ((name, *_cell(claim, part)) for name, part in rows.groupby(list(claim.each))),
        key=lambda cell: -cell[2],
    )
    if claim.in_at_least is not None:
        true = sum(margin >= 0 for *_, margin in cells)
        return f"{true} of {len(cells)}", cells[claim.in_at_least - 1][2]
    name, text, margin = cells[-1]
    cell = ", ".join(map(label, claim.each, name))
    return (f"{text} ({cell})" if len(cells) > 1 else text), margin


def _cell(claim: Claim, rows: pd.DataFrame) -> tuple[str, float]:
    if claim.subject is None:
        value = float(rows["value"].mean())
        margin = claim.bound - value if claim.relation == "at_most" else value - claim.bound
        return f"{value:.4g}", round(margin, DECIMALS)
    column, subject = claim.subject
    means = rows.groupby(column)["value"].mean()
    rank = int(claim.bound)
    others = means.drop(subject).sort_values(ascending=claim.best == "lowest")
    if rank > len(others):
        raise ClaimError(
            f"claim {claim.id}: {len(others) + 1} ranks exist, so rank_at_most {rank} "
            "is always true"
        )
    rival, value = others.index[rank - 1], float(means[subject])
    margin = (others.iloc[rank - 1] - value) * (1 if claim.best == "lowest" else -1)
    text = f"{value:.4g} against {others.iloc[rank - 1]:.4g} of {label(column, rival)}"
    return text, round(float(margin), DECIMALS)
