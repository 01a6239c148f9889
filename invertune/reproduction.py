"""A run beside the published results: which numbers and which verdicts differ."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from invertune import claims, tables
from invertune.files import REPOSITORY
from invertune.results import IDENTITY, PUBLISHED, ResultsError, read_results


def compare(profile: str, root: Path = REPOSITORY) -> tuple[str, bool]:
    """What differs, as Markdown, and whether every claim got the verdict of the published results.

    Both are judged on the rows that the run and the published results share; a claim about other
    rows is not counted. Raises ``ResultsError`` where there is nothing to compare.
    """
    known = [name for name in PUBLISHED if (root / f"expected/{name}.csv").is_file()]
    if profile not in known:
        raise ResultsError(f"no results of {profile} are published; there are: {', '.join(known)}")
    run, published = (
        read_results(root / folder, profile)
        for folder in (f"results/{profile}/results.csv", f"expected/{profile}.csv")
    )
    both = run.merge(published, on=list(IDENTITY), suffixes=("", "_published"))
    seeds = sorted(set(both.seed) - {""}, key=int)
    if not seeds:
        raise ResultsError(
            f"the run has seeds {', '.join(sorted(set(run.seed)))}, but seeds "
            f"{', '.join(sorted(set(published.seed)))} are published; run one of these"
        )
    verdicts = _verdicts(both, both.assign(value=both.value_published))
    other = verdicts[verdicts.run != verdicts.published]
    judged = f"{len(verdicts) - len(other)} of {len(verdicts)} claims have the published verdict."
    if verdicts.empty:
        judged = "No claim has all its rows in both, so only numbers are compared."
    parts = [
        f"# Profile {profile}: this run beside the published results, seeds {', '.join(seeds)}",
        judged,
        *([tables.frame_markdown(other).strip()] if len(other) else []),
        f"{int((both.value == both.value_published).sum()):,} of {len(both):,} numbers are equal "
        "to six decimals.",
    ]
    if not (differences := _differences(both)).empty:
        parts.append(tables.frame_markdown(differences).strip())
    return "\n\n".join(parts), other.empty


def _verdicts(run: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    found = claims.load_claims()
    ours, theirs = (claims.judge(found, frame).set_index("id") for frame in (run, published))
    frame = pd.DataFrame(
        {
            "claim": ours.index,
            "run": ours.verdict,
            "published": theirs.verdict,
            "run, what decides": ours["values"],
            "published, what decides": theirs["values"],
        }
    )
    return frame[(ours.verdict != "UNTESTED") & (theirs.verdict != "UNTESTED")]


def _differences(both: pd.DataFrame) -> pd.DataFrame:
    """Each paper item and metric that has other numbers: how many, by how much, and where most."""
    both = both.assign(difference=(both.value - both.value_published).abs())
    lines = []
    for (item, metric), rows in both.groupby(["paper_item", "metric"], sort=False):
        if not rows.difference.any():
            continue
        widest = rows.loc[rows.difference.idxmax()]
        where = (widest[c] for c in ("attack", "target", "backbone", "defense", "variant", "seed"))
        lines.append(
            {
                "item": item,
                "metric": metric,
                "unit": widest.unit,
                "numbers": len(rows),
                "other": int((rows.difference > 0).sum()),
                "mean difference": rows.difference.mean(),
                "largest": widest.difference,
                "at": ", ".join(filter(None, where)),
            }
        )
    return pd.DataFrame(lines)
