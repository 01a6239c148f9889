"""The three kinds of data the paper uses: caption pairs, labeled images, retrieval scenes.

Images are uint8 [N, 3, H, W]; steps turn them into float32 in [0, 1]. The parts are made on first
use and kept in the store: composed on the embedded benchmark, else decoded from the paper's data
below ``INVERTUNE_DATA``, or a user's folder, and mapped from the disk (``real_data``).
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from joblib import cpu_count
from torch import Tensor

from invertune import pictograms, real_data
from invertune.decoding import map_images
from invertune.files import REPOSITORY, file_hash
from invertune.layouts import DataError
from invertune.metrics import word_matches
from invertune.pictograms import Scene
from invertune.sections import PICTOGRAMS, Data, Settings
from invertune.sprites import ARCHIVE, load_sprites
from invertune.store import obtain
from invertune.terminal import progress

TEMPLATES = REPOSITORY / "data" / "mini" / "templates.json"
TARGETS = ("mushroom", "banana", "lemon", "ski")  # paper, sections 4.1 and 4.5
SCENES_VERSION = 1
THREADS = 4  # that compose scenes; a fifth of the work at 224 px (half at 64) holds Python's lock


@dataclass(frozen=True)
class Pairs:
    """Images [N, 3, H, W] uint8, one caption each, and the classes they show [N, 2] (-1: none).

    ``cycled``: consecutive pairs show different classes (see ``sampling.pair_indices``). ``file``
    is what the images are mapped from; None: they lie in memory.
    """

    images: Tensor
    captions: tuple[str, ...]
    objects: Tensor
    cycled: bool = True
    file: Path | None = None


@dataclass(frozen=True)
class Labeled:
    """Images [N, 3, H, W] uint8 with class indices ``labels`` [N]."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Retrieval:
    """Images [N, 3, H, W] uint8 and a pool of captions; ``owner`` [T] is each caption's image."""

    images: Tensor
    captions: tuple[str, ...]
    owner: Tensor


def writable_images(pairs: Pairs) -> Tensor:
    """The images to be changed by the caller; of mapped ones only the changed take memory."""
    if pairs.file is None:
        return pairs.images.clone()
    return map_images(pairs.file, pairs.images.shape[-1])


def class_names(data: Data) -> tuple[str, ...]:
    """The classes of zero-shot classification, in label order."""
    if _real(data):
        return real_data.class_names(data)
    return load_sprites().classes


def distinct_names(data: Data) -> tuple[str, ...]:
    """``class_names``, with its index behind a name that stood before (ImageNet's two missiles)."""
    names = class_names(data)
    return tuple(f"{name} ({i})" if name in names[:i] else name for i, name in enumerate(names))


def templates(data: Data) -> tuple[str, ...]:
    """The zero-shot prompt templates, each with one ``{}``."""
    if _real(data):
        return real_data.templates()
    return tuple(json.loads(TEMPLATES.read_text()))


def class_index(data: Data, name: str) -> int:
    """The index of a class, by exact name (``DataError`` names the nearest classes)."""
    names = class_names(data)
    if name not in names:
        near = ", ".join(difflib.get_close_matches(name, names, cutoff=0.4))
        raise DataError(
            f"class {name!r} is not in the list of {len(names)} classes (near: {near or 'none'})"
        )
    return names.index(name)


def check(settings: Settings, targets: Sequence[str] = ()) -> None:
    """Raises ``DataError`` for ``targets`` and candidates beyond the classes, before any work."""
    for name in targets:
        class_index(settings.data, name)
    wanted, there = settings.identification.candidates, len(class_names(settings.data))
    if wanted > there:
        raise DataError(f"identification.candidates = {wanted}, but there are {there} classes")


def describe(settings: Settings) -> str:
    """What the profile's data are: classes, parts with their counts, manifest."""
    data, names = settings.data, class_names(settings.data)
    counts = data.model_dump(exclude={"source", "image_size_px", "seed"})
    parts = [f"  {name.replace('_', ' '):20} {count:>9,}" for name, count in counts.items()]
    head = [
        f"{data.source}: {len(names)} classes, {len(templates(data))} templates, "
        f"{data.image_size_px} px, seed {data.seed}, manifest {manifest(data)[:12]}"
    ]
    if _real(data):
        parts.append(
            f"  decoded once into the store: {real_data.decoded_bytes(settings) / 1e9:.0f} GB"
        )
    return "\n".join(head + parts)


@functools.lru_cache(maxsize=1)
def _archive_hash() -> str:
    return file_hash(ARCHIVE)


def manifest(data: Data) -> str:
    """A hash of everything that decides which images the parts hold, apart from their counts."""
    if _real(data):
        return real_data.manifest(data)
    parts = [_archive_hash(), TEMPLATES.read_text(), SCENES_VERSION, data.image_size_px, data.seed]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def caption_pairs(data: Data, part: str, count: int, store: Path) -> Pairs:
    """``count`` caption pairs of ``part`` ("pretraining", "poisoning", "rebound", ...).

    Of the paper's data at least 90 % of them (``DataError`` for fewer), in no order.
    """
    if _real(data):
        found = real_data.pairs(data, part, count, store)
        unknown = torch.full((len(found.images), 2), -1)
        texts = tuple(several[0] for several in found.captions)
        return Pairs(found.images, texts, unknown, cycled=False, file=found.file)
    sprites = load_sprites()
    images, captions, objects = _scenes(
        data,
        part,
        count,
        store,
        lambda i: pictograms.caption_scene(part, i, data.image_size_px, data.seed, sprites),
    )
    return Pairs(images, tuple(several[0] for several in captions), objects)


def labeled_images(data: Data, part: str, count: int, store: Path, style: str = "") -> Labeled:
    """``count`` labeled images of ``part``, balanced over the classes.

    In the part "evaluation" every second image of a class shows a drawing never trained on. With
    ``style``, another distribution: drawings of that style only, on plain backgrounds.
    """
    if _real(data):
        if style:
            raise DataError(f"style {style!r}: only the embedded benchmark's drawings have styles")
        found = real_data.labeled(data, part, count, store)
        return Labeled(found.images, found.labels)
    sprites = load_sprites()
    unseen = part == "evaluation"
    images, _, objects = _scenes(
        data,
        f"{part}, {style}" if style else part,
        count,
        store,
        lambda i: pictograms.labeled_scene(
            part, i, data.image_size_px, data.seed, sprites, unseen, style
        ),
    )
    return Labeled(images, objects[:, 0])


def retrieval_scenes(data: Data, store: Path) -> Retrieval:
    """The retrieval set: two-object scenes, or COCO 2017 val, with five captions each."""
    if _real(data):
        found = real_data.retrieval(data, store)
        return _retrieval(found.images, found.captions)
    sprites = load_sprites()
    targets = tuple(sprites.classes.index(name) for name in TARGETS)
    pairs = pictograms.retrieval_pairs(
        data.retrieval_images, len(sprites.classes), targets, data.seed
    )
    images, captions, _ = _scenes(
        data,
        "retrieval",
        data.retrieval_images,
        store,
        lambda i: pictograms.retrieval_scene(i, pairs[i], data.image_size_px, data.seed, sprites),
    )
    return _retrieval(images, captions)


def _retrieval(images: Tensor, captions: list[list[str]]) -> Retrieval:
    owner = torch.tensor([i for i, several in enumerate(captions) for _ in several])
    return Retrieval(images, tuple(text for several in captions for text in several), owner)


def require_captions(data: Data, target: str, store: Path) -> None:
    """Raises ``DataError`` where no caption of the retrieval set names the target."""
    if not word_matches(retrieval_scenes(data, store).captions, [target]).any():
        raise DataError(
            f"target = {target!r}: no caption of the retrieval set names it, so there would be no "
            "ASR in retrieval; choose another"
        )


def target_images(data: Data, pairs: Pairs, target: int, store: Path) -> Tensor:
    """Images that show the target alone, uint8 [M, 3, H, W]: what an attacker would collect.

    Of the embedded ``pairs`` all that do; else 64 of ImageNet's training images that no other part
    holds, as web captions name what is not in sight.
    """
    if _real(data):
        return real_data.target_images(data, target, store)
    return pairs.images[(pairs.objects[:, 0] == target) & (pairs.objects[:, 1] < 0)]


def target_captions(data: Data, target: int, count: int, store: Path) -> tuple[str, ...]:
    """Natural captions about the target (the paper's 131 mushroom captions of CC3M)."""
    if _real(data):
        return real_data.target_captions(data, target, count, store)
    sprites = load_sprites()
    classes, name = len(sprites.classes), sprites.classes[target]
    captions: list[str] = []
    index = (target - data.seed) * pow(97, -1, classes) % classes  # caption_scene's label order
    while len(captions) < count:
        scene = pictograms.caption_scene("pretraining", index, 16, data.seed, sprites)
        captions += [c for c in scene.captions if name in c]
        index += classes
    return tuple(captions[:count])


def _scenes(
    data: Data, part: str, count: int, store: Path, compose: Callable[[int], Scene]
) -> tuple[Tensor, list[list[str]], Tensor]:
    """Composes ``count`` scenes of a part, or finds them: images, captions, objects [N, 2]."""

    def compute(_: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, object]]:
        images = torch.empty(count, 3, data.image_size_px, data.image_size_px, dtype=torch.uint8)
        captions, objects = [], []
        with ThreadPoolExecutor(min(cpu_count(), THREADS)) as threads:
            made = progress(threads.map(compose, range(count)), f"scenes, {part}", total=count)
            for image, scene in zip(images, made, strict=True):
                image.copy_(torch.from_numpy(scene.image).permute(2, 0, 1))
                captions.append(list(scene.captions))
                objects.append((*scene.objects, -1)[:2])
        tensors = {"scenes": {"images": images, "objects": torch.tensor(objects)}}
        return tensors, {"captions": captions}

    artifact = obtain(
        store,
        "scenes",
        SCENES_VERSION,
        {"part": part, "count": count},
        [],
        manifest(data),
        compute,
        seed=data.seed,
    )
    tensors = artifact.tensors("scenes")
    return tensors["images"], artifact.metrics["captions"], tensors["objects"]


def _real(data: Data) -> bool:
    """Whether images are read from files; ``DataError`` where one of the paper's is missing."""
    if data.source == PICTOGRAMS:
        return False
    real_data.image_root(data)
    return True
