"""Clean accuracy, attack success rate and recall@k, each with its 95 % Wilson interval.

One question stands behind all of them: at which rank does the best admissible answer come? It is
answered in float64, chunk by chunk, with similarities rounded to 1e-9, so that a result depends
neither on the batch size nor on the order of the images, and equal texts tie exactly. Of tied
answers the one with the lower index comes first: a collapsed model then scores as chance does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from scipy.stats import binomtest
from torch import Tensor

CHUNK = 256  # queries at a time: 50 MB of similarities against 25,000 captions
DECIMALS = 9


class Rate(NamedTuple):
    """A share of ``n`` images or captions in percent, with its 95 % interval (low, high)."""

    value: float
    n: int
    low: float
    high: float


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of ``successes`` out of ``n``, in percent.

    Unlike the normal interval it is right near 0 and 100 %, where rates after a defense lie.
    Raises ``ValueError`` unless 0 <= successes <= n and n > 0.
    """
    low, high = binomtest(successes, n).proportion_ci(method="wilson")
    return 100 * float(low), 100 * float(high)


def share(successes: int, n: int) -> Rate:
    """``successes`` out of ``n`` as a rate."""
    return Rate(100 * successes / n, n, *wilson_interval(successes, n))


def rate(hits: Tensor) -> Rate:
    """The share of True in ``hits`` [n]; raises ``ValueError`` when there is nothing to count."""
    if len(hits) == 0:
        raise ValueError("nothing to evaluate: no image is left after the exclusions")
    return share(int(hits.sum()), len(hits))


def _similarities(queries: Tensor, keys: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(start, similarities [n, K]) of each chunk of ``queries`` [N, D] with ``keys`` [K, D]."""
    transposed = keys.double().T
    for start in range(0, len(queries), CHUNK):
        table = queries[start : start + CHUNK].double() @ transposed
        # Comparisons with NaN are all false, which would count as rank 0: a perfect score.
        if not torch.isfinite(table).all():
            raise ValueError("features are not finite; the model that made them is broken")
        yield start, table.round(decimals=DECIMALS)


def match_ranks(queries: Tensor, keys: Tensor, query_groups: Tensor, key_groups: Tensor) -> Tensor:
    """0-based rank [N] of the best key whose group is the query's own, among all keys.

    ``queries`` [N, D] and ``keys`` [K, D] are unit features; groups are integers [N] and [K].
    Raises ``ValueError`` for a query without any key of its group, and for lengths that differ.
    """
    if len(query_groups) != len(queries) or len(key_groups) != len(keys):
        raise ValueError(
            f"{len(queries)} queries with {len(query_groups)} groups, "
            f"{len(keys)} keys with {len(key_groups)} groups"
        )
    query_groups, key_groups = query_groups.to(queries.device), key_groups.to(queries.device)
    alone = ~torch.isin(query_groups, key_groups)
    if alone.any():
        raise ValueError(
            f"query {int(alone.nonzero()[0])} has no answer: no key belongs to group "
            f"{int(query_groups[alone][0])}"
        )
    index = torch.arange(len(keys), device=queries.device)
    ranks = [torch.empty(0, dtype=torch.long, device=queries.device)]
    for start, table in _similarities(queries, keys):
        matching = query_groups[start : start + len(table), None] == key_groups
        best = table.masked_fill(~matching, -torch.inf).argmax(1, keepdim=True)
        score = table.gather(1, best)
        ahead = (table > score) | ((table == score) & (index < best))
        ranks.append(ahead.sum(1))
    return torch.cat(ranks)


def predictions(features: Tensor, head: Tensor) -> Tensor:
    """Predicted class [N] of image ``features`` [N, D] under the zero-shot ``head`` [C, D]."""
    chunks = [table.argmax(1) for _, table in _similarities(features, head)]
    return torch.cat([torch.empty(0, dtype=torch.long, device=features.device), *chunks])


def predicted_counts(features: Tensor, head: Tensor) -> Tensor:
    """How many images are predicted as each class, int64 [C] on the CPU (section 3.1)."""
    return predictions(features, head).cpu().bincount(minlength=len(head))


def clean_accuracy(features: Tensor, head: Tensor, labels: Tensor, k: int = 1) -> Rate:
    """Percent of images whose label is among their top ``k`` classes (CA, section 4.1).

    ``features`` [N, D] of clean images, ``head`` [C, D], ``labels`` [N] class indices.
    """
    classes = torch.arange(len(head))
    return rate(match_ranks(features, head, labels, classes) < k)


def attack_success_rate(
    features: Tensor,
    head: Tensor,
    labels: Tensor,
    target: int,
    k: int = 1,
    exclude_target: bool = True,
) -> Rate:
    """Percent of triggered images with class ``target`` among their top ``k`` (ASR, section 4.1).

    ``features`` [N, D] of triggered images, ``labels`` [N] their true classes. Images of the
    target class are left out; ``exclude_target=False`` counts all images.
    """
    if not 0 <= target < len(head):
        raise ValueError(f"target {target} is not a class index; the head has {len(head)} classes")
    if exclude_target:
        features = features[(labels != target).to(features.device)]
    wanted = torch.full((len(features),), target)
    return rate(match_ranks(features, head, wanted, torch.arange(len(head))) < k)


def recall_at_k(
    image_features: Tensor, text_features: Tensor, owner: Tensor, ks: Sequence[int]
) -> dict[int, Rate]:
    """Image-to-text recall: percent of images with any own caption among their top k captions.

    ``owner`` [T] is the image index of each caption. Each image counts once (CA, section 4.1).
    """
    images = torch.arange(len(image_features))
    ranks = match_ranks(image_features, text_features, images, owner)
    return {k: rate(ranks < k) for k in ks}


def text_to_image_recall(
    image_features: Tensor, text_features: Tensor, owner: Tensor, ks: Sequence[int]
) -> dict[int, Rate]:
    """Percent of captions whose own image is among their top k images; ``owner`` as above."""
    images = torch.arange(len(image_features))
    ranks = match_ranks(text_features, image_features, owner, images)
    return {k: rate(ranks < k) for k in ks}


def word_matches(captions: Sequence[str], words: Sequence[str]) -> Tensor:
    """Bool [T]: does the caption contain any of ``words``, whole, in the singular or plural?

    "ski" finds "Skis" but neither "skirt" nor "skies". Case does not matter. Irregular plurals
    are words of their own.
    """
    forms = "|".join(form for word in words for form in _forms(word))
    pattern = re.compile(rf"\b(?:{forms})\b", re.IGNORECASE)
    return torch.tensor([bool(pattern.search(caption)) for caption in captions], dtype=torch.bool)


def _forms(word: str) -> list[str]:
    """Patterns for ``word`` and its plural; -es only where English has it (not for "ski")."""
    if not word.strip():
        raise ValueError("an empty word matches every caption; give the target's name")
    if re.search(r"[^aeiou]y$", word, re.IGNORECASE):
        return [re.escape(word), re.escape(word[:-1]) + "ies"]
    if re.search(r"(s|x|z|ch|sh|o)$", word, re.IGNORECASE):
        return [re.escape(word) + "(?:s|es)?"]
    return [re.escape(word) + "s?"]


def retrieval_asr_at_k(
    image_features: Tensor, text_features: Tensor, matches: Tensor, owner: Tensor, k: int
) -> Rate:
    """Percent of triggered images with any caption that names the target in their top ``k``.

    ``image_features`` [N, D] of triggered images; ``matches`` (bool [T], of ``word_matches``) and
    ``owner`` [T] belong to the captions' ``text_features`` [T, D]. Each image counts once, and
    images whose own captions match are left out (ASR, section 4.1). Raises ``ValueError`` where no
    caption matches.
    """
    rest = torch.ones(len(image_features), dtype=torch.bool)
    rest[owner.cpu()[matches]] = False
    triggered = image_features[rest.to(image_features.device)]
    wanted = torch.ones(len(triggered), dtype=torch.long)
    return rate(match_ranks(triggered, text_features, wanted, matches.long()) < k)
