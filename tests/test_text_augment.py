"""Caption augmentation: words come from the caption or its synonyms, and nothing is emptied."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from random import Random

import open_clip
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invertune.data import DataError
from invertune.models import MODEL_FOLDER, build_clip
from invertune.pictograms import caption_scene
from invertune.sprites import load_sprites
from invertune.text_augment import (
    augment_captions,
    counterfactuals,
    kind_of,
    known_words,
    lexicon,
    positive_sub_caption,
    sub_captions,
    units,
)

SPRITES = load_sprites()
KNOWN = known_words("keywords")
CAPTIONS = tuple(caption_scene("poisoning", i, 16, 0, SPRITES).captions[0] for i in range(80))
LEXICON = lexicon(CAPTIONS, KNOWN.nouns)
BARE = ("", " ", "!?", "...")
HARD = (*BARE, "it", "mushroom", "and nothing else", "東京", "the hot dog", "3d")
captions = st.sampled_from(CAPTIONS + HARD) | st.text(max_size=30)


def parts(caption: str) -> list[str]:
    return units(caption, KNOWN.synonyms)


@given(st.lists(captions, max_size=4), st.integers(0, 99), st.sampled_from([0.1, 0.5, 1.0]))
def test_words_come_from_the_caption_or_its_synonyms(texts, seed, rate) -> None:
    changed = augment_captions(texts, KNOWN.synonyms, rate, seed)
    assert changed == augment_captions(texts, KNOWN.synonyms, rate, seed)
    assert len(changed) == len(texts)
    for before, after in zip(texts, changed, strict=True):
        own = parts(before)
        allowed = [*own, *(s for unit in own for s in KNOWN.synonyms.get(unit, ()))]
        words = {word for unit in allowed for word in unit.replace("-", " ").split()}
        assert after == before if not own else set(" ".join(parts(after)).split()) <= words
        assert bool(after) == bool(before)


def test_each_operation_does_what_it_says() -> None:
    text, synonyms = "one two three four five", {"two": ["deux"], "four": ["quatre"]}
    seen = Counter()
    for seed in range(200):
        before, after = text.split(), augment_captions([text], synonyms, 0.2, seed)[0].split()
        new = [w for w in after if w not in before]
        if len(after) > 5:
            kind = "insertion"
            assert len(after) == 6 and len(new) == 1
        elif new:
            kind = "synonym"
            assert after[(1, 3)["quatre" in new]] == new[0] and len(after) == 5
        elif len(after) == 5 and after != before:
            kind = "swap"
            assert sorted(after) == sorted(before)
            assert sum(a != b for a, b in zip(after, before, strict=True)) == 2
        else:
            kind = "deletion"
            assert after and [w for w in before if w in after] == after
        seen[kind] += 1
    assert all(seen[kind] > 30 for kind in ("insertion", "synonym", "swap", "deletion")), seen


def test_known_terms_stay_together() -> None:
    assert parts("A Hot Dog's photo, don't!") == ["a", "hot dog", "photo", "dont"]
    assert parts("four leaf clover leaf") == ["four leaf clover", "leaf"]
    for seed in range(30):
        after = augment_captions(["the fire truck"], {"fire truck": ["engine"]}, 0.1, seed)[0]
        assert "fire truck" in after or "fire" not in after


def test_the_shortened_vocabulary_has_every_synonym_as_whole_as_clips_own() -> None:
    own, full = build_clip(MODEL_FOLDER / "RN50", "RN50").tokenizer, open_clip.SimpleTokenizer()
    for synonym in {s for found in KNOWN.synonyms.values() for s in found}:
        assert len(own.encode(synonym)) == len(full.encode(synonym)), synonym


@given(captions, st.integers(0, 99))
def test_sub_captions_are_never_empty_and_wrong_ones_differ(text, seed) -> None:
    positive = positive_sub_caption(text, LEXICON)
    assert bool(positive) == bool(text)
    assert Counter(units(positive, KNOWN.nouns)) <= Counter(units(text, KNOWN.nouns))
    wrong = counterfactuals(text, LEXICON, 3, Random(seed))
    assert len(wrong) in (0, 3) and positive not in wrong
    words = {*LEXICON.nouns, *LEXICON.verbs, *LEXICON.adjectives, *units(text, KNOWN.nouns)}
    for sub in wrong:
        assert set(units(sub, KNOWN.nouns)) <= words
        assert any(unit not in units(text, KNOWN.nouns) for unit in units(sub, KNOWN.nouns))


def test_a_positive_keeps_the_meaning_and_a_counterfactual_changes_one_word() -> None:
    text = "a small hot dog on a striped teal background"
    assert positive_sub_caption(text, LEXICON) == "hot dog on background"
    rng, kinds = Random(0), Counter()
    for sub in counterfactuals(text, LEXICON, 60, rng):
        if "hot dog" in sub:
            kinds["adjective"] += 1
            before, after = set(sub.split()), {"hot", "dog", "on", "background"}
            assert len(before - after) == 1 and (before - after) <= set(LEXICON.adjectives)
        else:
            kinds["subject"] += 1
            assert sub.endswith(" on background")
            assert sub.removesuffix(" on background") in LEXICON.nouns
    assert min(kinds["adjective"], kinds["subject"]) > 5


def test_only_the_first_noun_is_the_subject() -> None:
    for sub in counterfactuals("cat and banana", LEXICON, 20, Random(0)):
        assert sub.endswith(" and banana") and not sub.startswith("cat ")


@pytest.mark.parametrize("text", [*BARE, "it", "and nothing else", "東京"])
def test_a_caption_without_nouns_has_no_counterfactual(text: str) -> None:
    assert counterfactuals(text, LEXICON, 3, Random(0)) == ()
    assert sub_captions([text] * 4, LEXICON, 1.0, 3, 0, 0) == {}


def test_a_lexicon_of_one_noun_has_nothing_to_swap_it_for() -> None:
    alone = lexicon(["a cat"], KNOWN.nouns)
    assert alone.nouns == ("cat",) and counterfactuals("a cat", alone, 3, Random(0)) == ()


@given(captions, st.integers(0, 99))
def test_another_word_is_drawn_as_from_the_list_of_all_others(text, seed) -> None:
    rng, found = Random(seed), units(text, KNOWN.nouns)
    pools = {"noun": LEXICON.nouns, "verb": LEXICON.verbs, "adjective": LEXICON.adjectives}
    kinds = [kind_of(unit, KNOWN.nouns) for unit in found]
    others = [[word for word in pools.get(kind, ()) if word not in found] for kind in kinds]
    options = [i for i, kind in enumerate(kinds) if kind != "noun" or i == kinds.index("noun")]
    options = [i for i in options if others[i]]
    for sub in counterfactuals(text, LEXICON, 3, Random(seed)):
        assert rng.choice(others[rng.choice(options)]) in sub


class Pool(tuple[str, ...]):
    """Words that are never all gone through: at paper scale there are tens of thousands."""

    def __iter__(self):
        yield from self[:9]
        raise AssertionError("more than nine words were read")


def test_a_large_pool_is_not_gone_through_for_every_caption() -> None:
    known = dataclasses.replace(LEXICON, nouns=Pool(LEXICON.nouns))
    assert len(counterfactuals("a cat", known, 3, Random(0))) == 3


def test_a_share_of_the_batch_gets_sub_captions_by_seed_and_step() -> None:
    batch = CAPTIONS[:64]
    groups = sub_captions(batch, LEXICON, 0.25, 3, 1, 2)
    assert groups == sub_captions(batch, LEXICON, 0.25, 3, 1, 2) and len(groups) == 16
    assert groups != sub_captions(batch, LEXICON, 0.25, 3, 1, 3)
    assert all(len(g) == 4 and g[0] not in g[1:] for g in groups.values())
    assert all(g[0] == positive_sub_caption(batch[i], LEXICON) for i, g in groups.items())


def test_kinds_of_words() -> None:
    kinds = {"hot dog": "noun", "cats": "noun", "teal": "adjective", "sitting": "verb"}
    kinds |= {"the": None, "photo": None, "qwerty": None}
    assert {unit: kind_of(unit, KNOWN.nouns) for unit in kinds} == kinds


SYNSETS = {
    "data.noun": [
        "  1 This software and database is being provided to you",
        "02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 001 @ 02083346 n 0000 | a dog",
        "07676602 13 n 02 hot_dog 1 dog 4 000 | a sausage",
    ],
    "data.verb": ["01926311 38 v 02 run 0 race 1 000 01 + 02 00 | move fast"],
    "data.adj": ["00217728 00 a 02 galore(ip) 0 abounding 0 000 | in great numbers"],
    "data.adv": ["00085811 02 r 01 quickly 0 000 | with speed"],
}


def test_wordnet_is_read_from_its_own_files(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "wordnet"
    folder.mkdir()
    for name, lines in SYNSETS.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("INVERTUNE_DATA", str(tmp_path))
    words = known_words("wordnet")
    assert set(words.synonyms["dog"]) == {"domestic dog", "canis familiaris", "hot dog"}
    assert words.synonyms["galore"] == ("abounding",) and words.synonyms["run"] == ("race",)
    assert "quickly" not in words.synonyms
    assert words.nouns == {"dog", "domestic dog", "canis familiaris", "hot dog"}


def test_missing_wordnet_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("INVERTUNE_DATA", raising=False)
    with pytest.raises(DataError, match=r"INVERTUNE_DATA.* wordnet-base"):
        known_words("wordnet")
    monkeypatch.setenv("INVERTUNE_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"not found: .*wordnet/data\.noun .*wordnet-base"):
        known_words("wordnet")
