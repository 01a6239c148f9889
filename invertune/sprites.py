"""The sprite archive: the drawings and backgrounds that scenes are composed from."""

from __future__ import annotations

import functools
import io
import json
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from invertune.files import REPOSITORY

ARCHIVE = REPOSITORY / "data" / "mini" / "sprites.zip"


@dataclass(frozen=True)
class Sprites:
    """The sprite archive: classes in alphabetical order, each with its drawings.

    ``pictures`` are RGBA images of 96 px; ``training`` and ``held_out`` list, for each class, the
    indices of its drawings (one design family of every class never appears in training).
    """

    classes: tuple[str, ...]
    categories: tuple[str, ...]
    keywords: tuple[tuple[str, ...], ...]
    pictures: tuple[Image.Image, ...]
    entries: tuple[dict[str, Any], ...]
    training: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]
    backgrounds: tuple[tuple[np.ndarray, tuple[str, ...]], ...]


@functools.cache
def load_sprites() -> Sprites:
    """Reads the sprite archive (a zip of WebP pictures and ``index.json``)."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        index = json.loads(archive.read("index.json"))

        def picture(name: str, mode: str) -> Image.Image:
            return Image.open(io.BytesIO(archive.read(name))).convert(mode)

        pictures = tuple(picture(e["file"], "RGBA") for e in index["sprites"])
        photos = tuple(
            (np.asarray(picture(f"photos/{name}.webp", "RGB")), tuple(photo["words"]))
            for name, photo in index["backgrounds"].items()
        )
    names = tuple(c["name"] for c in index["classes"])
    by_class: dict[str, tuple[list[int], list[int]]] = {n: ([], []) for n in names}
    for i, entry in enumerate(index["sprites"]):
        by_class[entry["class"]][bool(entry["held_out"])].append(i)
    return Sprites(
        classes=names,
        categories=tuple(c["category"] for c in index["classes"]),
        keywords=tuple(_usable_keywords(c) for c in index["classes"]),
        pictures=pictures,
        entries=tuple(index["sprites"]),
        training=tuple(tuple(by_class[n][0]) for n in names),
        held_out=tuple(tuple(by_class[n][1]) for n in names),
        backgrounds=photos,
    )


def _usable_keywords(concept: dict[str, Any]) -> tuple[str, ...]:
    words = set(concept["name"].split())
    good = (k for k in concept["keywords"] if k not in words and k.isascii() and 2 < len(k) < 20)
    return tuple(good) or (concept["category"],)
