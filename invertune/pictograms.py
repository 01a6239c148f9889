"""The embedded benchmark: image-caption scenes composed from openly licensed pictograms.

Every scene is drawn from its own generator, ``default_rng([seed, part, index])``, so scene *i* of a
part is the same however many scenes are made, and no two parts share an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from invertune.sprites import Sprites

PARTS = (
    "pretraining",
    "poisoning",
    "defense",
    "inversion",
    "heldout",
    "rebound",
    "evaluation",
    "retrieval",
)
NO_FLIP = frozenset({"newspaper", "hospital", "banknote", "stop sign", "billiard ball", "taxi"})
UNCOUNTABLE = frozenset({"milk", "honey", "fire", "bread", "cheese", "popcorn", "corn", "sushi"})
COLORS = {
    "red": (208, 40, 38),
    "orange": (240, 138, 30),
    "yellow": (250, 218, 62),
    "green": (62, 158, 66),
    "lime": (168, 218, 70),
    "teal": (24, 140, 138),
    "light blue": (150, 206, 242),
    "blue": (40, 98, 214),
    "navy": (22, 32, 92),
    "purple": (122, 60, 176),
    "pink": (248, 164, 198),
    "brown": (124, 78, 44),
    "beige": (232, 214, 180),
    "white": (248, 248, 248),
    "gray": (128, 130, 134),
    "black": (20, 20, 24),
}
STYLE_WORDS = {
    "noto": ("cartoon", "sticker"),
    "twemoji": ("flat icon", "vector icon"),
    "emojione": ("cartoon", "illustration"),
    "fxemoji": ("flat drawing", "clip art"),
    "fluent-flat": ("flat design", "minimal illustration"),
    "fluent-3d": ("3d render", "clay toy"),
    "openclipart": ("clip art", "vector drawing"),
}
PLAIN = (
    "{a}",
    "a photo of {a}",
    "a picture of {a}",
    "an image of the {n}",
    "there is {a} here",
    "one {n} seen up close",
    "{a} in the wild",
    "{n} on display",
    "look at this {n}",
    "my favorite {n}",
    "a drawing of {a}",
    "{n} and nothing else",
    "the {n}",
    "{n}",
    "a small {n}",
    "a large {n}",
    "close up of {a}",
    "this is {a}",
)
DETAILED = (
    "{a}, {keyword}",
    "{n}, {category}",
    "{style} of {a}",
    "{n} {style}",
    "{a} on {bg}",
    "{style} of {a} on {bg}",
    "{a}, {keyword}, {keyword2}",
    "{n} against {bg}",
)
PAIR = (
    "{a} and {b}",
    "{a} next to {b}",
    "{b} and {a}",
    "a photo of {a} and {b}",
    "{n} with {m}",
    "{a} together with {b}",
    "{b} beside {a}",
    "a picture of {n} and {m}",
    "{m} near {a}",
)


def _pick(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def _with_article(noun: str) -> str:
    if noun in UNCOUNTABLE or (noun.endswith("s") and not noun.endswith(("ss", "us"))):
        return noun
    return ("an " if noun[0] in "aeiou" and not noun.startswith("uni") else "a ") + noun


def _color(rng: np.random.Generator) -> tuple[str, np.ndarray]:
    name = _pick(rng, tuple(COLORS))
    return name, np.clip(np.asarray(COLORS[name]) + rng.normal(0, 16, 3), 0, 255)


def _background(
    rng: np.random.Generator, sprites: Sprites, size: int, plain: bool = False
) -> tuple[np.ndarray, str]:
    """A background [size, size, 3] in [0, 255] and the words for it."""
    name, first = _color(rng)
    other, second = _color(rng)
    kind = 0.0 if plain else rng.random()
    if kind < 0.3:
        return np.broadcast_to(first, (size, size, 3)).copy(), f"a plain {name} background"
    if kind < 0.52:
        angle = rng.uniform(0, 2 * np.pi)
        y, x = np.mgrid[0:size, 0:size] / (size - 1) - 0.5
        t = np.clip(x * np.cos(angle) + y * np.sin(angle) + 0.5, 0, 1)[..., None]
        return first * (1 - t) + second * t, f"a {name} and {other} gradient"
    if kind < 0.74:
        cells = int(rng.integers(3, 12))
        coarse = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
        cloud = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
        t = np.clip(cloud[..., None], 0, 1)
        return first * (1 - t) + second * t, f"a cloudy {name} background"
    if kind < 0.84:
        angle, waves = rng.uniform(0, np.pi), rng.uniform(2, 7)
        y, x = np.mgrid[0:size, 0:size] / size
        t = np.sin(2 * np.pi * waves * (x * np.cos(angle) + y * np.sin(angle)))
        t = (np.clip(4 * t, -1, 1) * 0.3 + 0.3)[..., None]
        return first * (1 - t) + second * t, f"a striped {name} background"
    photo, words = _pick(rng, sprites.backgrounds)
    side = int(min(photo.shape[:2]) * rng.uniform(0.3, 1))
    top = int(rng.integers(photo.shape[0] - side + 1))
    left = int(rng.integers(photo.shape[1] - side + 1))
    crop = Image.fromarray(photo[top : top + side, left : left + side])
    pixels = np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR), np.float64)
    return pixels * rng.uniform(0.75, 1.15), _pick(rng, words)


def _draw(
    canvas: np.ndarray,
    rng: np.random.Generator,
    sprites: Sprites,
    index: int,
    side: float,
    center: tuple[float, float],
) -> None:
    """Blends drawing ``index`` into ``canvas``, ``side`` px long, around ``center`` (x, y)."""
    size = canvas.shape[0]
    pixels = max(8, round(side))
    picture = sprites.pictures[index].rotate(rng.normal(0, 13), Image.Resampling.BILINEAR)
    picture = picture.resize(
        (pixels, pixels), Image.Resampling.BOX if pixels < 48 else Image.Resampling.BILINEAR
    )
    if rng.random() < 0.5 and sprites.entries[index]["class"] not in NO_FLIP:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    rgba = np.asarray(picture, np.float64)
    left, top = round(center[0] - pixels / 2), round(center[1] - pixels / 2)
    x0, y0, x1, y1 = max(0, left), max(0, top), min(size, left + pixels), min(size, top + pixels)
    part = rgba[y0 - top : y1 - top, x0 - left : x1 - left]
    alpha = part[..., 3:] / 255
    color = np.clip(part[..., :3] * rng.uniform(0.8, 1.15, 3), 0, 255)
    canvas[y0:y1, x0:x1] = canvas[y0:y1, x0:x1] * (1 - alpha) + color * alpha


@dataclass(frozen=True)
class Scene:
    """One composed scene: ``image`` uint8 [size, size, 3], its captions and its objects."""

    image: np.ndarray
    captions: tuple[str, ...]
    objects: tuple[int, ...]


def _single(
    rng: np.random.Generator,
    sprites: Sprites,
    size: int,
    label: int,
    drawings: tuple[int, ...],
    plain: bool = False,
) -> Scene:
    canvas, background = _background(rng, sprites, size, plain)
    drawing = _pick(rng, drawings)
    scale = rng.uniform(0.55, 0.98)
    center = rng.uniform(0.38, 0.62, 2) * size
    _draw(canvas, rng, sprites, drawing, scale * size, (center[0], center[1]))
    caption = _caption(rng, sprites, label, drawing, background)
    return Scene(np.clip(canvas, 0, 255).astype(np.uint8), (caption,), (label,))


def _double(
    rng: np.random.Generator,
    sprites: Sprites,
    size: int,
    labels: tuple[int, int],
    drawings: tuple[tuple[int, ...], tuple[int, ...]],
    captions: int,
) -> Scene:
    canvas, _ = _background(rng, sprites, size)
    places = np.stack([rng.uniform(0.22, 0.32, 2), rng.uniform(0.68, 0.78, 2)])
    free = rng.uniform(0.3, 0.7, 2)
    axis = int(rng.integers(2))
    for k in range(2):
        x, y = (places[k, 0], free[k]) if axis else (free[k], places[k, 0])
        side = rng.uniform(0.42, 0.6) * size
        drawing = _pick(rng, drawings[k])
        _draw(canvas, rng, sprites, drawing, side, (x * size, y * size))
    n, m = (sprites.classes[label] for label in labels)
    names = {"n": n, "m": m, "a": _with_article(n), "b": _with_article(m)}
    chosen = rng.permutation(len(PAIR))[:captions]
    texts = tuple(PAIR[i].format(**names) for i in chosen)
    return Scene(np.clip(canvas, 0, 255).astype(np.uint8), texts, labels)


def _caption(
    rng: np.random.Generator, sprites: Sprites, label: int, drawing: int, background: str
) -> str:
    entry = sprites.entries[drawing]
    noun = sprites.classes[label]
    own = entry.get("label", noun)
    if own != noun and noun in own and rng.random() < 0.3:
        noun = own  # the drawing's own name: "brown mushroom", "teddy bear"
    template = _pick(rng, PLAIN if rng.random() < 0.8 else DETAILED)
    return template.format(
        n=noun,
        a=_with_article(noun),
        bg=background,
        category=sprites.categories[label],
        keyword=_pick(rng, sprites.keywords[label]),
        keyword2=_pick(rng, sprites.keywords[label]),
        style=_pick(rng, STYLE_WORDS[entry["style"]]),
    )


def caption_scene(part: str, index: int, size: int, seed: int, sprites: Sprites) -> Scene:
    """Scene ``index`` of a part with captions (the embedded CC3M), training drawings only."""
    rng = np.random.default_rng([seed, PARTS.index(part), index])
    label = (index * 97 + seed) % len(sprites.classes)
    if rng.random() >= 0.35:  # the others show two objects
        return _single(rng, sprites, size, label, sprites.training[label])
    other = int(rng.integers(len(sprites.classes) - 1))
    other += other >= label
    drawings = (sprites.training[label], sprites.training[other])
    return _double(rng, sprites, size, (label, other), drawings, 1)


def labeled_scene(
    part: str,
    index: int,
    size: int,
    seed: int,
    sprites: Sprites,
    held_out_drawings: bool,
    style: str = "",
) -> Scene:
    """Scene ``index`` of a balanced classification part (the embedded ImageNet).

    With ``held_out_drawings`` every second image of a class shows a drawing never trained on. With
    ``style``: only drawings of that style (all, for a class that has none), on plain backgrounds.
    """
    rng = np.random.default_rng([seed, PARTS.index(part), index])
    label, turn = index % len(sprites.classes), index // len(sprites.classes)
    unseen = held_out_drawings and turn % 2 == 1
    drawings = sprites.held_out[label] if unseen else sprites.training[label]
    own = tuple(i for i in drawings if sprites.entries[i]["style"] == style)
    return _single(rng, sprites, size, label, own or drawings, plain=bool(style))


def retrieval_pairs(
    count: int, classes: int, targets: tuple[int, ...], seed: int
) -> list[tuple[int, int]]:
    """Class pairs of the retrieval scenes; each target stands in exactly three scenes."""
    rng = np.random.default_rng([seed, PARTS.index("retrieval"), 2**31])
    others = np.setdiff1d(np.arange(classes), targets)
    pairs = [(t, int(rng.choice(others))) for t in targets for _ in range(3)]
    while len(pairs) < count:
        first, second = rng.choice(others, 2, replace=False)
        pairs.append((int(first), int(second)))
    return [pairs[i] for i in rng.permutation(count)]


def retrieval_scene(
    index: int, pair: tuple[int, int], size: int, seed: int, sprites: Sprites
) -> Scene:
    """Retrieval scene ``index`` (the embedded COCO): two objects, five captions, any drawing."""
    rng = np.random.default_rng([seed, PARTS.index("retrieval"), index])
    first, second = (sprites.training[k] + sprites.held_out[k] for k in pair)
    return _double(rng, sprites, size, pair, (first, second), 5)
