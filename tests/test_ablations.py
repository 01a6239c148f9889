"""Ablations: complete rows, one changed setting per key, and scores equal to the main chain's."""

from __future__ import annotations

import operator
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
import torch
from conftest import QUICK

from invertune import ablation_figures, ablations, figures, steps, tables, triggers
from invertune.ablation_steps import (
    found_triggers,
    inversions,
    scored,
    second_round,
    swept,
    with_value,
)
from invertune.chain import Chain, open_chain
from invertune.evaluation import evaluated
from invertune.plan import planned
from invertune.results import read_paper, to_frame
from invertune.rows import full_mask
from invertune.sections import WEIGHTS
from invertune.settings import changed, load_settings, sweep_values
from invertune.store import entries

SETTINGS = {
    **QUICK,
    "ablations": {
        "perturbation_attacks": ["blended"],
        "beta_attacks": ["blended"],
        "switch_attacks": ["blended"],
        "round_attacks": ["blended"],
        "inversion": {"lambda4": [0.05, 0.01, 0.1], "steps": [3]},
        "tuning": {"beta": [0], "images": []},
    },
}
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return open_chain(load_settings("smoke", SETTINGS), tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def table2_rows(chain: Chain) -> pd.DataFrame:
    own = chain.settings.ablations
    rows = ablations.inversion_rows(chain, own.weight_attacks, WEIGHTS, "table2")
    return to_frame(rows)


def test_own_values_come_first_and_once(chain: Chain) -> None:
    assert sweep_values(chain.settings, "inversion", "lambda4") == (0.01, 0.05, 0.1)
    assert ablations.variants(chain, "inversion", ("lambda1", "lambda4")) == [
        "lambda4=0.01",
        "lambda4=0.05",
        "lambda4=0.1",
    ]
    assert ablations.variant("lrs", (0.001, 0.003)) == "lrs=0.001/0.003"


def test_only_a_changed_setting_has_another_key(chain: Chain) -> None:
    target = steps.suspected_target(chain, "blended", 0)
    own = steps.inverted(chain, "blended", 0)
    same = with_value(chain, "inversion", "mask_init", "uniform")
    other = with_value(chain, "inversion", "mask_init", "ones")
    assert steps.inverted(same, "blended", 0, target).key == own.key
    found = inversions(chain, "blended", 0, "emb_reference")
    assert [values for _, values in found] == [("clean",), ("target_image",)]
    assert found[0][0].key == own.key != found[1][0].key
    assert [a.meta["step"] for a in entries(chain.store)].count("identification") == 1
    assert other.settings == changed(chain.settings, "inversion", "mask_init", "ones")
    assert other.settings.tuning == chain.settings.tuning


def test_a_sweep_holds_one_trigger_per_value_as_if_each_ran_alone(chain: Chain) -> None:
    stored = swept(chain, "blended", 0, "lambda4")
    found = found_triggers(chain, stored)
    target = steps.suspected_target(chain, "blended", 0)
    for (trigger, kept), value in zip(found, (0.05, 0.1), strict=True):
        other = with_value(chain, "inversion", "lambda4", value)
        alone = steps.inverted(other, "blended", 0, target)
        assert alone.key != stored.key and alone.metrics["step"] == kept["step"]
        assert kept["states"][-1]["mask_l1"] == pytest.approx(
            alone.metrics["states"][-1]["mask_l1"], rel=1e-3
        )
        mask = alone.tensors("trigger")["mask"]
        assert (mask - trigger.tensors["mask"].cpu()).abs().gt(1e-4).float().mean() < 0.01


def test_table2_has_a_row_per_attack_weight_and_metric(
    chain: Chain, table2_rows: pd.DataFrame
) -> None:
    table = table2_rows[table2_rows.paper_item == "table2"]
    assert set(table.variant) == {"lambda4=0.01", "lambda4=0.05", "lambda4=0.1"}
    assert set(table.metric) == {"inverted_asr", "mask_l1", "ssim"} and len(table) == 9
    assert table[table.metric == "ssim"].value.between(-1, 1).all()
    last = table2_rows[table2_rows.variant.str.endswith("state=last")]
    assert len(last) == 6 and (last.paper_item == "extra").all()
    shown = ablations.table2(chain, table2_rows)
    assert list(shown.variant) == ["λ4 = 0.01", "λ4 = 0.05", "λ4 = 0.1"] * 3
    assert not shown.isna().any().any()


def test_the_papers_tables_can_be_shown_beside_ours() -> None:
    mini, paper = open_chain(load_settings("mini")), read_paper()
    table2 = ablations.table2(mini, paper)
    assert table2.shape == (16, 2 + 6) and not table2.isna().any().any()
    assert ablations.table3(mini, paper).shape == (16, 3 + 6)
    names = ablations.variants(mini, "tuning", ["beta"])
    assert set(paper[paper.paper_item == "figure6"].variant) <= set(names)


def test_scores_are_the_evaluations_of_the_main_chain(chain: Chain) -> None:
    model = steps.poisoned(chain, "blended", 0)
    assert model.trigger is not None
    rates = evaluated(chain, model, model.trigger, model.key, 0).metrics
    found = scored(chain, model, [model.trigger], model.key, 0).metrics
    assert found["ca"]["1"] == rates["zeroshot.ca.1"]
    assert [found["asr"][0][k] for k in "135"] == [rates[f"zeroshot.asr.{k}"] for k in "135"]
    values = [found["ca"][k][0] for k in ("1", "3", "5", "10")]
    assert values == sorted(values) and found["ssim"][0] < 1


def test_table3_compares_the_triggers_at_every_k(chain: Chain) -> None:
    rows = to_frame(ablations.table3_rows(chain, chain.settings.ablations.perturbation_attacks))
    assert len(rows) == 4 * 2 * 4
    one = {f"trigger={name}" for name in ("inverted", "uap", "both")}
    assert set(rows.variant) == {"form=paper;trigger=inverted", *one}
    alone = with_value(chain, "tuning", "triggers", ("inverted",))
    assert steps.tuned(alone, "blended", 0).key != steps.tuned(chain, "blended", 0).key
    assert not ablations.table3(chain, rows).isna().any().any()
    assert len(ablation_figures.table3_figure(chain, rows).axes) == 2


def test_figure6_has_a_chart_for_each_kind_of_ca_and_for_asr(chain: Chain) -> None:
    rows = to_frame(ablations.tuning_rows(chain, ["blended"], ["beta"], "figure6"))
    table = rows[rows.paper_item == "figure6"]
    assert set(table.variant) == {"beta=0.5", "beta=0"} and set(table.metric) == {"ca", "asr"}
    assert list(
        ablations.switch_table(chain, rows, "tuning", ["beta"])["this profile's value"]
    ) == ["", "yes"]
    chosen, last, asr = ablation_figures.figure6(chain, rows).axes
    titles = [chart.get_title() for chart in (chosen, last, asr)]
    assert "evaluation" in titles[0] and "held-out" in titles[1] and "ASR" in titles[2]
    assert asr.lines[-1].get_xydata()[-1].tolist() == [1, 5.86]  # the paper's
    values = list(table[table.metric == "ca"].sort_values("variant").value)
    assert chosen.lines[0].get_xydata().tolist() == [[0, values[0]], [0.5, values[1]]]


def test_a_second_round_starts_from_what_the_first_left(chain: Chain) -> None:
    rows = to_frame(ablations.round_rows(chain, ["blended"]))
    assert set(rows.variant) == {"rounds=1", "rounds=2"} and len(rows) == 2 * 3
    first, again = steps.tuned(chain, "blended", 0), second_round(chain, "blended", 0)
    place = operator.itemgetter("lr", "step")
    kept = next(s for s in first.metrics["states"] if place(s) == place(first.metrics))
    assert again.meta["upstream"] == [first.key]
    accuracy = again.metrics["suspected"]["clean_accuracy"]
    assert accuracy == pytest.approx(kept["clean_accuracy"], abs=1)  # one image of 105
    assert not ablations.round_table(chain, rows).isna().any().any()
    assert len(ablation_figures.rounds_figure(chain, rows).axes) == 2


def test_updates_are_the_states_of_the_longest_inversion(chain: Chain) -> None:
    rows = to_frame(ablations.update_rows(chain))
    assert sorted(set(rows.variant)) == ["updates=1", "updates=2", "updates=3"]
    assert len(ablation_figures.updates_figure(chain, rows).axes) == 2


def test_table2_figure_has_a_panel_per_compared_weight(
    chain: Chain, table2_rows: pd.DataFrame
) -> None:
    figure = ablation_figures.table2_figure(chain, table2_rows)
    assert isinstance(figure, matplotlib.figure.Figure) and len(figure.axes) == 1
    line, never, own = figure.axes[0].lines
    assert len(line.get_xdata()) == 3 and len(never.get_xdata()) == 0
    assert own.get_label() == figures.OWN


def test_a_mask_that_never_reached_the_floor_has_no_size(
    chain: Chain, table2_rows: pd.DataFrame
) -> None:
    rows = table2_rows.copy()
    missed = (rows.metric == "mask_l1") & (rows.variant == "lambda4=0.05")
    rows.loc[missed, "value"] = full_mask(chain)
    rows.loc[(rows.metric == "mask_l1") & ~missed, "value"] = 100.0
    assert tables.frame_markdown(ablations.table2(chain, rows)).count("not reached") == 1
    lines = ablation_figures.table2_figure(chain, rows, "mask_l1").axes[0].lines
    line, open_marker, _, band = lines
    assert len(line.get_xdata()) == 2 and len(open_marker.get_xdata()) == 1
    assert open_marker.get_fillstyle() == "none" and "not reached" in band.get_label()
    assert open_marker.get_ydata()[0] > band.get_ydata()[0]  # parts of the chart's height


def test_perturbation_shares_come_from_step_1(chain: Chain) -> None:
    frame, rows = ablations.perturbation_table(chain), to_frame(ablations.perturbation_rows(chain))
    kinds = chain.settings.identification.kinds
    assert len(frame) == 3 * len(kinds) and len(set(frame["perturbation"])) == len(kinds)
    target = rows[rows.variant.str.startswith(f"class={chain.settings.target};")]
    assert sorted(target.value) == pytest.approx(sorted(frame["to the target (%)"]))
    found = set(zip(rows.attack, rows.variant, strict=True))
    assert len(found) == len(rows)


def test_a_trigger_read_from_a_sweep_composes_as_equation_2(chain: Chain) -> None:
    trigger, _ = found_triggers(chain, swept(chain, "blended", 0, "lambda4"))[0]
    images = torch.rand(2, 3, 64, 64)
    mask, pattern = trigger.tensors["mask"], trigger.tensors["pattern"]
    expected = triggers.compose(images, mask, pattern)
    torch.testing.assert_close(triggers.apply(trigger, images), expected)


def test_the_plan_counts_every_changed_value_once() -> None:
    work = {w.step: w.total for w in planned(load_settings("mini")) if w.notebook == "07_ablations"}
    assert work["loss weights"] == 6 * 12 * 200 * 64
    own = load_settings("mini").tuning
    tuning = own.steps * own.batch * len(own.lrs)
    assert work["Table 3"] == 6 * 3 * tuning and work["beta"] == 5 * tuning
