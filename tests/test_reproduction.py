"""A run beside the published results: what is compared, and what counts as reproduced."""

from __future__ import annotations

from pathlib import Path

import pytest

from invertune import results
from invertune.__main__ import main
from invertune.reproduction import compare
from invertune.results import ResultsError, read_results

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = read_results(ROOT / "expected" / "mini.csv", "mini")
SEED = min(PUBLISHED.seed, key=lambda seed: (not seed, seed))


def write(root: Path, changes: dict[str, str], seed: str = SEED) -> None:
    """A run of one seed in ``root``: the published rows, but InverTune's ASR as in ``changes``."""
    rows = [
        {k: "" if v != v else results.cell_text(v) for k, v in row.items()}
        for row in PUBLISHED.astype(object).to_dict("records")
        if row["seed"] == SEED
    ]
    for row in rows:
        if (row["paper_item"], row["defense"], row["metric"]) == ("table1", "invertune", "asr"):
            row["value"] = changes.get(row["attack"], row["value"])
            row["ci_low"] = row["ci_high"] = ""
        row["seed"] = seed
    results.write_rows(rows, root / "results" / "mini" / "results.csv")
    (root / "expected").mkdir()
    (root / "expected" / "mini.csv").write_bytes((ROOT / "expected" / "mini.csv").read_bytes())


def test_the_published_run_is_reproduced(tmp_path: Path) -> None:
    write(tmp_path, {})
    text, same = compare("mini", tmp_path)
    assert same and f"published results, seeds {SEED}" in text and "| item |" not in text
    [numbers] = [line for line in text.splitlines() if "numbers are equal" in line]
    assert numbers.split()[0] == numbers.split()[2] and "claims have the published" in text


def test_a_seed_of_which_only_a_part_is_published_counts_with_that_part(tmp_path: Path) -> None:
    write(tmp_path, {})
    path = tmp_path / "results" / "mini" / "results.csv"
    rows = [row for row in path.read_text().splitlines() if row.startswith("mini,table4,")]
    other = [row.replace(f",{SEED},", ",8,").replace("badclip", "sig") for row in rows]
    path.write_text("\n".join([path.read_text().rstrip("\n"), *other]) + "\n")
    assert compare("mini", tmp_path)[1]


def test_another_verdict_and_another_number_are_named(tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys(("badnet", "blended", "sig"), "99.5"))
    text, same = compare("mini", tmp_path)
    assert not same
    assert "| table1.asr_lowest_zeroshot | FAILS | HOLDS |" in text
    [line] = [line for line in text.splitlines() if line.startswith("| table1 | asr |")]
    assert line.split("|")[5].strip() == "6" and ", mushroom, RN50, invertune, " in line


def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, {}, seed="12345")
    with pytest.raises(ResultsError, match=r"the run has seeds 12345, but seeds .* are published"):
        compare("mini", tmp_path)
    assert main(["compare", "smoke"]) == 2
    error = capsys.readouterr().err
    assert "no results of smoke are published; there are: mini, scenes224" in error


def test_without_a_whole_claim_numbers_are_compared(tmp_path: Path) -> None:
    write(tmp_path, {})
    few = next(row for row in PUBLISHED.itertuples() if row.seed == SEED)
    path = tmp_path / "results" / "mini" / "results.csv"
    lines = (ROOT / "expected" / "mini.csv").read_text().splitlines()
    path.write_text("\n".join([lines[0], *[x for x in lines if few.key in x][:1]]) + "\n")
    text, same = compare("mini", tmp_path)
    assert same and "No claim has all its rows" in text and "1 of 1 numbers are equal" in text
