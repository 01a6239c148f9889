"""From rows to what a reader sees: means over seeds, the paper beside ours, tables on disk."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from invertune.files import write_atomic
from invertune.results import IDENTITY, NUMBER, ResultsError, natural_order, read_paper
from invertune.sections import Attacks

# What two numbers are about; the profile and the seed say only where they come from.
COMPARED = tuple(column for column in IDENTITY if column not in ("profile", "seed"))

# Rates: sampling error alone is 1.4 points (95 %) over the 5,000 images of COCO, so a closer
# agreement means nothing; two public runs of this method at equal settings differ by 4.5 points.
MATCH_POINTS, NEAR_POINTS = 1.5, 5.0
# Other numbers, relative to the paper's: the same two runs give layer impacts 5 % apart; four times
# that still tells a critical layer (1.38) from the others (0.18).
MATCH_RELATIVE, NEAR_RELATIVE = 0.05, 0.2

LABELS = {
    "attack": {
        "none": "Clean model",
        "clean_finetuned": "Clean, fine-tuned",
        "badnet": "BadNet",
        "blended": "Blended",
        "sig": "SIG",
        "wanet": "WaNet",
        "badencoder": "BadEncoder",
        "badclip": "BadCLIP",
    },
    "defense": {
        "none": "No defense",
        "ft": "FT",
        "cleanclip": "CleanCLIP",
        "cleanerclip": "CleanerCLIP",
        "par": "PAR",
        "invertune": "InverTune",
    },
    "metric": {
        "ca": "CA",
        "ca_loss": "CA loss",
        "asr": "ASR",
        "inverted_asr": "Inverted ASR",
        "mask_l1": "Mask L1",
        "ssim": "SSIM",
        "rebound_ca": "rebound CA",
        "rebound_asr": "rebound ASR",
    },
    "task": {"zeroshot": "Zero-shot", "retrieval": "Retrieval"},
    "perturbation": {
        "patch_feature": "patch (features)",
        "patch_prediction": "patch (prediction)",
        "ball_feature": "ball (features)",
        "ball_prediction": "ball (prediction)",
        "fourier": "Fourier wave",
    },
    "setting": {
        **{f"lambda{i}": f"λ{i}" for i in range(1, 5)},
        "beta": "β",
        "lrs": "learning rates",
        "ssim_space": "SSIM space",
        "bn_mode": "BN mode",
    },
    "layer_rule": {"mean_plus_std": "mean + std", "top3": "top 3"},
    "trigger": {"uap": "universal perturbation"},
    "form": {"paper": "the paper's"},
}
LATEX = {"λ": r"$\lambda$", "β": r"$\beta$"}  # pdflatex has no Greek letters outside of formulas
LAYOUT = {  # the rows and columns of a table, ours and the paper's, and of Figure 6's numbers
    "table1": (["task", "metric", "defense"], ["attack"]),
    "table2": (["metric", "variant"], ["attack"]),
    "table3": (["metric", "k", "variant"], ["attack"]),
    "table4": (["defense"], ["target", "metric"]),
    "table5": (["defense"], ["backbone", "metric"]),
    "figure6": (["metric"], ["variant"]),
}
BLOCK = re.compile(r"^visual\.(transformer\.resblocks|trunk\.blocks)\.")  # of both kinds of ViT


def readable() -> None:
    """Lets notebooks show tables as files have them: two decimals, whole texts, every cell."""
    pd.set_option("display.float_format", partial(_cell, decimals=2))
    for name in ("max_colwidth", "max_columns", "max_rows"):
        pd.set_option(f"display.{name}", None)


def seed_summary(results: pd.DataFrame) -> pd.DataFrame:
    """Mean, min, max and number of seeds of each number; the columns of ``COMPARED`` stay."""
    groups = results.groupby(["profile", *COMPARED, "unit"], sort=False)["value"]
    return groups.agg(mean="mean", min="min", max="max", seeds="size").reset_index()


def compare_with_paper(results: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """Each of the paper's numbers beside ours (mean over seeds), with a verdict.

    MATCH, NEAR, DIFFERS and MISSING are given on the paper profile only; elsewhere the verdict is
    NOT COMPARABLE, as another data set can neither confirm nor refute the paper.
    Raises ``ResultsError`` when ``results`` is empty.
    """
    if results.empty:
        raise ResultsError("no results to compare with the paper; run the notebooks first")
    ours = seed_summary(results).drop(columns=["profile", "unit"])
    ours = ours.rename(columns={"mean": "ours", "min": "ours_min", "max": "ours_max"})
    theirs = paper[[*COMPARED, "unit", "value"]].rename(columns={"value": "paper"})
    both = theirs.merge(ours, how="left", on=list(COMPARED))
    both["seeds"] = both["seeds"].fillna(0).astype(int)
    if (results["profile"] == "paper").all():
        both["verdict"] = [*map(verdict, both["ours"], both["paper"], both["unit"])]
    else:
        both["verdict"] = "NOT COMPARABLE"
    return both


def verdict(ours: float, paper: float, unit: str) -> str:
    """MATCH, NEAR or DIFFERS by the distance of two numbers; MISSING when ``ours`` is NaN."""
    if pd.isna(ours):
        return "MISSING"
    if unit in ("percent", "points"):
        match, near = MATCH_POINTS, NEAR_POINTS
    else:
        match, near = MATCH_RELATIVE * abs(paper), NEAR_RELATIVE * abs(paper)
    distance = round(abs(ours - paper), 6)
    return "MATCH" if distance <= match else "NEAR" if distance <= near else "DIFFERS"


def wide(
    results: pd.DataFrame, index: Sequence[str], columns: Sequence[str], spread: bool = False
) -> pd.DataFrame:
    """Means over seeds as a table: one line per ``index``, one column per ``columns``, labeled.

    With ``spread`` the lowest and the highest seed stand behind the means, if seeds are several.
    Raises ``ResultsError`` when two numbers would fall into one cell: filter or name more columns.
    """
    means, used = seed_summary(results), [*index, *columns]
    if means.duplicated(used).any():
        odd = next(c for c in COMPARED if c not in used and means[c].nunique() > 1)
        raise ResultsError(f"a cell of the table would hold several numbers: they differ in {odd}")
    for column in used:
        names = {name: label(column, name) for name in _ordered(means[column])}
        means[column] = pd.Categorical(means[column].map(names), list(names.values()), ordered=True)
    if spread and means["seeds"].max() > 1:
        cells = zip(means["mean"], means["min"], means["max"], strict=True)
        means["mean"] = [f"{mean:.2f} ({low:.2f}-{high:.2f})" for mean, low, high in cells]
    table = means.pivot(index=list(index), columns=list(columns), values="mean")
    table = table.sort_index().sort_index(axis=1)  # several columns come as they are met
    table.columns = [key if isinstance(key, str) else " ".join(key) for key in table.columns]
    return table.reset_index()


def paper_table(item: str) -> pd.DataFrame | None:
    """The paper's own numbers of an item, in the form of ours; None where another form is needed:
    Tables 6 to 11 count predictions on other classes.
    """
    rows = select(read_paper(), paper_item=item)
    if item in LAYOUT:
        return wide(rows, *LAYOUT[item])
    return _layers_row(rows) if "layer_impact" in set(rows.metric) else None


def _layers_row(rows: pd.DataFrame) -> pd.DataFrame:
    """The one row of Tables 12-15: BadCLIP."""
    layer = rows.variant.str.removeprefix("layer=").map(partial(label, "layer"))
    impact, value = rows.metric == "layer_impact", rows.value.map("{:.4f}".format)
    line = {
        "attack": "BadCLIP, the paper's",
        **dict(zip(layer[impact], value[impact], strict=True)),
    }
    for name in ("mean", "std", "threshold"):
        line[name] = value[rows.metric == f"layer_{name}"].item()
    chosen = (rows.metric == "layer_selected") & (rows.value == 1)
    return pd.DataFrame([{**line, "critical": ", ".join(layer[chosen])}])


def label(column: str, name: str) -> str:
    """The name a reader sees for a cell, e.g. ``label("attack", "badnet")`` is "BadNet".

    Of a variant, every setting and value: "lambda4=0.05;state=last" is "λ4 = 0.05, state = last".
    """
    if column == "variant":
        parts = (part.split("=") for part in name.split(";") if part)
        return ", ".join(f"{label('setting', key)} = {label(key, value)}" for key, value in parts)
    if column == "layer":
        return BLOCK.sub("block ", name).removeprefix("visual.")
    return LABELS.get(column, {}).get(name, name.replace("_", " "))


def layers(names: Iterable[str]) -> str:
    """The labels of several layers, one after the other."""
    return ", ".join(label("layer", name) for name in names)


def select(results: pd.DataFrame, **where: str | Sequence[str]) -> pd.DataFrame:
    """The rows with a column's text or one of several, e.g. ``metric="asr", k=["1", "3"]``.

    A number that serves several paper items, which may have been run on other seeds, counts once.
    """
    for name, wanted in where.items():
        results = results[results[name].isin([wanted] if isinstance(wanted, str) else wanted)]
    return results.drop_duplicates(list(NUMBER))


def by_seed(
    results: pd.DataFrame, column: str, **where: str | Sequence[str]
) -> dict[str, list[float]]:
    """Values per name in ``column`` (one per seed), of the rows that ``select`` gives."""
    results = select(results, **where)
    chosen = results[column]
    return {name: list(results.loc[chosen == name, "value"]) for name in _ordered(chosen)}


def gate_missed(results: pd.DataFrame, gate: Attacks) -> dict[str, list[str]]:
    """The attacks that miss the gate, and in which seeds."""
    failed = gate_failures(results, gate)
    return {attack: sorted(set(rows.seed)) for attack, rows in failed.groupby("attack")}


def gate_failures(results: pd.DataFrame, gate: Attacks) -> pd.DataFrame:
    """The rows that miss the gate on ASR or CA loss.

    ``results`` are those of one backbone and target.
    """
    rows = select(results, defense="none", task="zeroshot", k="1", variant="", attack=gate.names)
    weak = (rows.metric == "asr") & (rows.value < gate.gate_asr_percent)
    costly = (rows.metric == "ca_loss") & (rows.value > gate.gate_ca_drop_points)
    return rows[weak | costly]


def _ordered(names: pd.Series) -> list[str]:
    return sorted(names.unique(), key=lambda name: natural_order(str(names.name), name))


def write_table(frame: pd.DataFrame, folder: Path, name: str, decimals: int = 2) -> pd.DataFrame:
    """Writes ``frame`` (without its index) as NAME.csv, NAME.md and NAME.tex; returns it.

    Numbers of a column of floats get ``decimals`` decimals; a missing number is empty in CSV and a
    dash elsewhere; an infinite mask never reached its ASR. The same frame gives the same bytes.
    """
    header = [str(column) for column in frame.columns]
    cells = _cells(frame, decimals)
    csv = pd.DataFrame(cells, columns=header).to_csv(index=False, lineterminator="\n")
    texts = {"csv": csv, "md": markdown(header, cells), "tex": latex(header, cells)}
    for suffix, text in texts.items():
        write_atomic(folder / f"{name}.{suffix}", text.encode())
    return frame


def _cells(frame: pd.DataFrame, decimals: int) -> list[list[str]]:
    return [[_cell(v, decimals) for v in line] for line in frame.itertuples(index=False)]


def _cell(value: object, decimals: int) -> str:
    if pd.isna(value):  # type: ignore[call-overload]
        return ""
    if value == math.inf:
        return "not reached"
    return f"{value:.{decimals}f}" if isinstance(value, float) else str(value)


def frame_markdown(frame: pd.DataFrame, decimals: int = 2) -> str:
    """``frame`` (without its index) as the Markdown table that ``write_table`` writes."""
    return markdown([str(column) for column in frame.columns], _cells(frame, decimals))


def markdown(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars, tags and links inside a cell are escaped, an empty one is a dash."""
    lines = [header, ["---"] * len(header), *([c or "-" for c in line] for line in cells)]
    escaped = ([re.sub(r"([|<\[])", r"\\\1", c).replace("\n", " ") for c in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def latex(header: list[str], cells: list[list[str]]) -> str:
    """A LaTeX tabular with booktabs rules, first column left, the others right; text escaped."""
    style = pd.DataFrame(cells, columns=header).replace("", "--").style.hide()
    style = style.format(escape="latex").format_index(escape="latex", axis=1)
    text = style.to_latex(hrules=True, column_format="l" + "r" * (len(header) - 1))
    return text.translate(str.maketrans(LATEX))
