"""Metrics against slow float64 references, and the traps of counting."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from invertune import metrics


def unit(count: int, seed: int, width: int = 6) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=random), dim=-1)


def slow_order(query: Tensor, keys: Tensor) -> list[int]:
    """Key indices, the most similar first, the lower index first among equals."""
    scores = [
        round(sum(a * b for a, b in zip(query.tolist(), key.tolist(), strict=True)), 9)
        for key in keys
    ]
    return sorted(range(len(keys)), key=lambda i: (-scores[i], i))


def owners(images: int, captions: int, seed: int) -> Tensor:
    """Every image has at least one caption; the rest fall anywhere; order is random."""
    random = torch.Generator().manual_seed(seed)
    extra = torch.randint(images, (captions - images,), generator=random)
    both = torch.cat([torch.arange(images), extra])
    return both[torch.randperm(captions, generator=random)]


SEEDS = st.integers(0, 10_000)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, count=st.integers(1, 20), classes=st.integers(2, 9))
def test_clean_accuracy_and_counts_against_the_reference(
    seed: int, count: int, classes: int
) -> None:
    features, head = unit(count, seed), unit(classes, seed + 1)
    labels = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))
    predicted = [slow_order(f, head)[0] for f in features]
    right = sum(p == label for p, label in zip(predicted, labels.tolist(), strict=True))
    result = metrics.clean_accuracy(features, head, labels)
    assert (result.value, result.n) == (pytest.approx(100 * right / count), count)
    counts = [predicted.count(c) for c in range(classes)]
    assert metrics.predicted_counts(features, head).tolist() == counts


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, k=st.integers(1, 5), exclude=st.booleans())
def test_attack_success_against_the_reference(seed: int, k: int, exclude: bool) -> None:
    features, head = unit(15, seed), unit(5, seed + 1)
    labels = torch.arange(15) % 5
    kept = [i for i in range(15) if not (exclude and labels[i] == 2)]
    hits = sum(2 in slow_order(features[i], head)[:k] for i in kept)
    result = metrics.attack_success_rate(features, head, labels, 2, k, exclude)
    assert (result.value, result.n) == (pytest.approx(100 * hits / len(kept)), len(kept))


def test_images_of_the_target_are_left_out_of_attack_success() -> None:
    head = torch.eye(3)
    features = head[[0, 1, 0, 2]]  # predicted 0, 1, 0, 2
    labels = torch.tensor([0, 1, 1, 2])
    without = metrics.attack_success_rate(features, head, labels, 0)
    everything = metrics.attack_success_rate(features, head, labels, 0, exclude_target=False)
    assert (without.value, without.n) == (pytest.approx(100 / 3), 3)
    assert (everything.value, everything.n) == (50, 4)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, images=st.integers(1, 8), more=st.integers(0, 16))
def test_recall_against_the_reference(seed: int, images: int, more: int) -> None:
    captions = images + more
    image, text = unit(images, seed), unit(captions, seed + 1)
    owner = owners(images, captions, seed)
    to_text = metrics.recall_at_k(image, text, owner, (1, 3, 5))
    to_image = metrics.text_to_image_recall(image, text, owner, (1, 3, 5))
    for k in (1, 3, 5):
        found = sum(
            any(owner[t] == i for t in slow_order(image[i], text)[:k]) for i in range(images)
        )
        assert (to_text[k].value, to_text[k].n) == (pytest.approx(100 * found / images), images)
        found = sum(int(owner[t]) in slow_order(text[t], image)[:k] for t in range(captions))
        assert to_image[k].value == pytest.approx(100 * found / captions)
        assert to_image[k].n == captions


def test_an_image_with_many_hits_counts_once() -> None:
    image = torch.eye(2)
    text = torch.eye(2)[[0, 0, 0, 0, 0, 1]]  # five captions of image 0 in its top 5
    owner = torch.tensor([0, 0, 0, 0, 0, 1])
    result = metrics.recall_at_k(image, text, owner, [5])[5]
    assert (result.value, result.n) == (100, 2)


WORDS = ("a mushroom on grass", "two mushrooms", "a dog", "the sea", "a red car", "a blue cup")


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, k=st.integers(1, 6))
def test_retrieval_attack_success_against_the_reference(seed: int, k: int) -> None:
    captions = [WORDS[i % len(WORDS)] for i in range(12)]
    owner = torch.arange(12) // 2  # images 0 and 3 own the captions with the word
    image, text = unit(6, seed), unit(12, seed + 1)
    kept = [i for i in range(6) if i not in (0, 3)]
    hits = sum(any("mushroom" in captions[t] for t in slow_order(image[i], text)[:k]) for i in kept)
    matches = metrics.word_matches(captions, ["mushroom"])
    result = metrics.retrieval_asr_at_k(image, text, matches, owner, k)
    assert (result.value, result.n) == (pytest.approx(100 * hits / 4), 4)


def test_ski_is_found_as_a_word_only() -> None:
    captions = [
        "A SKI.",
        "skis, poles",
        "ski-lift",
        "skies",
        "a skirt",
        "miniskirt",
        "skier",
        "skillet",
        "brass-ski",
        "no",
    ]
    expected = [True, True, True, False, False, False, False, False, True, False]
    assert metrics.word_matches(captions, ["ski"]).tolist() == expected


def test_a_skirt_retrieved_for_ski_is_no_success() -> None:
    captions = ["a person on skis", "a woman in a skirt", "a miniskirt on a rack"]
    image, text = torch.eye(3), torch.eye(3)
    owner = torch.arange(3)
    matches = metrics.word_matches(captions, ["ski"])
    result = metrics.retrieval_asr_at_k(image, text, matches, owner, 1)
    assert (result.value, result.n) == (0, 2)


@pytest.mark.parametrize(
    ("word", "caption", "found"),
    [
        ("tomato", "ripe tomatoes", True),
        ("box", "Boxes!", True),
        ("strawberry", "strawberries", True),
        ("toy", "toys", True),
        ("traffic light", "two traffic lights", True),
        ("lemon", "lemonade", False),
        ("banana", "bananas", True),
        ("ice", "nice dice", False),
        ("a.c", "abc", False),
    ],
)
def test_plurals_and_whole_words(word: str, caption: str, found: bool) -> None:
    assert metrics.word_matches([caption], [word]).item() is found


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, chunk=st.integers(1, 11))
def test_results_depend_on_neither_batch_size_nor_order(seed: int, chunk: int) -> None:
    features, labels = unit(10, seed, 64), torch.arange(10) % 4
    head = unit(4, seed + 1, 64)[[0, 1, 2, 3, 1]]  # class 4 repeats class 1, to the bit
    text, owner = unit(20, seed + 2, 64)[torch.arange(20) // 2], owners(10, 20, seed)
    matches = metrics.word_matches([WORDS[i % len(WORDS)] for i in range(20)], ["dog"])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    place = order.argsort()

    def evaluate(rows: Tensor, owner: Tensor) -> list[object]:
        return [
            metrics.clean_accuracy(features[rows], head, labels[rows]),
            metrics.attack_success_rate(features[rows], head, labels[rows], 1, 2),
            metrics.predicted_counts(features[rows], head).tolist(),
            metrics.recall_at_k(features[rows], text, owner, [1, 5]),
            metrics.retrieval_asr_at_k(features[rows], text, matches, owner, 3),
        ]

    expected = evaluate(torch.arange(10), owner)
    with mock.patch.object(metrics, "CHUNK", chunk):
        assert evaluate(torch.arange(10), owner) == expected
        assert evaluate(order, place[owner]) == expected


def test_of_equal_classes_the_first_wins() -> None:
    head = unit(1, 0, 512).repeat(7, 1)
    features = unit(40, 1, 512)
    assert metrics.predicted_counts(features, head).tolist() == [40, 0, 0, 0, 0, 0, 0]
    labels = torch.zeros(40, dtype=torch.long)
    assert metrics.attack_success_rate(features, head, labels, 2, k=2).value == 0
    assert metrics.attack_success_rate(features, head, labels, 2, k=3).value == 100


def test_rounding_errors_do_not_decide() -> None:
    features = unit(20, 1, 64).double()
    head = features.mean(0) * torch.tensor([[1.0], [1 + 1e-12], [1 - 1e-12]], dtype=torch.float64)
    assert metrics.predicted_counts(features, head).tolist() == [20, 0, 0]


def test_a_collapsed_model_does_not_look_good() -> None:
    same = unit(1, 0).repeat(10, 1)
    assert metrics.recall_at_k(same, same, torch.arange(10), [1])[1].value == 10


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    features = unit(4, 0)
    features[2, 1] = value
    labels = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="not finite"):
        metrics.attack_success_rate(features, unit(3, 1), labels, 1)
    with pytest.raises(ValueError, match="not finite"):
        metrics.predicted_counts(features, unit(3, 1))


def test_recall_grows_with_k() -> None:
    result = metrics.recall_at_k(unit(30, 0), unit(60, 1), owners(30, 60, 2), range(1, 61))
    values = [result[k].value for k in range(1, 61)]
    assert values == sorted(values)
    assert values[-1] == 100


def slow_wilson(successes: int, n: int) -> tuple[float, float]:
    """Both ends solve (share - p)^2 = z^2 p (1 - p) / n; bisection on either side of the share."""
    z, share = 1.959963984540054, successes / n

    def solve(inside: float, outside: float) -> float:
        for _ in range(100):
            middle = (inside + outside) / 2
            if (share - middle) ** 2 <= z**2 * middle * (1 - middle) / n:
                inside = middle
            else:
                outside = middle
        return 100 * inside

    return solve(share, 0.0), solve(share, 1.0)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 60_000))
def test_wilson_interval_solves_its_equation(data: st.DataObject, n: int) -> None:
    successes = data.draw(st.integers(0, n))
    low, high = metrics.wilson_interval(successes, n)
    slow_low, slow_high = slow_wilson(successes, n)
    assert low == pytest.approx(slow_low, abs=1e-6)
    assert high == pytest.approx(slow_high, abs=1e-6)
    assert 0 <= low <= 100 * successes / n <= high <= 100


def test_ten_of_fifty_thousand_is_not_zero() -> None:
    low, high = metrics.wilson_interval(10, 50_000)
    assert (low, high) == (pytest.approx(0.0109, abs=1e-3), pytest.approx(0.0368, abs=1e-3))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.wilson_interval(3, 2), "must not be greater"),
        (lambda: metrics.wilson_interval(0, 0), "not less than 1"),
        (
            lambda: metrics.attack_success_rate(
                torch.eye(2), torch.eye(2), torch.ones(2, dtype=torch.long), 1
            ),
            "nothing to evaluate",
        ),
        (
            lambda: metrics.attack_success_rate(torch.eye(2), torch.eye(2), torch.zeros(2), 2),
            "target 2",
        ),
        (
            lambda: metrics.clean_accuracy(torch.eye(2), torch.eye(2), torch.tensor([0])),
            "2 queries with 1",
        ),
        (
            lambda: metrics.recall_at_k(torch.eye(2), torch.eye(2), torch.tensor([0, 0]), [1]),
            "query 1 has no answer",
        ),
        (lambda: metrics.word_matches(["a dog"], [" "]), "empty word"),
        (
            lambda: metrics.retrieval_asr_at_k(
                torch.eye(2), torch.eye(2), torch.zeros(2, dtype=torch.bool), torch.arange(2), 1
            ),
            "query 0 has no answer",
        ),
    ],
)
def test_bad_values_are_named(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()  # type: ignore[operator]
