"""Notebook 05's module: every defense in every table, costs, rebound, and stable keys."""

import pandas as pd
import pytest
from conftest import QUICK

from invertune import comparison, defenses, reports, steps, tables
from invertune.chain import Chain, open_chain
from invertune.figures import DEFENSE_COLORS, rate_text
from invertune.plan import invertune_passes
from invertune.results import read_paper, to_frame
from invertune.settings import load_settings

SETTINGS = {
    **QUICK,
    "baselines": {"names": ["ft", "par"], "ft": {"lrs": [0.0002, 0.0001]}},
    "rebound": {"attacks": ["blended"]},
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return open_chain(load_settings("smoke", SETTINGS), tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def rows(chain: Chain) -> pd.DataFrame:
    found = reports.attack_rows(chain) + comparison.comparison_rows(chain)
    return to_frame(found + comparison.rebound_rows(chain))


def test_table_1_has_a_line_per_task_metric_and_defense(chain: Chain, rows: pd.DataFrame) -> None:
    table = comparison.table1(chain, rows)
    missed = tables.gate_missed(rows, chain.settings.attacks)
    assert list(table.columns) == ["task", "metric", "defense", "Blended" + "*" * bool(missed)]
    assert list(table.defense) == ["No defense", "FT", "PAR", "InverTune"] * 4
    others = [rows.assign(value=0.0, **{name: "badnet"}) for name in ("backbone", "attack")]
    pd.testing.assert_frame_equal(comparison.table1(chain, pd.concat([rows, *others])), table)
    assert comparison.table1(chain, read_paper()).shape == (24, 4)
    shifted = rows.assign(seed="1", value=rows.value + 2)
    several = comparison.table1(chain, pd.concat([rows, shifted]))
    first = table.iloc[0, 3]
    assert several.iloc[0, 4] == f"{first + 1:.2f} ({first:.2f}-{first + 2:.2f})"
    assert (several.seeds == 2).all()


def test_the_summary_names_what_each_defense_costs(chain: Chain, rows: pd.DataFrame) -> None:
    paper = read_paper()
    table = comparison.summary_table(chain, rows, paper).set_index("defense")
    own = chain.settings
    assert table.loc["FT", "images available"] == own.baselines.pairs
    assert table.loc["InverTune", "images available"] == own.data.inversion_images
    tried = defenses.baseline(chain, "ft", "blended", 0).metrics["tried"]
    runs = sum(accuracy is not None for _, accuracy in tried)
    assert table.loc["FT", "images seen"] == runs * own.baselines.ft.steps * own.baselines.ft.batch
    tuned, tuning = steps.tuned(chain, "blended", 0).metrics, own.tuning
    rates = {state["lr"] for state in tuned["states"]}
    before = invertune_passes(own) | {"tuning": len(rates) * tuning.steps * tuning.batch}
    assert table.loc["InverTune", "images seen"] == sum(before.values())
    made = (steps.identified, steps.inverted, steps.tuned)
    seconds = sum(step(chain, "blended", 0).meta["seconds"] for step in made)
    assert table.loc["InverTune", "seconds"] == pytest.approx(seconds)
    assert table.loc["InverTune", "Zero-shot ASR (paper)"] == 0.14  # on Blended, as here
    assert (table["peak MB"] > 100).all() and table.notna().all().all()


def test_the_rate_table_shows_every_rate_and_what_was_not_run(chain: Chain) -> None:
    table = comparison.learning_rate_table(chain).set_index("defense")
    tried = dict(defenses.baseline(chain, "ft", "blended", 0).metrics["tried"])
    assert list(tried) == [0.0002, 0.0001] and tried[0.0002] is not None
    shown = {lr: table.loc["FT", f"held-out CA at {lr:g}"] for lr in tried}
    assert all(pd.isna(shown[lr]) if ca is None else shown[lr] == ca for lr, ca in tried.items())


def test_every_defense_rebounds_and_is_drawn(chain: Chain, rows: pd.DataFrame) -> None:
    table = comparison.rebound_table(chain, rows)
    assert list(table.defense) == 2 * ["No defense", "FT", "PAR", "InverTune"]
    assert list(table)[2:] == [f"Blended {m}" for m in ("CA", "ASR", "rebound ASR", "rebound CA")]
    assert table.notna().all().all()
    heatmaps = comparison.table1_figure(chain, rows).axes
    [ft, *_] = tables.select(rows, defense="ft", metric="asr", k="1", variant="").value
    assert len(heatmaps) == 4 and heatmaps[0].texts[0].get_text() == rate_text(ft)
    both = pd.concat([rows, rows.assign(seed="1", value=100.0)])
    cell = comparison.table1_figure(chain, both).axes[0].texts[0].get_text()
    assert cell == f"{rate_text((ft + 100) / 2)}\n{rate_text(ft)}-100"
    bars = comparison.rebound_figure(chain, rows).axes[0].patches
    assert len(bars) == 2 * 4 and {"ft", "par", "invertune"} <= set(DEFENSE_COLORS)
    before = defenses.defended(chain, "ft", "blended", 0)
    after = defenses.rebound_model(chain, "ft", "blended", 0)
    assert before.key != after.key and before.trigger is not None


def test_a_baseline_keeps_its_key_when_others_are_left_out(chain: Chain) -> None:
    alone = load_settings(
        "smoke", {**SETTINGS, "baselines": {**SETTINGS["baselines"], "names": ["ft"]}}
    )
    key = defenses.baseline(chain, "ft", "blended", 0).key
    assert defenses.baseline(Chain(alone, chain.store), "ft", "blended", 0).key == key
