"""Claims: the shipped file is sound, the paper's own numbers pass it, and verdicts follow rules."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from invertune.claims import CLAIMS, ClaimError, decide, judge, load_claims, parse_claim, shown
from invertune.results import read_paper, row, to_frame

PAPER = read_paper()
RAW = {
    "id": "t.x",
    "text": "words",
    "source": "Table 1",
    "at_most": 2,
    "filter": {"metric": "asr", "defense": "invertune", "attack": ["badnet", "sig"]},
    "mean_over": ["attack"],
}
BARE = {key: value for key, value in RAW.items() if key not in ("at_most", "mean_over")}
SOUND = {(1, attack, "invertune"): 1.0 for attack in ("badnet", "sig")}


def ranked(defenses: list[str], **relation: object) -> dict:
    """A claim on the rank of one of ``defenses`` under one attack."""
    filters = {"metric": "asr", "attack": "badnet", "defense": defenses}
    return BARE | {"filter": filters} | relation


def table(numbers: dict[tuple[int, str, str], float], **changes: object):
    """Rows from {(seed, attack, defense): ASR in percent}."""
    same = {"profile": "mini", "paper_item": "table1", "metric": "asr", **changes}
    cells = [dict(seed=s, attack=a, defense=d, value=v) for (s, a, d), v in numbers.items()]
    return to_frame([row(**same | cell) for cell in cells])  # type: ignore[arg-type]


def judged(raw: dict, results) -> dict:
    return judge([parse_claim(raw)], results).iloc[0].to_dict()


def test_shipped_claims_are_complete():
    claims = load_claims()
    raw = yaml.safe_load(CLAIMS.read_text())
    assert len(claims) == len(raw) == len({claim.id for claim in claims})
    groups = {"attacks", "identification", "inversion", "tuning", "table1"}
    groups |= {"generalization", "ablations"}
    assert {claim.id.split(".")[0] for claim in claims} == groups
    assert all(claim.text and claim.source for claim in claims)
    assert len(load_claims("table1")) == 6
    with pytest.raises(ClaimError, match="no claim of group 'tabel1'"):
        load_claims("tabel1")


def test_a_page_shows_the_verdict_and_no_empty_column():
    numbers = {(1, "badnet", "ft"): 9.0, (1, "badnet", "par"): 5.0}
    raw = ranked(["ft", "par"], lowest={"defense": "par"})
    found = shown(judge([parse_claim(raw)], table(numbers)))
    assert list(found.required) == ["lowest"] and {"id", "values", "verdict"} <= set(found.columns)
    smoke = shown(judge([parse_claim(raw)], table(numbers, profile="smoke")))
    assert list(smoke.columns) == ["id", "claim", "source", "required", "verdict", "note"]


def test_the_papers_own_numbers_pass_and_what_it_does_not_give_is_untested():
    verdicts = judge(load_claims(), PAPER).set_index("id")["verdict"].to_dict()
    given = """attacks.asr identification.target_first tuning.final_asr tuning.layer4_first
        tuning.layer4_selected table1.asr_lowest_zeroshot table1.asr_lowest_retrieval
        table1.asr_lowest_columns table1.ca_first_or_second generalization.target_asr
        generalization.target_asr_lowest generalization.target_ca_highest
        generalization.target_vulnerable generalization.backbone_asr
        generalization.backbone_asr_lowest generalization.backbone_ca
        generalization.rn101_layer4 ablations.lambda1_low ablations.lambda2_sweet_spot
        ablations.lambda2_high ablations.lambda3_best ablations.lambda3_high
        ablations.lambda4_high ablations.inversion_needed ablations.perturbation_fails
        ablations.inversion_keeps_accuracy ablations.inversion_top10 ablations.beta_zero"""
    tested = {name: verdict for name, verdict in verdicts.items() if verdict != "UNTESTED"}
    assert tested == dict.fromkeys(given.split(), "HOLDS")


def test_the_column_counts_of_table_1_are_exact():
    """10 of 12 and 11 of 12 are the paper's counts: one more must fail."""
    for name, quota in (("table1.asr_lowest_columns", 10), ("table1.ca_first_or_second", 11)):
        (raw,) = (c for c in yaml.safe_load(CLAIMS.read_text()) if c["id"] == name)
        assert raw["in_at_least"] == quota
        assert judged(raw, PAPER)["verdict"] == "HOLDS"
        assert judged(raw | {"in_at_least": quota + 1}, PAPER)["verdict"] == "FAILS"


def test_table_1_losses_are_the_bounds():
    """2.60 and 1.53 points follow from the paper's means."""
    for task, bound in (("zeroshot", 2.60), ("retrieval", 1.53)):
        rows = PAPER.query(f"paper_item == 'table1' and metric == 'ca' and task == '{task}'")
        means = rows.groupby("defense")["value"].mean()
        assert bound - 0.01 < means["none"] - means["invertune"] <= bound


@pytest.mark.parametrize(
    ("margins", "verdict"),
    [
        ([1.0, 1.1, 0.9], "HOLDS"),
        ([0.5, 2.0, 0.1], "UNDECIDED"),
        ([1.0, 1.0, -0.1], "UNDECIDED"),
        ([-1.0, -0.1], "FAILS"),
        ([0.0, 0.0, 0.0], "HOLDS"),
        ([0.0, 1.0], "UNDECIDED"),
        ([3.0], "HOLDS"),
        ([-3.0], "FAILS"),
    ],
)
def test_decide(margins, verdict):
    assert decide(margins) == verdict


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=5))
def test_decide_agrees_with_its_words(margins):
    verdict = decide(margins)
    assert (verdict == "FAILS") == all(m < 0 for m in margins)
    if verdict == "HOLDS":
        spread = max(margins) - min(margins)
        assert all(m >= 0 for m in margins)
        assert sum(margins) / len(margins) > spread or spread < 1e-6
    assert decide(list(reversed(margins))) == verdict


def test_mean_over_attacks_per_seed():
    rates = [(s, a, v + s / 10) for s in (1, 2, 3) for a, v in (("badnet", 0.0), ("sig", 2.0))]
    numbers = {(seed, attack, "invertune"): value for seed, attack, value in rates}
    line = judged(RAW, table(numbers))
    assert line["verdict"] == "HOLDS" and line["values"] == "1: 1.1; 2: 1.2; 3: 1.3"
    assert line["margin"] == pytest.approx(0.8) and line["spread"] == pytest.approx(0.2)
    assert (line["seeds"], line["threshold"], line["relation"]) == (3, 2.0, "at_most")
    worse = {key: value + 5 for key, value in numbers.items()}
    assert judged(RAW, table(worse))["verdict"] == "FAILS"
    mixed = {key: value + (5 if key[0] == 3 else 0) for key, value in numbers.items()}
    assert judged(RAW, table(mixed))["verdict"] == "UNDECIDED"


def test_each_needs_every_attack_and_names_the_decisive_value():
    raw = BARE | {"each": ["attack"], "at_least": 80}
    numbers = table({(1, "badnet", "invertune"): 95.0, (1, "sig", "invertune"): 79.0})
    line = judged(raw, numbers)
    assert line["verdict"] == "FAILS" and line["values"] == "1: 79 (SIG)"
    line = judged(raw | {"in_at_least": 1}, numbers)
    assert line["verdict"] == "HOLDS" and line["note"] == "one seed: the spread is unknown"
    assert line["values"] == "1: 1 of 2" and line["margin"] == 15


@given(
    st.lists(st.integers(0, 100), min_size=4, max_size=4),
    st.integers(1, 3),
    st.sampled_from(["lowest", "highest"]),
)
def test_rank_against_counting(values, rank, best):
    """The rank is one more than the number of defenses strictly better."""
    names = ["invertune", "ft", "par", "cleanclip"]
    relation = {"defense": "invertune", "rank": rank, "best": best}
    raw = ranked(names, rank_at_most=relation)
    numbers = {(1, "badnet", d): float(v) for d, v in zip(names, values, strict=True)}
    sign = 1 if best == "lowest" else -1
    counted = 1 + sum(sign * v < sign * values[0] for v in values[1:])
    assert (judged(raw, table(numbers))["verdict"] == "HOLDS") == (counted <= rank)


def test_lowest_is_rank_one():
    raw = ranked(["ft", "invertune"], lowest={"defense": "invertune"})
    numbers = {(1, "badnet", "ft"): 20.0, (1, "badnet", "invertune"): 1.0}
    line = judged(raw, table(numbers))
    assert line["margin"] == 19.0 and line["values"] == "1: 1 against 20 of FT"
    assert judged(raw, table(numbers | {(1, "badnet", "ft"): 0.0}))["verdict"] == "FAILS"


def test_a_missing_row_is_untested_and_named():
    line = judged(RAW, table({(1, "badnet", "invertune"): 1.0}))
    assert line["verdict"] == "UNTESTED" and math.isnan(line["margin"])
    assert line["note"] == "no row with metric=asr, defense=invertune, attack=sig in seed 1"
    numbers = {(s, a, "invertune"): 1.0 for s in (1, 2) for a in ("badnet", "sig")}
    del numbers[2, "sig", "invertune"]
    line = judged(RAW, table(numbers))
    assert (line["verdict"], line["seeds"]) == ("HOLDS", 1)
    assert line["note"] == "without seed 2: rows are missing; one seed: the spread is unknown"
    line = judged(RAW, table({}))
    assert line["note"] == "no row with metric=asr, defense=invertune, attack=badnet"


def test_smoke_is_not_judged():
    line = judged(RAW, table(SOUND, profile="smoke"))
    assert line["verdict"] == "UNTESTED"
    assert line["note"] == "claims are judged on mini, scenes224 and paper only"


def test_a_number_that_serves_two_items_counts_once():
    twice = [table(SOUND), table(SOUND, paper_item="figure5")]
    assert judged(RAW, pd.concat(twice, ignore_index=True))["verdict"] == "HOLDS"


def test_rows_the_claim_does_not_tell_apart_are_an_error():
    both = pd.concat([table(SOUND), table(SOUND, target="lemon")], ignore_index=True)
    with pytest.raises(ClaimError, match=r"claim t.x: several rows .* they differ in target"):
        judged(RAW, both)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filter": {"metrik": "asr"}}, "claim t.x: 'metrik' is not a column to filter by"),
        ({"filter": {"seed": 0}}, "claim t.x: 'seed' is not a column"),
        ({"each": ["task"]}, "claim t.x: column task must stand in its filter"),
        ({"mean_over": ["attac"]}, "claim t.x: 'attac' is not a column"),
        ({"at_least": 3}, "claim t.x: needs exactly one relation"),
        ({"at_most": "2 * ca"}, "claim t.x: at_most needs a number, not '2 \\* ca'"),
        ({"formula": "a < b"}, "claim t.x: unknown key 'formula'"),
        ({"in_at_least": 3}, "claim t.x: in_at_least is 3; it must lie between 1 and 1"),
    ],
)
def test_bad_claims_are_refused_in_one_line(changes, message):
    with pytest.raises(ClaimError, match=message) as caught:
        parse_claim({**RAW, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        {"defense": "par"},
        {"rank": 2},
        {"defense": "invertune", "rank": 0},
        "invertune",
        {"defense": "invertune", "best": "worst"},
    ],
)
def test_bad_ranks_are_refused(value):
    with pytest.raises(ClaimError, match=r"claim t\.x: rank_at_most needs one column|not in its"):
        parse_claim(BARE | {"rank_at_most": value})


def test_a_missing_part_is_refused():
    with pytest.raises(ClaimError, match=r"claim t\.x: source is missing"):
        parse_claim({key: value for key, value in RAW.items() if key != "source"})


def test_a_rank_that_is_always_true_is_an_error():
    raw = ranked(["ft", "invertune"], rank_at_most={"defense": "invertune", "rank": 2})
    numbers = {(1, "badnet", "ft"): 20.0, (1, "badnet", "invertune"): 1.0}
    with pytest.raises(ClaimError, match=r"claim t\.x: 2 ranks exist"):
        judged(raw, table(numbers))
