"""The page of a profile: what it shows of what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from invertune import gallery, results
from invertune.settings import load_settings


def row(defense: str, seed: int) -> dict[str, str]:
    about = {"profile": "mini", "paper_item": "table1", "backbone": "RN50", "attack": "sig"}
    about |= {"target": "mushroom", "task": "zeroshot", "k": "1", "defense": defense, "seed": seed}
    return results.row(metric="asr", value=50.0, **about)


def test_the_page_names_what_is_not_run_and_the_seeds_of_what_is(tmp_path: Path) -> None:
    (tmp_path / "table1.csv").touch()
    (tmp_path / "table1.md").write_text("| a |\n| --- |\n| 50.00 |\n")
    (tmp_path / "table6.csv").touch()
    (tmp_path / "table6.md").write_text("| a |\n" * 60)
    (tmp_path / "rebound.pdf").touch()
    Image.new("L", (1320, 4)).save(tmp_path / "rebound.png")
    rows = [row("none", 4), row("none", 5), row("ft", 5)]
    page = gallery.page("mini", results.to_frame(rows), tmp_path)
    parts = {part.split(":")[0]: part for part in page.split("### ")[1:]}
    assert "seed 5 · [CSV](table1.csv)" in parts["Table 1"] and "| 50.00 |" in parts["Table 1"]
    assert "[58 rows](table6.md)" in parts["Table 6"] and "| a |" not in parts["Table 6"]
    assert "not there yet" in parts["Figure 5(a)"]
    assert "| Zero-shot | ASR | PAR | 6.03 |" in parts["Table 1"]  # the paper's, folded
    assert "6.03" not in page.replace(parts["Table 1"], "") and "<details>" not in parts["Table 4"]
    assert page.count("<img") == 1
    assert '<img src="rebound.png" width="660" alt="rebound">' in page
    assert "05_baselines.ipynb), seed 5 · [PDF](rebound.pdf)" in page
    untested = page.split("<details>")[1].split("</details>")[0]
    assert "UNTESTED" in untested and "no row with" in untested
    assert "no row with" not in page.replace(untested, "")
    Image.new("L", (512, 4)).save(tmp_path / "figure2.png", dpi=(100, 100))  # as notebooks show it
    page = gallery.page("mini", results.to_frame(rows), tmp_path)
    assert '<img src="figure2.png" width="512" alt="figure2">' in page


def test_a_run_shows_its_own_seeds(tmp_path: Path) -> None:
    (tmp_path / "figures" / "mini").mkdir(parents=True)
    (tmp_path / "figures" / "mini" / "table1.csv").touch()
    rows = [row("none", 4), row("none", 5)]
    results.write_rows(rows, tmp_path / "results" / "mini" / "results.csv")
    path = gallery.write(load_settings("mini", {"seeds": [5]}), tmp_path)
    assert path == tmp_path / "figures" / "mini" / "README.md"
    page = path.read_text()
    assert "05_baselines.ipynb), seed 5 · " in page and "overridden" not in page


def test_a_run_shows_only_what_it_drew(tmp_path: Path) -> None:
    figures, notebooks = tmp_path / "figures" / "mini", tmp_path / "results" / "mini" / "notebooks"
    figures.mkdir(parents=True)
    for name in ("table1.csv", "table12.csv"):
        (figures / name).touch()
    results.write_rows([row("none", 5)], tmp_path / "results" / "mini" / "results.csv")
    notebooks.mkdir()
    (notebooks / "05_baselines.done.json").write_text('{"figures": {"table1.csv": "0"}}')
    settings = load_settings("mini", {"seeds": [5], "tuning": {"beta": 0.25}})
    page = gallery.write(settings, tmp_path).read_text()
    assert "(table1.csv)" in page and "(table12.csv)" not in page
    assert "mini.yml), some of them overridden, on seed 5" in page


def test_a_page_shows_figures_of_its_own_seeds_under_theirs(tmp_path: Path) -> None:
    figures, notebooks = tmp_path / "figures" / "mini", tmp_path / "results" / "mini" / "notebooks"
    figures.mkdir(parents=True)
    notebooks.mkdir(parents=True)
    seeds_of = {"figure1": ["7", "8"], "table1": ["7", "8", "9"], "generalization": ["7"]}
    for name, seeds in seeds_of.items():
        (figures / f"{name}.csv").touch()
        stamp = {"figures": {f"{name}.csv": "0"}, "seeds": seeds}
        (notebooks / f"{name}.done.json").write_text(json.dumps(stamp))
    rows = [row("none", seed) for seed in (7, 8, 9)]
    results.write_rows(rows, tmp_path / "results" / "mini" / "results.csv")

    def page(*seeds: int) -> str:
        return gallery.write(load_settings("mini", {"seeds": seeds}), tmp_path).read_text()

    parts = {part.split(":")[0]: part for part in page(7, 8).split("### ")[1:]}
    assert "05_baselines.ipynb): not run on these seeds" in parts["Table 1"]
    assert "(figure1.csv)" in parts["Figure 1"]
    assert "06_generalization.ipynb), seed 7 · [CSV](generalization.csv)" in page(7, 8)
    assert "05_baselines.ipynb), seeds 7, 8, 9 · [CSV](table1.csv)" in page(7, 8, 9)
    before = page(8)
    assert "[CSV]" not in before
    with pytest.raises(results.ResultsError, match="no results on seed 99"):
        page(99)
    assert (figures / "README.md").read_text() == before


def test_on_the_papers_data_every_number_stands_beside_its_own(tmp_path: Path) -> None:
    (tmp_path / "figures" / "paper").mkdir(parents=True)
    (tmp_path / "figures" / "paper" / "table1.csv").touch()
    near = {**row("none", 0), "profile": "paper", "value": "80"}  # the paper: 82.57
    results.write_rows([near], tmp_path / "results" / "paper" / "results.csv")
    path = gallery.write(load_settings("paper", {"seeds": [0]}), tmp_path)
    assert "the paper's numbers: 143 MISSING, 1 NEAR · " in path.read_text()
    numbers = pd.read_csv(path.with_name("paper_numbers.csv"))
    assert numbers[numbers.verdict == "NEAR"].paper.tolist() == [82.57]


def test_seeds_in_words() -> None:
    assert gallery.named_seeds(["10", 9, "9"]) == "seeds 9, 10"
    assert gallery.named_seeds([4]) == "seed 4"
