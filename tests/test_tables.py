"""Tables: means over seeds, the paper beside ours, and the three files a table is written to."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from invertune import exhibits
from invertune.chain import open_chain
from invertune.results import ResultsError, read_paper, row, to_frame
from invertune.rows import own_rows
from invertune.settings import load_settings
from invertune.tables import (
    by_seed,
    compare_with_paper,
    gate_missed,
    label,
    latex,
    markdown,
    paper_table,
    readable,
    seed_summary,
    verdict,
    wide,
    write_table,
)

PAPER = read_paper()
TABLE1 = PAPER[PAPER["paper_item"] == "table1"]


def frame(*changes: dict[str, object], **same: object) -> pd.DataFrame:
    """Results with one row for each of ``changes`` to one cell of Table 1."""
    cell = dict(profile="mini", paper_item="table1", backbone="RN50", attack="badnet", k=1, seed=0)
    cell |= dict(target="mushroom", defense="none", task="zeroshot", metric="asr", value=87.73)
    return to_frame([row(**cell | same | c) for c in changes])  # type: ignore[arg-type]


def test_a_number_that_serves_two_items_counts_once():
    both = frame({"seed": 1}, {"seed": 2, "value": 80}, {"seed": 1, "paper_item": "figure5"})
    assert by_seed(both, "attack", metric="asr") == {"badnet": [87.73, 80]}


def test_a_number_of_two_items_is_found_under_each(tmp_path):
    chain = open_chain(load_settings("mini", {"seeds": [1]}), tmp_path)
    own = own_rows(chain, frame({"paper_item": "figure5", "seed": 1}, {"seed": 1}))
    for item in ("figure5", "table1"):
        assert by_seed(own, "attack", paper_item=item) == {"badnet": [87.73]}


def test_seed_summary():
    seeds = [{"seed": s, "value": v} for s, v in ((1, 80.0), (2, 90.0), (3, 70.0))]
    table = seed_summary(frame(*seeds, {"attack": "sig"}))
    line = table[table["attack"] == "badnet"].iloc[0]
    assert (line["mean"], line["min"], line["max"], line["seeds"]) == (80.0, 70.0, 90.0, 3)
    assert len(table) == 2


def test_gate_missed():
    none = {"variant": ""}
    strong = [{"attack": "sig", "value": 80.0, **none}, {"attack": "badnet", "value": 99.0, **none}]
    loss = {"metric": "ca_loss", **none}
    costly = [{"attack": "badnet", "value": 2.1, "seed": 3, **loss}, {"value": 2.0, **loss}]
    weak = {"attack": "wanet", "value": 79.9, **none}
    aside = {"attack": "sig", "value": 5.0, "seed": 4, "variant": "floor=untriggered"}
    results = frame(*strong, *costly, weak, aside)
    gate = load_settings("mini").attacks
    assert gate_missed(results, gate) == {"badnet": ["3"], "wanet": ["0"]}


def test_the_gate_table_says_which_seed_failed_and_by_what(tmp_path):
    about = {"metric": "ca_loss", "attack": "wanet", "variant": ""}
    results = frame({"value": 2.381, "seed": 7, **about}, {"value": 1.4, "seed": 8, **about})
    chain = open_chain(load_settings("mini", {"seeds": [7, 8]}), tmp_path)
    shown = exhibits.gate_table(chain, results).set_index("attack").gate
    assert shown["WaNet"] == "failed in seed 7 (CA loss 2.38)" and shown["BadNet"] == "passed"


def test_paper_values():
    """Spot checks against the printed tables, and how many numbers each of them holds."""
    counts = PAPER["paper_item"].value_counts()
    assert (counts["table1"], counts["table2"], counts["table3"]) == (144, 96, 96)
    assert (counts["table4"], counts["table5"], counts["figure6"]) == (36, 36, 6)
    assert all(counts[f"table{i}"] == 61 for i in range(6, 12))
    assert [counts[f"table{i}"] for i in range(12, 16)] == [11, 11, 27, 27]


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("table1 badclip invertune retrieval asr", 0.68),
        ("table2 sig lambda4=0.1", 0.05),
        ("table3 blended 10 trigger=uap asr", 98.01),
        ("table5 ViT-B-16 par ca", 57.98),
        ("table9 increase class=agaric", 25.99),
        ("table15 layer_threshold", 0.3298),
        ("figure6 asr beta=0", 0.004),
    ],
)
def test_printed_values(where, value):
    wanted = set(where.split())
    [number] = [line.value for line in PAPER.itertuples() if wanted <= {*map(str, line)}]
    assert number == value


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


def test_compare_with_paper():
    ours = frame({"seed": 1, "value": 87.0}, {"seed": 2, "value": 88.0}, profile="paper")
    both = compare_with_paper(ours, TABLE1)
    assert len(both) == len(TABLE1)
    assert both["verdict"].value_counts().to_dict() == {"MISSING": 143, "MATCH": 1}
    line = both[both["verdict"] == "MATCH"].iloc[0]
    assert (line["ours"], line["ours_min"], line["paper"], line["seeds"]) == (87.5, 87, 87.73, 2)


@pytest.mark.parametrize("profile", ["smoke", "mini"])
def test_another_data_set_is_never_comparable(profile):
    both = compare_with_paper(frame({"profile": profile}), PAPER)
    assert set(both["verdict"]) == {"NOT COMPARABLE"} and both["ours"].notna().sum() == 1
    assert both["paper"].notna().all()


def test_nothing_to_compare_is_said():
    with pytest.raises(ResultsError, match="no results to compare"):
        compare_with_paper(frame(), PAPER)


def test_wide_table_and_by_seed():
    table = wide(TABLE1, ["task", "defense"], ["attack", "metric"])
    pd.testing.assert_frame_equal(
        wide(TABLE1.iloc[::-1], ["task", "defense"], ["attack", "metric"]), table
    )
    assert list(table.columns[:4]) == ["task", "defense", "BadNet CA", "BadNet ASR"]
    defenses = ["No defense", "FT", "CleanCLIP", "CleanerCLIP", "PAR", "InverTune"]
    assert list(table["defense"][:6]) == defenses
    assert table["BadCLIP ASR"][5] == 0.49 and table["task"][0] == "Zero-shot"
    asr = TABLE1.query("task == 'zeroshot' and metric == 'asr'")
    assert list(wide(asr, ["defense"], ["attack"]).columns[:3]) == ["defense", "BadNet", "Blended"]
    with pytest.raises(ResultsError, match="several numbers: they differ in task"):
        wide(TABLE1, ["defense"], ["attack", "metric"])
    values = by_seed(TABLE1, "attack", metric="asr", task="zeroshot", defense="ft")
    assert list(values) == ["badnet", "blended", "sig", "wanet", "badencoder", "badclip"]
    assert values["sig"] == [55.59]


@pytest.mark.parametrize(
    ("column", "name", "shown"),
    [
        ("variant", "lambda4=0.05;state=last", "λ4 = 0.05, state = last"),
        ("variant", "layer_rule=mean_plus_std", "layer rule = mean + std"),
        ("variant", "layer=visual.transformer.resblocks.3", "layer = block 3"),
        ("variant", "", ""),
        ("layer", "visual.layer4", "layer4"),
        ("attack", "badclip", "BadCLIP"),
        ("attack", "added_later", "added later"),
    ],
)
def test_labels(column, name, shown):
    assert label(column, name) == shown


def test_greek_letters_become_formulas_in_latex_only():
    assert r"& $\lambda$4 = 1" in latex(["a", "b"], [["", "λ4 = 1"]])
    assert "λ4 = 1" in markdown(["a"], [["λ4 = 1"]])


def test_write_table(tmp_path):
    shown = pd.DataFrame({"Class_1": ["a|b", "50 % & more"], "CA": [58.205, math.nan], "n": [3, 4]})
    write_table(shown, tmp_path, "table1")
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(first) == {"table1.csv", "table1.md", "table1.tex"}
    assert first["table1.csv"] == b"Class_1,CA,n\na|b,58.20,3\n50 % & more,,4\n"
    assert "| a\\|b | 58.20 | 3 |\n| 50 % & more | - | 4 |" in first["table1.md"].decode()
    tex = first["table1.tex"].decode()
    assert tex.startswith("\\begin{tabular}{lrr}\n\\toprule\nClass\\_1 & CA & n \\\\\n\\midrule\n")
    assert "50 \\% \\& more & -- & 4 \\\\\n\\bottomrule" in tex
    write_table(shown, tmp_path, "table1")
    assert first == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


def test_an_infinite_mask_was_not_reached_in_files_and_notebooks(tmp_path):
    shown = pd.DataFrame({"weight": [1, 5], "mask L1": [math.inf, 553.444]})
    write_table(shown, tmp_path, "table2")
    assert (tmp_path / "table2.csv").read_text() == "weight,mask L1\n1,not reached\n5,553.44\n"
    with pd.option_context("display.float_format", None):
        readable()
        assert "not reached" in shown.to_html() and "553.44" in shown.to_html()


def test_the_papers_layers_are_one_line() -> None:
    shown = paper_table("table14")
    assert list(shown)[:3] == ["attack", "block 0", "block 1"] and len(shown) == 1
    assert shown.loc[0, ["block 3", "threshold", "critical"]].tolist() == [
        *("0.3423", "0.2915", "block 3, block 4, block 5")
    ]


def test_the_papers_tables_have_the_form_of_ours() -> None:
    targets = paper_table("table4")
    assert list(targets)[:3] == ["defense", "banana CA", "banana ASR"]
    assert targets.iloc[-1, :3].tolist() == ["InverTune", 57.01, 1.14]
    assert paper_table("table6") is None
