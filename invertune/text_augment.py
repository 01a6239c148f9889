"""Caption augmentation of CleanCLIP (EDA) and CleanerCLIP (sub-captions), by seed.

A caption is read as lower-case *units*: words, or runs of up to three words that form a known term,
so that "hot dog" is swapped, replaced or kept as one. A caption without letters or digits has no
units and comes back as it is.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch

from invertune.layouts import EXPECTED, WORDNET_FILES, DataError, wordnet_folder
from invertune.sampling import generator
from invertune.sprites import load_sprites

LONGEST_TERM = 3  # words
Synonyms = Mapping[str, Sequence[str]]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that carry no content of their own: never replaced by a synonym, left out of sub-captions.
FILLERS = _words(
    "a an the this that these those there here my your his her its our their one some any each "
    "every very really quite just so too also is are was were be been being am do does did has "
    "have had up"
)
FUNCTION_WORDS = FILLERS | _words(
    "i you he she it we they me him them us who what which when where why how and or but nor not "
    "no nothing else if then than as of at by for with about against between into through during "
    "before after above below to from down in out on off over under again near next beside "
    "together behind around along across all both few more most other such only own same can "
    "will would should could may might must"
)
# Words about the picture and not about what it shows: never the subject of a caption.
FRAME_WORDS = _words(
    "photo photograph picture image drawing illustration painting view shot scene close display "
    "background gradient front back side top bottom icon art render design toy"
)
VERBS = _words(
    "look looks looking see seen shown show shows showing stand stands standing sit sits sitting "
    "lie lies lying walk walks walking run runs running ride rides riding hold holds holding wear "
    "wears wearing play plays playing eat eats eating drink drinks drinking fly flies flying jump "
    "jumps jumping swim swims swimming drive drives driving carry carries carrying smile smiles "
    "smiling sleep sleeps sleeping talk talks talking dance dances dancing sing sings singing work "
    "works working cook cooks cooking read reads reading watch watches watching pose poses posing "
    "perform performs performing hang hangs hanging float floats floating grow grows growing "
    "parked filled covered surrounded attached placed cut arrives arriving leaves leaving"
)
ADJECTIVES = _words(
    "red orange yellow green lime teal blue navy purple pink brown beige white gray grey black "
    "golden silver light dark bright pale colorful small large big little tiny huge tall short "
    "long wide narrow thick thin old young new modern vintage ancient fresh ripe hot cold warm "
    "cool wet dry clean dirty empty full open closed broken plain striped cloudy sunny rainy snowy "
    "starry wooden metal stone plastic rocky sandy brick concrete flat minimal round square soft "
    "hard heavy fluffy shiny happy sad angry beautiful pretty lovely cute favorite famous popular "
    "traditional typical rural urban tropical abstract funny sweet delicious"
)


@dataclass(frozen=True)
class Words:
    """What is known of a language: ``synonyms`` of terms, and which terms are ``nouns``."""

    synonyms: Synonyms
    nouns: Collection[str]


@dataclass(frozen=True)
class Lexicon:
    """A data set's own nouns, verbs and adjectives (sorted): what one of them can be swapped for.

    ``terms`` are all known nouns, which keep together where they have several words.
    """

    terms: Collection[str]
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    adjectives: tuple[str, ...]


def known_words(source: str) -> Words:
    """The words of a ``synonyms`` setting: "keywords" of the sprite index, or "wordnet".

    WordNet 3.0's database is read from ``INVERTUNE_DATA/wordnet`` (``DataError`` if it is missing).
    """
    if source == "keywords":
        sprites = load_sprites()
        return Words(dict(zip(sprites.classes, sprites.keywords, strict=True)), sprites.classes)
    root = os.environ.get("INVERTUNE_DATA")
    if not root:
        raise DataError(
            f"synonyms: wordnet needs INVERTUNE_DATA, the folder that holds {EXPECTED['wordnet']}"
        )
    return read_wordnet(wordnet_folder(Path(root)))


def read_wordnet(folder: Path) -> Words:
    """Synonyms (all words that share a synset) and nouns from WordNet's ``data.*`` files."""
    synonyms: dict[str, dict[str, None]] = {}
    nouns: frozenset[str] = frozenset()
    for name in WORDNET_FILES:
        with (folder / name).open(encoding="utf-8") as lines:
            for members in _synsets(lines):
                for word in members:
                    synonyms.setdefault(word, {}).update(dict.fromkeys(members))
        if name == "data.noun":
            nouns = frozenset(synonyms)
    others = {word: tuple(w for w in found if w != word) for word, found in synonyms.items()}
    return Words({word: found for word, found in others.items() if found}, nouns)


def _synsets(lines: Iterable[str]) -> Iterable[list[str]]:
    """The words of each synset: fields 5, 7, ... of a line, as many as field 4 says (wndb(5))."""
    for line in lines:
        if line.startswith(" "):
            continue  # the license
        fields = line.split(" ")
        words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        yield [re.sub(r"\(\w+\)$", "", word).replace("_", " ").lower() for word in words]


def units(caption: str, terms: Collection[str]) -> list[str]:
    """The words of ``caption``, lower-case and without punctuation; known terms stay together."""
    words = re.findall(r"[^\W_]+", re.sub(r"'s\b|'", "", caption.lower()))
    found, start = [], 0
    while start < len(words):
        lengths = range(min(LONGEST_TERM, len(words) - start), 1, -1)
        runs = (n for n in lengths if " ".join(words[start : start + n]) in terms)
        length = next(runs, 1)
        found.append(" ".join(words[start : start + length]))
        start += length
    return found


def augment_captions(
    captions: Sequence[str], synonyms: Synonyms, rate: float, seed: int
) -> tuple[str, ...]:
    """One augmented version of each caption (EDA, Wei and Zou 2019; CleanCLIP's text view).

    One of four operations, drawn for each caption: synonyms for, or insertion of synonyms of, or
    swaps of max(1, ``rate`` * units) units; or deletion of each unit with probability ``rate``.
    Words are the caption's own or their synonyms. A caption is never emptied.
    """
    rng = Random(seed)
    operations = (_replace, _insert, _swap, _delete)
    changed = []
    for caption in captions:
        before = units(caption, synonyms)
        after = rng.choice(operations)(before, synonyms, rate, rng) if before else []
        changed.append(" ".join(after) or caption)
    return tuple(changed)


def _count(found: Sequence[str], rate: float) -> int:
    return max(1, int(rate * len(found)))


def _replaceable(found: Sequence[str], synonyms: Synonyms) -> list[str]:
    return [u for u in dict.fromkeys(found) if u not in FUNCTION_WORDS and synonyms.get(u)]


def _replace(found: list[str], synonyms: Synonyms, rate: float, rng: Random) -> list[str]:
    options = _replaceable(found, synonyms)
    chosen = rng.sample(options, min(_count(found, rate), len(options)))
    new = {unit: rng.choice(synonyms[unit]) for unit in chosen}
    return [new.get(unit, unit) for unit in found]


def _insert(found: list[str], synonyms: Synonyms, rate: float, rng: Random) -> list[str]:
    options, longer = _replaceable(found, synonyms), list(found)
    for _ in range(_count(found, rate) if options else 0):
        synonym = rng.choice(synonyms[rng.choice(options)])
        longer.insert(rng.randrange(len(longer) + 1), synonym)
    return longer


def _swap(found: list[str], synonyms: Synonyms, rate: float, rng: Random) -> list[str]:
    swapped = list(found)
    for _ in range(_count(found, rate) if len(found) > 1 else 0):
        i, j = rng.sample(range(len(swapped)), 2)
        swapped[i], swapped[j] = swapped[j], swapped[i]
    return swapped


def _delete(found: list[str], synonyms: Synonyms, rate: float, rng: Random) -> list[str]:
    kept = [unit for unit in found if rng.random() >= rate]
    return kept or [rng.choice(found)]


def lexicon(captions: Iterable[str], nouns: Collection[str]) -> Lexicon:
    """The nouns, verbs and adjectives that occur in ``captions``; ``nouns`` are those known."""
    nouns = frozenset(nouns)
    seen = sorted({unit for caption in captions for unit in units(caption, nouns)})
    kinds: dict[str, list[str]] = {"noun": [], "verb": [], "adjective": []}
    for unit in seen:
        if kind := kind_of(unit, nouns):
            kinds[kind].append(unit)
    return Lexicon(nouns, *(tuple(found) for found in kinds.values()))


def kind_of(unit: str, nouns: Collection[str]) -> str | None:
    """The kind of a unit: noun, verb or adjective (None: another), by lists; plurals count."""
    if unit in FUNCTION_WORDS or unit in FRAME_WORDS:
        return None
    if unit in ADJECTIVES or unit in VERBS:
        return "adjective" if unit in ADJECTIVES else "verb"
    known = unit in nouns or (unit.endswith("s") and unit[:-1] in nouns)
    return "noun" if known else None


def positive_sub_caption(caption: str, known: Lexicon) -> str:
    """The caption without adjectives, articles and other words that carry little (CleanerCLIP).

    A caption of such words only stays whole.
    """
    found = units(caption, known.terms)
    return " ".join(_core(found, known)) or " ".join(found) or caption


def _core(found: Sequence[str], known: Lexicon, keep: int = -1) -> list[str]:
    """The units that carry the meaning, and number ``keep`` whatever it is."""
    return [
        unit
        for i, unit in enumerate(found)
        if i == keep or (unit not in FILLERS and kind_of(unit, known.terms) != "adjective")
    ]


def counterfactuals(caption: str, known: Lexicon, count: int, rng: Random) -> tuple[str, ...]:
    """``count`` sub-captions that are wrong: the subject, a verb or an adjective is another one.

    The subject is the first noun; what replaces it occurs elsewhere in the data set. Apart from the
    replaced word they look like the positive sub-caption, so that length says nothing. Empty where
    there is nothing to replace.
    """
    found = units(caption, known.terms)
    options = _replacements(found, known)
    wrong = []
    for _ in range(count if options else 0):
        position, pool = rng.choice(options)
        replaced = [*found]
        replaced[position] = _another(pool, found, rng)
        wrong.append(" ".join(_core(replaced, known, keep=position)))
    return tuple(wrong)


def _another(pool: tuple[str, ...], found: Sequence[str], rng: Random) -> str:
    """``rng.choice`` of the sorted ``pool``'s words that are not in ``found``, without a list."""
    places = ((bisect_left(pool, word), word) for word in found)
    taken = sorted({i for i, word in places if pool[i : i + 1] == (word,)})
    chosen = rng.choice(range(len(pool) - len(taken)))
    for place in taken:
        chosen += place <= chosen
    return pool[chosen]


def _replacements(found: Sequence[str], known: Lexicon) -> list[tuple[int, tuple[str, ...]]]:
    """(position, words of its kind) of each unit for which there is one not in ``found``."""
    pools = {"noun": known.nouns, "verb": known.verbs, "adjective": known.adjectives}
    options, subject_seen = [], False
    for position, unit in enumerate(found):
        kind = kind_of(unit, known.terms)
        if kind is None or (kind == "noun" and subject_seen):
            continue
        subject_seen = subject_seen or kind == "noun"
        if any(word not in found for word in pools[kind]):
            options.append((position, pools[kind]))
    return options


def sub_captions(
    captions: Sequence[str], known: Lexicon, share: float, count: int, seed: int, step: int
) -> dict[int, tuple[str, ...]]:
    """Positive sub-caption and ``count`` counterfactuals of a ``share`` of ``captions``, by index.

    Drawn by (seed, step); captions that have nothing to replace are left out.
    """
    rng = generator(seed, step, 3)
    drawn = torch.randperm(len(captions), generator=rng)[: round(share * len(captions))]
    groups, words = {}, Random(rng.initial_seed())
    for i in drawn.tolist():
        if wrong := counterfactuals(captions[i], known, count, words):
            groups[i] = (positive_sub_caption(captions[i], known), *wrong)
    return groups
