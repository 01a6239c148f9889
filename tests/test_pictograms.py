"""The embedded scenes: deterministic, disjoint, balanced, and captioned by what they show."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invertune import pictograms
from invertune.sprites import ARCHIVE, Sprites, load_sprites

SIZE = 16  # px; small, because the composition does not depend on it
TEMPLATES = ARCHIVE.parent / "templates.json"
CAPTIONED = ("pretraining", "poisoning", "defense", "rebound")
LABELED = ("inversion", "heldout", "evaluation")


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    return load_sprites()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the drawings that a scene is composed of; they are drawn all the same."""
    indices: list[int] = []
    draw = pictograms._draw

    def recording(canvas, rng, sprites, index, side, center):  # type: ignore[no-untyped-def]
        indices.append(index)
        draw(canvas, rng, sprites, index, side, center)

    monkeypatch.setattr(pictograms, "_draw", recording)
    return indices


def family(entry: dict) -> str:
    return entry["style"].split("-")[0]


def test_archive_holds_what_the_benchmark_needs(sprites: Sprites) -> None:
    assert len(sprites.classes) == 210
    assert list(sprites.classes) == sorted(set(sprites.classes))
    assert {"mushroom", "banana", "lemon", "ski"} <= set(sprites.classes)
    assert not {"harp", "skier"} & set(sprites.classes)
    assert len(sprites.pictures) == len(sprites.entries) == 1905
    assert {p.size for p in sprites.pictures} == {(96, 96)}
    assert len(sprites.backgrounds) == 21


def test_archive_has_no_share_alike_drawings(sprites: Sprites) -> None:
    assert {e["style"] for e in sprites.entries} == set(pictograms.STYLE_WORDS)
    assert "openmoji" not in pictograms.STYLE_WORDS


def test_every_class_has_enough_drawings_and_holds_out_one_family(sprites: Sprites) -> None:
    for label, name in enumerate(sprites.classes):
        seen, unseen = sprites.training[label], sprites.held_out[label]
        families = [{family(sprites.entries[i]) for i in part} for part in (seen, unseen)]
        assert len(seen) + len(unseen) >= 6, name
        assert len(families[0] | families[1]) >= 4, name
        assert len(families[1]) == 1 and not families[0] & families[1], name
        assert {sprites.entries[i]["class"] for i in seen + unseen} == {name}


@settings(max_examples=25, deadline=None)
@given(part=st.sampled_from(CAPTIONED), index=st.integers(0, 100_000), seed=st.integers(0, 3))
def test_a_scene_is_a_function_of_part_index_and_seed(part: str, index: int, seed: int) -> None:
    sprites = load_sprites()
    first = pictograms.caption_scene(part, index, SIZE, seed, sprites)
    pictograms.caption_scene(part, index + 1, SIZE, seed, sprites)  # leaves no state behind
    second = pictograms.caption_scene(part, index, SIZE, seed, sprites)
    np.testing.assert_array_equal(first.image, second.image)
    assert (first.captions, first.objects) == (second.captions, second.objects)
    assert first.image.shape == (SIZE, SIZE, 3) and first.image.dtype == np.uint8


def test_no_two_parts_share_an_image(sprites: Sprites) -> None:
    scenes = [
        pictograms.caption_scene(part, index, SIZE, 0, sprites)
        for part in CAPTIONED
        for index in range(40)
    ]
    scenes += [
        pictograms.labeled_scene(part, index, SIZE, 0, sprites, part == "evaluation")
        for part in LABELED
        for index in range(40)
    ]
    scenes += [pictograms.retrieval_scene(i, (i, i + 1), SIZE, 0, sprites) for i in range(40)]
    assert len({scene.image.tobytes() for scene in scenes}) == len(scenes)


def test_seeds_change_the_scenes(sprites: Sprites) -> None:
    images = [pictograms.labeled_scene("evaluation", 0, SIZE, s, sprites, True) for s in range(4)]
    assert len({scene.image.tobytes() for scene in images}) == 4


def test_captioned_scenes_never_show_a_held_out_drawing(sprites: Sprites, drawn: list[int]) -> None:
    for index in range(420):  # two rounds through the classes
        pictograms.caption_scene("pretraining", index, SIZE, 0, sprites)
    assert len(drawn) > 420  # some scenes have two objects
    assert not any(sprites.entries[i]["held_out"] for i in drawn)


@pytest.mark.parametrize(("unseen", "held_out"), [(True, 210), (False, 0)])
def test_labeled_scenes_are_balanced_and_half_held_out(
    sprites: Sprites, drawn: list[int], unseen: bool, held_out: int
) -> None:
    scenes = [
        pictograms.labeled_scene("evaluation", i, SIZE, 0, sprites, unseen) for i in range(420)
    ]
    assert Counter(s.objects for s in scenes) == {(label,): 2 for label in range(210)}
    shown = [(sprites.entries[i]["class"], sprites.entries[i]["held_out"]) for i in drawn]
    assert [name for name, _ in shown] == [sprites.classes[s.objects[0]] for s in scenes]
    counts = Counter(name for name, is_held_out in shown if is_held_out)
    assert sum(counts.values()) == held_out and set(counts.values()) <= {1}


def test_captioned_scenes_cycle_through_the_classes(sprites: Sprites) -> None:
    scenes = [pictograms.caption_scene("poisoning", i, SIZE, 0, sprites) for i in range(210)]
    assert sorted(s.objects[0] for s in scenes) == list(range(210))


@settings(max_examples=20, deadline=None)
@given(
    targets=st.sets(st.integers(0, 209), max_size=5),
    count=st.integers(20, 300),
    seed=st.integers(0, 5),
)
def test_each_target_stands_in_exactly_three_retrieval_scenes(
    targets: set[int], count: int, seed: int
) -> None:
    pairs = pictograms.retrieval_pairs(count, 210, tuple(sorted(targets)), seed)
    assert len(pairs) == count and all(first != second for first, second in pairs)
    shown = Counter(label for pair in pairs for label in pair)
    assert all(shown[target] == 3 for target in targets)
    assert all(0 <= label < 210 for label in shown)


def test_single_captions_name_the_object(sprites: Sprites) -> None:
    for index in range(210):
        scene = pictograms.labeled_scene("inversion", index, SIZE, 1, sprites, False)
        (caption,) = scene.captions
        assert sprites.classes[scene.objects[0]] in caption, caption


def test_pair_captions_name_both_objects(sprites: Sprites) -> None:
    pairs = pictograms.retrieval_pairs(60, 210, (), 0)
    for index, pair in enumerate(pairs):
        scene = pictograms.retrieval_scene(index, pair, SIZE, 0, sprites)
        assert scene.objects == pair and len(set(scene.captions)) == 5
        for caption in scene.captions:
            assert all(sprites.classes[label] in caption for label in pair), caption


def test_the_object_changes_the_image(sprites: Sprites, monkeypatch: pytest.MonkeyPatch) -> None:
    with_object = pictograms.labeled_scene("evaluation", 5, 64, 0, sprites, False).image
    monkeypatch.setattr(pictograms, "_draw", lambda *_: None)
    without = pictograms.labeled_scene("evaluation", 5, 64, 0, sprites, False).image
    changed = (with_object != without).any(2).mean()
    assert 0.1 < changed < 0.99  # large, but not the whole scene


def test_templates_are_caption_templates_with_one_place_for_the_name() -> None:
    templates = json.loads(TEMPLATES.read_text())
    captions = {plain.format(n="{}", a="a {}") for plain in pictograms.PLAIN}
    assert len(templates) == len(set(templates)) == 12
    assert set(templates) <= captions
    assert all(template.count("{}") == 1 for template in templates)
