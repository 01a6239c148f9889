"""Rebuilds ``data/mini/models/*/merges.txt.gz``, the vocabulary of the embedded models.

CLIP's byte-pair vocabulary has 49,408 entries, most of them words that the embedded benchmark never
uses. This keeps, in CLIP's own order, the merges that its words need. Any other word still encodes:
it falls apart into shorter pieces, at worst into bytes. For maintainers; needs only the project.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import pairwise

import open_clip

from invertune import pictograms
from invertune.models import CONFIG, MERGES, MODEL_FOLDER
from invertune.sprites import Sprites, load_sprites

HEADER = "#version: shortened from open_clip's merges to the words of the embedded benchmark\n"
BYTES, SPECIAL = 512, 2  # every byte, inside and at the end of a word; start and end of text
BACKGROUND_WORDS = "a plain cloudy striped gradient and background"

Merge = tuple[str, str]


def texts(sprites: Sprites) -> Iterator[str]:
    """Everything that a caption can be made of; a template's fields are left out."""
    yield from (*pictograms.PLAIN, *pictograms.DETAILED, *pictograms.PAIR)
    yield from (*sprites.classes, *sprites.categories)
    yield from (keyword for keywords in sprites.keywords for keyword in keywords)
    yield from (entry["label"] for entry in sprites.entries if "label" in entry)
    yield from (word for words in pictograms.STYLE_WORDS.values() for word in words)
    yield from (BACKGROUND_WORDS, *pictograms.COLORS)
    yield from (word for _, words in sprites.backgrounds for word in words)


def words_of(lines: Iterable[str]) -> set[str]:
    """Words, single digits and runs of punctuation, as CLIP's tokenizer splits English text."""
    plain = (re.sub(r"\{.*?\}", "", line.lower()) for line in lines)
    return {word for line in plain for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", line)}


def merges_of(word: str, ranks: dict[Merge, int]) -> set[Merge]:
    """The merges that byte-pair encoding applies to ``word``, best rank first."""
    parts = [*word[:-1], word[-1] + "</w>"]
    used: set[Merge] = set()
    while known := [pair for pair in pairwise(parts) if pair in ranks]:
        best = min(known, key=lambda pair: ranks[pair])
        used.add(best)
        merged: list[str] = []
        for part in parts:
            if merged and (merged[-1], part) == best:
                merged[-1] += part
            else:
                merged.append(part)
        parts = merged
    return used


def vocabulary(sprites: Sprites) -> list[Merge]:
    """The merges that the benchmark's words need, in the order of open_clip's full list."""
    ranks: dict[Merge, int] = open_clip.SimpleTokenizer().bpe_ranks
    needed = set().union(*(merges_of(word, ranks) for word in words_of(texts(sprites))))
    return sorted(needed, key=lambda merge: ranks[merge])


def main() -> None:
    """The command line: writes the merges of all embedded models, or compares them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    check = parser.parse_args().check
    merges = vocabulary(load_sprites())
    size = BYTES + len(merges) + SPECIAL
    text = HEADER + "\n".join(" ".join(merge) for merge in merges)
    differing = []
    for folder in sorted(path.parent for path in MODEL_FOLDER.glob(f"*/{CONFIG}")):
        declared = json.loads((folder / CONFIG).read_text())["model_cfg"]["text_cfg"]["vocab_size"]
        if declared != size:
            sys.exit(f"{folder / CONFIG} says vocab_size {declared}, but the words need {size}")
        new = gzip.compress(text.encode(), mtime=0)
        if check and (folder / MERGES).read_bytes() != new:
            differing.append(folder.name)
        if not check:
            (folder / MERGES).write_bytes(new)
    print(f"{len(merges)} merges, {size} tokens")
    if differing:
        sys.exit(f"{MERGES} differs in {', '.join(differing)}")


if __name__ == "__main__":
    main()
