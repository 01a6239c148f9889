"""One page of all that a profile has left: its claims with verdicts, every figure and table.

figures/PROFILE/README.md, written after each notebook of a run; ``python -m tools.update_readme``
writes the committed ones from the published results.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path

import pandas as pd
import yaml
from PIL import Image

from invertune import claims, tables
from invertune.figures import DPI
from invertune.files import REPOSITORY, read_stamp
from invertune.results import ResultsError, natural_order, read_paper, read_results
from invertune.sections import NULLS, Settings
from invertune.settings import load_settings

ITEMS = REPOSITORY / "expected" / "items.yml"
PAPER_NUMBERS = "paper_numbers.csv"
OWN_CLAIMS = "gate of this artifact|null control of this artifact|beyond the paper"  # their sources
MOST_LINES = 50  # a longer table is linked, not shown


def page(
    profile: str,
    results: pd.DataFrame,
    folder: Path,
    drawn: Mapping[str, Collection[str]] | None = None,
    overridden: bool = False,
    paper: pd.DataFrame | None = None,
) -> str:
    """The page as Markdown, of ``results`` as ``read_results`` gives them and files in ``folder``.

    ``drawn`` maps the files that belong to these results to their seeds; None: all files, of all
    seeds. An item without any is listed as not run; exhibits that the paper does not have are shown
    only if they are there. ``overridden``: not all settings were the profile's. ``paper`` compares
    the numbers with the paper's, as ``tables.compare_with_paper`` does.
    """
    files = {path.name for path in folder.glob("*") if drawn is None or path.name in drawn}
    items = yaml.safe_load(ITEMS.read_text())
    missing = "not there yet" if drawn is None else "not run on these seeds"
    notebooks = {item: name for name, printed in items["notebooks"].items() for item in printed}
    beside = (
        "The paper's numbers, which come from other data, stand folded below ours and in "
        "[paper.csv](../../expected/paper.csv)."
    )
    if paper is not None:
        beside = f"[{PAPER_NUMBERS}]({PAPER_NUMBERS}) compares every number with the paper's."
    parts = [
        f"# Profile {profile}: claims, figures and tables",
        f"{_origins(profile, results, overridden)} {beside}",
        "## Claims",
        *(
            _claims(results)
            if profile in claims.JUDGED
            else ["Not judged: the numbers of this profile mean nothing."]
        ),
        "## The paper's figures and tables",
    ]
    for item, title in items["titles"].items():
        rows = _of_seeds(_of_items(results, [item]), item, drawn)
        about = _origin(notebooks[item], rows, item in items["first_seed"])
        if paper is not None and not (printed := paper[paper.paper_item == item]).empty:
            about += f", the paper's numbers: {counted(printed.verdict)}"
        parts += [
            f"### {_name(item)}: {title}",
            *(found := _shown(item, folder, files, items["reading"], about, missing)),
            *(_papers(item) if len(found) > 1 else []),
        ]
    parts.append("## Beyond the paper")
    for notebook, titles in items["beyond"].items():
        rows = _of_items(results, items["notebooks"][notebook])
        for name, title in titles.items():
            first = name in items["first_seed"]
            shown = _of_seeds(results if rows.empty else rows, name, drawn)
            about = _origin(notebook, shown, first)
            if found := _shown(name, folder, files, items["reading"], about):
                parts += [f"### {title}", *found]
    return "\n\n".join(parts) + "\n"


def _origins(profile: str, results: pd.DataFrame, overridden: bool) -> str:
    """The page's first sentences: where its entries come from, and what they are."""
    return (
        "This page shows what [the notebooks](../../notebooks) produced with "
        f"[these settings](../../params/{profile}.yml){', some of them overridden,' * overridden} "
        f"on {named_seeds(filter(None, results.seed))}"
        f" (attacks: {_named(results, 'attack')}; defenses: {_named(results, 'defense')}). Entries "
        "for several seeds are means; Table 1 has the lowest and the highest seed in parentheses, "
        "charts have them as whiskers or bands."
    )


def write(settings: Settings, root: Path = REPOSITORY) -> Path:
    """Writes the page of a run, of the settings' seeds, beside its figures; returns its path.

    Where run_all.sh ran notebooks, it shows only what they drew, on no other seeds, not what was
    committed. On the paper's own data, every number of the paper is compared with ours.
    Raises ``ResultsError`` where nothing of the profile has been run on these seeds.
    """
    profile, seeds = settings.profile, [str(seed) for seed in settings.seeds]
    source = root / "results" / profile / "results.csv"
    found = read_results(source, profile)
    results = found[found.seed.isin(seeds)]
    if results.empty:
        raise ResultsError(f"no results on {named_seeds(seeds)} in {source}; run it first")
    path = root / "figures" / profile / "README.md"
    stamps = [read_stamp(s) for s in (source.parent / "notebooks").glob("*.done.json")]
    own = [stamp for stamp in stamps if {*stamp.get("seeds", seeds)} <= {*seeds}]
    drawn = {name: s.get("seeds", seeds) for s in own for name in s.get("figures", ())}
    plain, paper = load_settings(profile, {"seeds": settings.seeds}), None
    if profile == "paper":
        paper = tables.compare_with_paper(results, read_paper())
        paper.to_csv(path.with_name(PAPER_NUMBERS), index=False, lineterminator="\n")
    shown = drawn if stamps else None
    path.write_text(page(profile, results, path.parent, shown, settings != plain, paper))
    return path


def counted(verdicts: Iterable[str]) -> str:
    """How often each verdict was given: "30 HOLDS, 12 FAILS"."""
    return ", ".join(f"{n} {verdict}" for verdict, n in Counter(verdicts).most_common())


def claims_counted(judged: pd.DataFrame) -> str:
    """How many of the paper's claims and of this artifact's own got each verdict, and how many of
    those rest on one seed.
    """
    single, own = judged[judged.seeds == 1], judged.source.str.match(OWN_CLAIMS)
    alone = f" (on one seed only: {counted(single.verdict)})" if len(single) else ""
    groups = {"the paper's": judged[~own], "this artifact's own": judged[own]}
    found = (f"{name}: {counted(g.verdict)}" for name, g in groups.items() if len(g))
    return f"{'; '.join(found)}{alone}"


def _claims(results: pd.DataFrame) -> list[str]:
    judged = claims.judge(claims.load_claims(), results)
    shown = claims.shown(judged).rename(columns={"values": "seed: what decides"})
    frame = shown[["verdict", *(c for c in shown if c not in ("verdict", "margin", "spread"))]]
    untested, group = frame.verdict == "UNTESTED", frame.id.str.split(".").str[0]
    parts = [
        f"Claims, {claims_counted(judged)}. A claim HOLDS if it is true in every seed and, where "
        "there are several, by more than the seeds differ. It FAILS if it is true in no seed, is "
        "UNDECIDED in between, and UNTESTED if its rows are missing. The column *seed: what "
        "decides* gives, for each seed, the value that decides the claim, with the cell or "
        "competitor it comes from, or the number of cases in which the claim is true."
    ]
    for name, part in frame[~untested].groupby(group, sort=False):
        about = f"### {_name(str(name))}: {counted(part.verdict)}"
        parts += [about, tables.frame_markdown(part).strip()]
    if untested.any():
        parts.append(f"<details><summary>{untested.sum()} UNTESTED</summary>")
        parts += [tables.frame_markdown(frame[untested]).strip(), "</details>"]
    return parts


def _of_items(results: pd.DataFrame, items: Collection[str]) -> pd.DataFrame:
    """The rows of some items; both halves of Figure 5 stand under "figure5"."""
    return results[results.paper_item.isin([item.rstrip("ab") for item in items])]


def _of_seeds(
    rows: pd.DataFrame, name: str, drawn: Mapping[str, Collection[str]] | None
) -> pd.DataFrame:
    """The rows of the seeds that an item's files show; of all where ``drawn`` is None."""
    if drawn is None:
        return rows
    seeds = {seed for file, own in drawn.items() if Path(file).stem == name for seed in own}
    return rows[rows.seed.isin(seeds)]


def _origin(notebook: str, rows: pd.DataFrame, first_seed: bool) -> str:
    """The notebook that an item comes from, as a link, and the seeds of its rows, or the first."""
    seeds = sorted(_seeds(rows), key=int)[: 1 if first_seed else None]
    about = f"[{notebook}](../../notebooks/{notebook}.ipynb)"
    return f"{about}, {named_seeds(seeds)}" if seeds else about


def _shown(
    name: str,
    folder: Path,
    files: Collection[str],
    reading: Mapping[str, str],
    about: str,
    missing: str = "",
) -> list[str]:
    """Links, reading aid, chart and table of one item: what of it is among the ``files``.

    One of which nothing is there says ``missing``, or is left out.
    """
    there = [s for s in ("csv", "tex", "pdf") if f"{name}.{s}" in files]
    chart = folder / f"{name}.png"
    if not there and chart.name not in files:
        return [f"{about}: {missing}."] if missing else []
    links = [f"[{suffix.upper()}]({name}.{suffix})" for suffix in there]
    parts = [" · ".join((about, *links)), f"*What to look for:* {reading[name]}"]
    if chart.name in files:
        with Image.open(chart) as picture:  # at most 200 pixels an inch: sharp on fine screens
            width = round(picture.width * min(1, 200 / picture.info.get("dpi", (DPI, DPI))[0]))
        parts.append(f'<img src="{name}.png" width="{width}" alt="{name}">')
    if (path := folder / f"{name}.md").name in files:
        text = path.read_text().strip()
        lines = text.count("\n") - 1
        parts.append(text if lines <= MOST_LINES else f"[{lines} rows]({path.name})")
    return parts


def _papers(item: str) -> list[str]:
    """The paper's own numbers of an item, folded; nothing where they have another form."""
    if (printed := tables.paper_table(item)) is None:
        return []
    shown = tables.frame_markdown(printed).strip()
    return ["<details><summary>The paper's numbers, on its own data</summary>", shown, "</details>"]


def _name(item: str) -> str:
    """The paper's name of figure5a: Figure 5(a)."""
    return re.sub(r"(\D+)(\d+)(.?)", r"\1 \2(\3)", item).removesuffix("()").capitalize()


def _named(results: pd.DataFrame, column: str) -> str:
    """The attacks or the defenses that the results have, in words."""
    found = sorted({*results[column]} - {*NULLS}, key=partial(natural_order, column))
    return ", ".join(tables.label(column, name) for name in found)


def _seeds(rows: pd.DataFrame) -> set[str]:
    """The seeds in which all defenses of these rows were run."""
    per_defense = [set(seeds) for _, seeds in rows.groupby("defense").seed]
    return set.intersection(*per_defense) if per_defense else set()


def named_seeds(seeds: Iterable[object]) -> str:
    """Seeds in words: "seed 4", "seeds 4, 5"."""
    different = sorted({str(seed) for seed in seeds}, key=int)
    return f"seed{'s' * (len(different) > 1)} {', '.join(different)}"
