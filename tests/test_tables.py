"""Tables: means over seeds, the paper beside ours, and the three files a table is written to."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from invertune.results import ResultsError, read_results, row, write_rows
from invertune.tables import by_seed, compare_with_paper, seed_summary, verdict, wide, write_table

PAPER_CSV = Path(__file__).resolve().parent.parent / "expected" / "paper.csv"
CELL = {
    "profile": "mini",
    "paper_item": "table1",
    "backbone": "RN50",
    "attack": "badnet",
    "target": "mushroom",
    "defense": "none",
    "task": "zeroshot",
    "metric": "asr",
    "k": 1,
    "seed": 0,
    "value": 87.73,
}


def one(**changes: object) -> dict[str, str]:
    return row(**{**CELL, **changes})  # type: ignore[arg-type]


def test_seed_summary(tmp_path):
    rows = [one(seed=s, value=v) for s, v in ((1, 80.0), (2, 90.0), (3, 70.0))]
    table = seed_summary(write_rows([*rows, one(attack="sig")], tmp_path / "results.csv"))
    line = table[table["attack"] == "badnet"].iloc[0]
    assert (line["mean"], line["min"], line["max"], line["seeds"]) == (80.0, 70.0, 90.0, 3)
    assert len(table) == 2


def test_paper_values():
    """Spot checks against the printed tables, and how many numbers each of them holds."""
    paper = read_results(PAPER_CSV, "paper")
    counts = paper["paper_item"].value_counts()
    assert (counts["table1"], counts["table2"], counts["table3"]) == (144, 96, 96)
    assert (counts["table4"], counts["table5"], counts["figure6"]) == (36, 36, 6)
    assert all(counts[f"table{i}"] == 61 for i in range(6, 12))
    assert [counts[f"table{i}"] for i in range(12, 16)] == [11, 11, 27, 27]

    def value(**where: str) -> float:
        chosen = paper
        for column, text in where.items():
            chosen = chosen[chosen[column] == text]
        (number,) = chosen["value"]
        return number

    assert (
        value(
            paper_item="table1",
            attack="badclip",
            defense="invertune",
            task="retrieval",
            metric="asr",
        )
        == 0.68
    )
    assert value(paper_item="table2", attack="sig", variant="lambda4=0.1") == 0.05
    assert (
        value(paper_item="table3", attack="blended", k="10", variant="trigger=uap", metric="asr")
        == 98.01
    )
    assert value(paper_item="table5", backbone="ViT-B-16", defense="par", metric="ca") == 57.98
    assert value(paper_item="table9", metric="increase", variant="class=agaric") == 25.99
    assert value(paper_item="table15", metric="layer_threshold") == 0.3298
    assert value(paper_item="figure6", metric="asr", variant="beta=0") == 0.004


@pytest.mark.parametrize(
    ("ours", "paper", "unit", "expected"),
    [
        (1.5, 0.0, "percent", "MATCH"),
        (1.51, 0.0, "percent", "NEAR"),
        (93.36, 98.36, "percent", "NEAR"),
        (93.35, 98.36, "percent", "DIFFERS"),
        (1.38, 1.3802, "ratio", "MATCH"),
        (1.2, 1.3802, "ratio", "NEAR"),
        (0.885, 1.3802, "ratio", "DIFFERS"),
        (1.0, 1.0, "rank", "MATCH"),
        (2.0, 1.0, "rank", "DIFFERS"),
        (0.0, 0.0, "images", "MATCH"),
        (math.nan, 1.0, "percent", "MISSING"),
    ],
)
def test_verdict(ours, paper, unit, expected):
    assert verdict(ours, paper, unit) == expected


def test_compare_with_paper(tmp_path):
    paper = read_results(PAPER_CSV, "paper")
    table1 = paper[paper["paper_item"] == "table1"]
    ours = write_rows(
        [one(profile="paper", seed=s, value=v) for s, v in ((1, 87.0), (2, 88.0))],
        tmp_path / "paper.csv",
    )
    both = compare_with_paper(ours, table1)
    assert len(both) == len(table1)
    assert both["verdict"].value_counts().to_dict() == {"MISSING": 143, "MATCH": 1}
    line = both[both["verdict"] == "MATCH"].iloc[0]
    assert (line["ours"], line["ours_min"], line["paper"], line["seeds"]) == (87.5, 87, 87.73, 2)


@pytest.mark.parametrize("profile", ["smoke", "mini"])
def test_another_data_set_is_never_comparable(tmp_path, profile):
    paper = read_results(PAPER_CSV, "paper")
    both = compare_with_paper(write_rows([one(profile=profile)], tmp_path / "r.csv"), paper)
    assert set(both["verdict"]) == {"NOT COMPARABLE"} and both["ours"].notna().sum() == 1
    assert both["paper"].notna().all()


def test_nothing_to_compare_is_said(tmp_path):
    with pytest.raises(ResultsError, match="no results to compare"):
        compare_with_paper(write_rows([], tmp_path / "r.csv"), read_results(PAPER_CSV))


def test_wide_table_and_by_seed():
    paper = read_results(PAPER_CSV)
    table1 = paper[paper["paper_item"] == "table1"]
    table = wide(table1, ["task", "defense"], ["attack", "metric"])
    assert list(table.columns[:4]) == ["task", "defense", "BadNet CA", "BadNet ASR"]
    assert list(table["defense"][:6]) == [
        "No defense",
        "FT",
        "CleanCLIP",
        "CleanerCLIP",
        "PAR",
        "InverTune",
    ]
    assert table["BadCLIP ASR"][5] == 0.49 and table["task"][0] == "Zero-shot"
    with pytest.raises(ResultsError, match="several numbers: they differ in task"):
        wide(table1, ["defense"], ["attack", "metric"])
    values = by_seed(table1, "attack", metric="asr", task="zeroshot", defense="ft")
    assert list(values) == ["badnet", "blended", "sig", "wanet", "badencoder", "badclip"]
    assert values["sig"] == [55.59]


def test_write_table(tmp_path):
    frame = pd.DataFrame({"Class_1": ["a|b", "50 % & more"], "CA": [58.205, math.nan], "n": [3, 4]})
    write_table(frame, tmp_path, "table1")
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(first) == {"table1.csv", "table1.md", "table1.tex"}
    assert first["table1.csv"] == b"Class_1,CA,n\na|b,58.20,3\n50 % & more,,4\n"
    assert "| a\\|b | 58.20 | 3 |\n| 50 % & more | - | 4 |" in first["table1.md"].decode()
    tex = first["table1.tex"].decode()
    assert tex.startswith("\\begin{tabular}{lrr}\n\\toprule\nClass\\_1 & CA & n \\\\\n\\midrule\n")
    assert "50 \\% \\& more & -- & 4 \\\\\n\\bottomrule" in tex
    write_table(frame, tmp_path, "table1")
    assert first == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
