"""The tidy table: what was measured, byte for byte; files that are not it are refused."""

from __future__ import annotations

import csv
import io
import math
import re
import threading

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invertune.metrics import Rate
from invertune.results import (
    COLUMNS,
    IDENTITY,
    METRICS,
    ResultsError,
    cell_text,
    natural_order,
    publish,
    read_results,
    row,
    variant_text,
    write_rows,
    write_runs,
)


def one(**changes: object) -> dict[str, str]:
    cell = dict(profile="mini", paper_item="table1", backbone="RN50", attack="badnet", k=1, seed=0)
    cell |= dict(target="mushroom", defense="none", task="zeroshot", metric="asr", value=87.73)
    return row(**cell | changes)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.csv"


def test_columns_are_the_contract():
    assert ",".join(COLUMNS) == (
        "profile,paper_item,backbone,attack,target,defense,task,metric,k,"
        "variant,seed,value,unit,n,ci_low,ci_high,key"
    )
    assert set(COLUMNS) - set(IDENTITY) == {"value", "unit", "n", "ci_low", "ci_high", "key"}


def test_row_fills_what_is_not_given():
    record = one()
    assert tuple(record) == COLUMNS
    assert record["unit"] == "percent" and record["value"] == "87.73" and record["k"] == "1"
    assert [c for c in COLUMNS if not record[c]] == ["variant", "n", "ci_low", "ci_high", "key"]


@given(st.floats(-1e6, 1e6))
def test_cell_text_is_short_and_close(value):
    text = cell_text(value)
    assert re.fullmatch(r"-?\d+(\.\d{1,6})?", text) and text != "-0"
    assert abs(float(text) - value) <= 5.0001e-7
    assert cell_text(float(text)) == text


def test_cell_text_of_other_types():
    values = (None, True, np.int64(7), np.float32(0.5), "a b", 1e-7, -1e-9, 100.0)
    assert [*map(cell_text, values)] == ["", "1", "7", "0.5", "a b", "0", "0", "100"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_must_be_finite(value):
    with pytest.raises(ResultsError, match="is not a result"):
        one(value=value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "accuracy"}, "metric is 'accuracy'; it must be one of ca, asr"),
        ({"paper_item": "table16"}, "paper_item is 'table16'"),
        ({"paper_item": "figure5a"}, "paper_item is 'figure5a'"),
        ({"backbone": "ViT-B/16"}, "backbone is 'ViT-B/16'; it must be RN50"),
        ({"profile": "Mini"}, "profile is 'Mini'; it must be a profile's name"),
        ({"task": "imagenet"}, "task is 'imagenet'"),
        ({"k": 2}, "k is '2'; it must be 1, 3, 5, 10 or empty"),
        ({"variant": "lambda4"}, "variant is 'lambda4'; it must be name=value"),
        ({"value": 101.0}, "asr is 101; a rate lies between 0 and 100"),
        ({"ci_low": 1.0}, "both ends are needed"),
        ({"ci_low": 88.0, "ci_high": 90.0}, "around 87.73"),
        ({"colour": "red"}, "unknown results column 'colour'"),
        ({"unit": "percent"}, "unknown results column 'unit'"),
    ],
)
def test_row_refuses_in_one_line(changes, message):
    with pytest.raises(ResultsError, match=re.escape(message)) as caught:
        one(**changes)
    assert "\n" not in str(caught.value)


def test_increase_may_be_negative_and_rates_may_not():
    assert one(metric="increase", value=-0.02)["unit"] == "points"
    with pytest.raises(ResultsError):
        one(value=-0.02)


def test_variant_is_sorted_and_short():
    assert variant_text({"lambda4": 0.050, "class": "agaric"}) == "class=agaric;lambda4=0.05"
    assert one(variant={"beta": 0.25})["variant"] == "beta=0.25"


def test_a_rate_gives_the_interval():
    record = row(value=Rate(50.0, 10, 23.7, 76.3), profile="mini", paper_item="extra", metric="ca")
    assert [record[c] for c in ("value", "n", "ci_low", "ci_high")] == ["50", "10", "23.7", "76.3"]


def test_same_rows_twice_give_equal_bytes_in_any_order(tmp_path):
    rows = [one(attack=a, seed=s, value=50 + s) for a in ("sig", "badnet") for s in (10, 2)]
    write_rows(rows, tmp_path / "a" / "results.csv")
    write_rows(rows[2:], tmp_path / "b" / "results.csv")
    write_rows(reversed(rows), tmp_path / "b" / "results.csv")
    a, b = ((tmp_path / x / "results.csv").read_bytes() for x in "ab")
    assert a == b and b"\r" not in a
    written = list(csv.DictReader(io.StringIO(a.decode())))
    order = " ".join(r["attack"] + r["seed"] for r in written)
    assert order == "badnet2 badnet10 sig2 sig10"


def test_merge_replaces_equal_identity_and_keeps_the_rest(path):
    write_rows([one(), one(seed=1)], path)
    table = write_rows([one(value=3.0, key="abc")], path)
    assert list(table["value"]) == [3.0, 87.73] and list(table["key"]) == ["abc", ""]
    pd.testing.assert_frame_equal(table, read_results(path, "mini"))


def test_two_paper_items_are_two_rows(path):
    table = write_rows([one(), one(paper_item="figure5")], path)
    assert list(table["paper_item"]) == ["figure5", "table1"]


def test_contradictions_and_mixed_profiles_are_refused(path):
    with pytest.raises(ResultsError, match=r"two values for one number .*: 87.73 and 1"):
        write_rows([one(), one(value=1.0)], path)
    with pytest.raises(ResultsError, match="several profiles"):
        write_rows([one(), one(profile="smoke")], path)
    assert not path.exists()
    write_rows([one(), one()], path)
    with pytest.raises(ResultsError, match="profile mini in a table of profile paper"):
        write_rows([one(profile="paper")], path)
    with pytest.raises(ResultsError, match="row 2: profile mini in a table of profile smoke"):
        read_results(path, "smoke")


def test_read_types(path):
    write_rows([one(n=50_000, ci_low=87.0, ci_high=88.0), one(seed=1)], path)
    table = read_results(path)
    assert table["value"].dtype == float and table["n"].dtype == "Int64"
    assert list(table["attack"]) == ["badnet"] * 2 and list(table["defense"]) == ["none"] * 2
    assert table["n"].isna().tolist() == [False, True]
    assert table["ci_low"][0] == 87.0 and math.isnan(table["ci_low"][1])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("backbone,attack", "backbone,attacker", "'attacker' is unknown"),
        ("backbone,attack", "attack,backbone", "missing or out of order"),
        (",asr,", ",success,", "row 2: metric is 'success'"),
        (",percent,", ",points,", "row 2: unit of asr is 'points'; it must be 'percent'"),
        (",87.73,", ",high,", "row 2: value is 'high'; it must be a finite number"),
        (",87.73,", ",nan,", "row 2: value is 'nan'"),
        (",87.73,", ",87.73,1,", "row 2: 18 cells, not 17"),
    ],
)
def test_a_file_edited_by_hand_is_refused(path, old, new, message):
    write_rows([one()], path)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ResultsError, match=re.escape(message)) as caught:
        read_results(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_missing_and_empty_files_are_refused(path):
    with pytest.raises(ResultsError, match="no results at"):
        read_results(path)
    path.write_text("")
    with pytest.raises(ResultsError, match="missing or out of order"):
        read_results(path)


def test_a_failed_write_leaves_the_old_file(path, tmp_path, monkeypatch):
    write_rows([one()], path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_rows([one(value=1.0)], path)
    assert path.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"results.csv", ".results.csv.lock"}


def test_writers_at_the_same_time_lose_no_row(path):
    threads = [threading.Thread(target=write_rows, args=([one(seed=s)], path)) for s in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_results(path)) == 12


def test_runs_keep_one_row_per_key(path):
    run = dict(key="b1", step="invert", seconds=1.25, peak_mb=80, device="cpu")
    run |= dict(versions="torch 2.15.0", commit="abc")
    write_runs([run, run | {"key": "a2"}], path)
    write_runs([run | {"seconds": 2.5, "settings": {}}], path)
    table = pd.read_csv(path)
    assert list(table["key"]) == ["a2", "b1"] and list(table["seconds"]) == [1.25, 2.5]
    with pytest.raises(ResultsError, match="'step' is unknown"):
        read_results(path)


def test_publish_takes_the_reported_seeds_of_mini_only(tmp_path):
    source = tmp_path / "results" / "mini" / "results.csv"
    write_rows([one(seed=0)], source)
    with pytest.raises(ResultsError, match="rows of the development seed 0 only"):
        publish("mini", tmp_path)
    write_rows([one(seed=s) for s in (1, 2, 3)], source)
    publish("mini", tmp_path)
    published = read_results(tmp_path / "expected" / "mini.csv")
    assert list(published.seed) == ["1", "2", "3"]
    source.unlink()
    again = [one(seed=2, value=50), one(seed=3, value=60, key="other"), one(seed=3, metric="ca")]
    write_rows(again, source)
    publish("mini", tmp_path)
    published = read_results(tmp_path / "expected" / "mini.csv").sort_values(["metric", "seed"])
    assert list(published.metric) == ["asr", "asr", "asr", "ca"]
    # What was run once stays, unless it comes from another artifact.
    assert list(published.value[:3]) == [87.73, 87.73, 60]
    with pytest.raises(ResultsError, match="mini and scenes224 are published, not paper"):
        publish("paper", tmp_path)


def test_natural_order():
    layers = [f"layer=visual.transformer.resblocks.{i}" for i in range(12)]
    assert sorted(layers, key=lambda t: natural_order("variant", t)) == layers
    weights = ["lambda4=0.005", "lambda4=0.01", "lambda4=0.05", "lambda4=0.1"]
    assert sorted(reversed(weights), key=lambda t: natural_order("variant", t)) == weights
    attacks = sorted(["badclip", "zzz", "none", "badnet"], key=lambda t: natural_order("attack", t))
    assert attacks == ["none", "badnet", "badclip", "zzz"]


def test_every_metric_has_a_unit():
    units = set(["percent", "points", "images", "rank", "l1", "ratio", "flag", "neurons", "passes"])
    assert set(METRICS.values()) == units


def test_a_new_value_removes_the_same_number_of_an_earlier_run_elsewhere(path):
    write_rows([one(paper_item=item, value=80) for item in ("table1", "figure5")], path)
    after = write_rows([one(paper_item="table1", value=90)], path)
    assert list(after.paper_item) == ["table1"] and list(after.value) == [90]
    again = write_rows([one(paper_item="figure5", value=90)], path)
    assert list(again.paper_item) == ["figure5", "table1"]
