"""Notebook 06: what the cases share, what a defender without the target sees, and its numbers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import QUICK_CASES
from hypothesis import given
from hypothesis import strategies as st

from invertune import chain as chains
from invertune import data as datasets
from invertune import defenses, exhibits, generalization, passing_claims, pictograms, reports, steps
from invertune.chain import Chain, Defender, class_list, open_chain, pool
from invertune.generalization import NOT_SHIPPED
from invertune.results import to_frame
from invertune.settings import load_settings
from invertune.sprites import load_sprites
from invertune.store import Artifact, artifact_key
from invertune.weights import locked_hash


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """A tiny chain with one prompt template: embedding them all takes longest."""
    folder = tmp_path_factory.mktemp("store")
    (folder / "templates.json").write_text('["a picture of {}"]')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "TEMPLATES", folder / "templates.json")
        yield open_chain(load_settings("smoke", QUICK_CASES), folder / "store")


def test_a_case_shares_what_is_equal_and_nothing_else(chain: Chain) -> None:
    banana, same = generalization.cases(chain)[0], generalization.one_attack(chain, backbone="RN50")
    key = steps.attacked(chain, "badclip", 0).key
    assert steps.attacked(same, "badclip", 0).key == key
    assert steps.attacked(banana.chain, "badclip", 0).key != key
    others = list(passing_claims.variants(chain).values())[1:]
    assert {steps.attacked(other, "badclip", 0).key for other in others} == {key}
    found = {steps.identified(c, "badclip", 0).key for c in (chain, *others)}
    assert len(found) == 1 + len(others)


def test_rows_of_a_case_belong_to_its_table_and_its_place(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = {"RN50": locked_hash("RN50")}
    monkeypatch.setattr(generalization, "locked_hash", shipped.get)
    rows = to_frame(generalization.generalization_rows(chain))
    assert set(rows.paper_item) == {"table4", "extra"}  # table12 is of the target mushroom
    assert set(rows.backbone) == {"RN50"} and set(rows.target) == {"banana"}
    own = rows[rows.paper_item == "table4"]
    cells = {(d, m) for d in ("none", "ft", "invertune") for m in ("ca", "asr")}
    assert set(zip(own.defense, own.metric, strict=True)) == cells and len(own) == len(cells)
    cases = generalization.cases(chain)
    line = generalization.describe(cases).splitlines()[-1]
    assert "RN101" in line and NOT_SHIPPED in line and "pretrain RN101" in line
    table4, table5 = (
        generalization.accuracy_table(cases, chain, rows, i) for i in ("table4", "table5")
    )
    assert (table5["RN101 CA"] == NOT_SHIPPED).all() and table4["banana ASR"].between(0, 100).all()
    chosen = generalization.case_table(cases, chain)
    assert list(chosen["attack"] == NOT_SHIPPED) == [False, True]
    layers = exhibits.layer_table(cases[0].chain)
    assert list(layers.attack) == ["BadCLIP"] and "layer4" in layers and layers.critical.all()
    figure = generalization.asr_figure(chain, rows)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["banana"]
    both = pd.concat([rows, to_frame(reports.undefended_rows(chain, "badclip", 0))])
    assert len(generalization.asr_figure(chain, both).axes[0].get_yticks()) == 2  # Table 1's first


def test_a_baselines_grid_begins_at_the_rate_of_table_1(chain: Chain) -> None:
    case = generalization.cases(chain)[0]
    chosen = defenses.baseline(chain, "ft", "badclip", 0).metrics["lr"]
    lrs = generalization.with_rates(case, chain, 0).settings.baselines.ft.lrs
    assert lrs == (chosen,)
    both = load_settings("smoke", {**QUICK_CASES, "generalization": {"baseline_lrs": 2}})
    whole = generalization.with_rates(case, Chain(both, chain.store), 0)
    assert whole.settings.baselines == chain.settings.baselines


def test_a_defender_without_the_target_sees_neither_its_name_nor_its_images(chain: Chain) -> None:
    other = replace(chain, defender=Defender(lacks="mushroom"))
    every, known = datasets.class_names(chain.settings.data), class_list(other)
    assert set(every) - set(known) == {"mushroom"}
    full, own = pool(chain, "heldout"), pool(other, "heldout")
    kept = [(n, x) for n, x in zip(full.labels.tolist(), full.images, strict=True)]
    kept = [(every[n], x) for n, x in kept if every[n] != "mushroom"]
    assert [known[n] for n in own.labels.tolist()] == [name for name, _ in kept]
    assert torch.equal(own.images, torch.stack([x for _, x in kept]))


def test_a_lacking_name_that_stands_twice_leaves_the_other_labels_right(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("missile", "ski", "missile", "pizza")
    labels = torch.arange(8) % 4
    found = datasets.Labeled(torch.arange(8), labels)
    monkeypatch.setattr(datasets, "class_names", lambda _: names)
    monkeypatch.setattr(datasets, "labeled_images", lambda *_: found)
    other = replace(chain, defender=Defender(lacks="missile"))
    known, own = class_list(other), pool(other, "heldout")
    assert known == ("ski", "pizza") and own.images.tolist() == [1, 3, 5, 7]
    assert [known[n] for n in own.labels.tolist()] == ["ski", "pizza"] * 2


def test_every_defender_gets_the_same_attacked_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key_alone(root: Path, *parts: object, **_: object) -> Artifact:
        return Artifact(artifact_key(*parts[:5]), root)

    monkeypatch.setattr(chains, "obtain", key_alone)
    settings = load_settings("smoke", {"weights": "pretrained"})
    defenders = (Defender(), Defender(lacks="mushroom"), Defender(style="noto"))
    made = [steps.attacked(Chain(settings, tmp_path, d), "badnet", 0).key for d in defenders]
    assert len(set(made)) == 1


def test_a_variant_is_scored_with_the_full_list(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = passing_claims.variants(chain)["list=without_target"]
    monkeypatch.setattr(passing_claims, "variants", lambda _: {"list=without_target": other})
    rows = to_frame(passing_claims.variant_rows(chain))
    found = steps.first_candidate(other, "badclip", 0)
    candidates = rows[rows.metric == "mask_l1"].variant
    assert candidates.iloc[0] == f"list=without_target;candidate=1;class={found}"
    assert set(rows.variant) == {"list=without_target", *candidates}
    rank = rows[rows.metric == "similarity_rank"].value.item()
    assert found != "mushroom" and rank == passing_claims.similarity_rank(chain, found) >= 1
    asr = rows[(rows.metric == "asr") & (rows.task == "zeroshot")]
    labels = pool(chain, "evaluation").labels
    assert set(asr.n) == {int((labels != chain.target).sum())}
    table = passing_claims.variant_table(chain, rows)
    assert table["found"].iloc[-1] == found and len(table) == 2


def test_similarity_ranks_are_a_ranking_around_the_target(chain: Chain) -> None:
    ranks = [passing_claims.similarity_rank(chain, name) for name in ("mushroom", "pizza", "ski")]
    assert ranks[0] == 0 and len(set(ranks)) == 3 and max(ranks) < 210


def test_the_same_layers_overlap_whole(chain: Chain) -> None:
    assert [row["value"] for row in passing_claims.overlap_rows(chain)] == ["1"]


@given(st.lists(st.integers(0, 50), min_size=2, max_size=30).filter(any))
def test_uniformity_is_the_entropy_of_the_shares(counts: list[int]) -> None:
    shares = np.asarray(counts) / sum(counts)
    expected = -sum(p * np.log(p) for p in shares if p > 0) / np.log(len(counts))
    entropy, largest = passing_claims.uniformity(torch.tensor(counts))
    assert entropy == pytest.approx(expected, abs=1e-12) and 0 <= entropy <= 1
    assert largest == pytest.approx(100 * shares.max())
    assert passing_claims.uniformity(torch.full((7,), 3))[0] == pytest.approx(1)


def test_another_style_is_drawn_alone_on_plain_backgrounds() -> None:
    sprites = load_sprites()
    lone = replace(
        sprites,
        training=tuple(
            tuple(i for i in own if sprites.entries[i]["style"] == "emojione") or own
            for own in sprites.training
        ),
    )
    for index in range(0, 210, 30):
        image = pictograms.labeled_scene("heldout", index, 64, 0, sprites, False, "emojione").image
        again = pictograms.labeled_scene("heldout", index, 64, 0, lone, False, "emojione").image
        assert np.array_equal(image, again)  # no other drawing was there to choose
        colors = pd.Series([*map(bytes, image.reshape(-1, 3))]).value_counts(normalize=True)
        assert colors.iloc[0] > 0.1  # the background's one color
