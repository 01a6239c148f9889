"""Every table and figure of the paper has a notebook, its files, and a claim where it makes one."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from PIL import Image

from invertune.claims import load_claims
from invertune.reports import IDENTIFICATION_TABLES, LAYER_TABLES
from invertune.sections import BACKBONES, Settings
from invertune.settings import load_settings
from invertune.weights import locked_hash

ROOT = Path(__file__).resolve().parents[1]
STARTED_S = time.time()  # when tests are collected: before any notebook of this session runs
ITEMS = [f"figure{n}" for n in ("1", "2", "3", "4", "5a", "5b", "6", "7")]
ITEMS += [f"table{n}" for n in range(1, 16)]
SUFFIXES = {"figure": ("png", "pdf"), "table": ("csv", "md", "tex")}
MAP = yaml.safe_load((ROOT / "expected" / "items.yml").read_text())
NOTEBOOKS: dict[str, list[str]] = MAP["notebooks"]

NUMBER = r"\d+\(?[ab]?\)?"
NAMED = re.compile(rf"(Table|Figure)s? ({NUMBER}(?:(?:-|, | and ){NUMBER})*)")


def named(text: str) -> set[str]:
    """The items that a text names: "Figures 3-5(a) and 7" is figure3, 4, 5a and 7."""
    found: set[str] = set()
    for kind, numbers in NAMED.findall(text):
        for part in re.split(", | and ", re.sub("[()]", "", numbers)):
            ends = [ITEMS.index(f"{kind.lower()}{number}") for number in part.split("-")]
            found |= set(ITEMS[ends[0] : ends[-1] + 1])
    return found


def source(name: str, kind: str) -> str:
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == kind)


def left_out(settings: Settings) -> set[str]:
    """The tables of attacks and backbones that a profile does not run."""
    run = {settings.backbone, *settings.generalization.backbones}
    attacks = {
        IDENTIFICATION_TABLES[a] for a in set(IDENTIFICATION_TABLES) - {*settings.attacks.names}
    }
    return attacks | {LAYER_TABLES[backbone] for backbone in set(BACKBONES) - run}


def problems(folder: Path, items: Iterable[str], since_s: float = 0) -> list[str]:
    """Files of the items that are missing, older than ``since_s``, or hold nothing."""
    found = []
    for item in items:
        for suffix in SUFFIXES[item.rstrip("0123456789ab")]:
            path = folder / f"{item}.{suffix}"
            if not path.is_file():
                found.append(f"{path.name} is missing")
            elif path.stat().st_mtime < since_s:
                found.append(f"{path.name} is of an earlier run")
            elif not holds_something(path):
                found.append(f"{path.name} is empty")
    return found


def holds_something(path: Path) -> bool:
    """Whether a table has a line with a number, and a figure has more than one color."""
    if path.suffix == ".csv":
        cells = pd.read_csv(path).stack()  # a column may hold numbers and words
        return bool(pd.to_numeric(cells, errors="coerce").notna().any())
    if path.suffix == ".png":
        with Image.open(path) as image:
            darkest, lightest = image.convert("L").getextrema()
            return darkest < lightest
    return path.stat().st_size > 100


def test_the_map_gives_every_item_to_one_notebook() -> None:
    given = [item for items in NOTEBOOKS.values() for item in items]
    assert sorted(given) == sorted(ITEMS)
    assert sorted(NOTEBOOKS) == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_and_readme_name_the_items(name: str) -> None:
    said = re.search(r"\*\*Regenerates\.\*\*.*?(?:\n\n|$)", source(name, "markdown"), re.DOTALL)
    lines = (ROOT / "README.md").read_text().splitlines()
    [line] = [line for line in lines if f"](notebooks/{name}.ipynb)" in line]
    assert said and named(said[0]) >= set(NOTEBOOKS[name]) <= named(line)


def test_every_item_has_a_claim_or_is_listed_without() -> None:
    claimed = set().union(*(named(claim.source) for claim in load_claims()))
    assert claimed.isdisjoint(MAP["without_claim"])
    assert claimed | set(MAP["without_claim"]) == set(ITEMS)


def test_every_claim_is_judged_in_a_notebook() -> None:
    code = "".join(source(name, "code") for name in NOTEBOOKS)
    judged = re.findall(r'load_claims\("(\w+)"\)', code)
    assert sorted(judged) == sorted({claim.id.split(".")[0] for claim in load_claims()})


def test_the_papers_numbers_of_every_table_are_here() -> None:
    paper = set(pd.read_csv(ROOT / "expected" / "paper.csv").paper_item)
    assert {item for item in ITEMS if item.startswith("table")} <= paper <= set(ITEMS)


@pytest.mark.parametrize("profile", ["mini", "paper"])
def test_full_profiles_leave_nothing_out(profile: str) -> None:
    assert left_out(load_settings(profile)) == set()


def test_mini_has_every_file_and_its_page_shows_all() -> None:
    folder = ROOT / "figures" / "mini"
    assert problems(folder, ITEMS) == []
    assert list(MAP["titles"]) == ITEMS
    stems = {path.stem for path in folder.iterdir()} - {"README"}
    beyond = [name for titles in MAP["beyond"].values() for name in titles]
    assert stems == {*MAP["titles"], *beyond} and list(MAP["beyond"]) == list(NOTEBOOKS)


@pytest.mark.after_notebooks
def test_smoke_leaves_every_file(request: pytest.FixtureRequest) -> None:
    ran = {i.path.stem for i in request.session.items if i.path.suffix == ".ipynb"}
    if ran != set(NOTEBOOKS):
        pytest.skip("looks at what all notebooks left in the same session: ./run_tests.sh")
    settings = load_settings("smoke")
    absent = {LAYER_TABLES[b] for b in BACKBONES if locked_hash(b) is None} | left_out(settings)
    items = [item for item in ITEMS if item not in absent]
    assert problems(ROOT / "figures" / "smoke", items, STARTED_S) == []


def test_a_missing_old_or_empty_file_is_found(tmp_path: Path) -> None:
    for suffix, text in (("csv", "attack,ASR\nSIG,\n"), ("tex", "x" * 101)):
        (tmp_path / f"table1.{suffix}").write_text(text)
    expected = ["table1.csv is empty", "table1.md is missing"]
    assert problems(tmp_path, ["table1"]) == expected
    assert "table1.tex is of an earlier run" in problems(tmp_path, ["table1"], time.time() + 9)


def test_texts_name_items() -> None:
    assert named("section 3.1, Figures 3-5(a) and 7, Table 1 (row 12)") == {
        *("figure3", "figure4", "figure5a", "figure7", "table1")
    }
