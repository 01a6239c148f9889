"""Where the paper's data lie below ``INVERTUNE_DATA``, and which files each part takes.

Here: ImageNet-1K in class folders, COCO 2017 val with its captions, and where WordNet lies; CC3M is
in ``cc3m``. A user's own class folders are read as ImageNet's training set is. A sample's part
follows from the seed and the files' names, so that parts share no image and a part only grows with
its count.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip

from invertune.decoding import Sample
from invertune.terminal import printable

ROOT = "INVERTUNE_DATA"
CAPTIONS = "coco/annotations/captions_val2017.json"
WORDNET_FILES = ("data.noun", "data.verb", "data.adj", "data.adv")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
CAPTIONS_PER_IMAGE = 5
CAPTION_LETTERS = 2000  # what is longer has more tokens than any CLIP reads
SHARE = 0.9  # of the wanted images that must be there
TRAIN_PARTS = {"inversion": (0.0, 0.7), "heldout": (0.7, 0.9), "references": (0.9, 1.0)}
EXPECTED = {
    "cc3m": "cc3m/00000.tar, ... as img2dataset writes them (KEY.jpg and KEY.txt; "
    "--output_format webdataset --image_size 256 --resize_mode keep_ratio), or one cc3m/NAME.csv "
    "with the columns image and caption and paths relative to it; URLs: "
    "ai.google.com/research/ConceptualCaptions",
    "imagenet": "imagenet/train/n01440764/*.JPEG and imagenet/val/n01440764/*.JPEG, 1,000 class "
    "folders each; from image-net.org, ILSVRC2012 (its val archive is flat: move each image into "
    "its class's folder)",
    "coco": f"coco/val2017/*.jpg and {CAPTIONS}; from cocodataset.org, val2017.zip and "
    "annotations_trainval2017.zip",
    "wordnet": f"wordnet/ with {', '.join(WORDNET_FILES)} (CleanCLIP's synonyms); WordNet 3.0's "
    "database from wordnet.princeton.edu, WNdb-3.0.tar.gz, its folder dict, or /usr/share/wordnet "
    "of the Debian package wordnet-base",
}
OWN_LAYOUT = (
    "a folder for each class, named by it (golden_retriever) or by its WordNet id (n02099601), "
    f"with five images or more ({', '.join(SUFFIXES)}) directly in it"
)


class DataError(ValueError):
    """Data that is missing or not what the profile says, with the layout that is expected."""


@dataclass(frozen=True)
class Chosen:
    """The samples of one part, with their captions or their class indices.

    ``notes`` says what was left out on the way.
    """

    samples: list[Sample]
    captions: list[list[str]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def data_root() -> Path:
    """``$INVERTUNE_DATA``; ``DataError`` where it, a folder of it or WordNet is missing."""
    root = os.environ.get(ROOT)
    if not root:
        layout = "; ".join(EXPECTED.values())
        raise DataError(
            "this profile reads CC3M, ImageNet-1K, COCO and WordNet: set INVERTUNE_DATA to the "
            f"folder that holds {layout}"
        )
    for folder in ("cc3m", "imagenet/train", "imagenet/val", "coco/val2017", "coco/annotations"):
        if not (Path(root) / folder).is_dir():
            expected = EXPECTED[folder.split("/")[0]]
            raise DataError(f"not found: {Path(root) / folder} (expected: {expected})")
    wordnet_folder(Path(root))
    return Path(root)


def wordnet_folder(root: Path) -> Path:
    """The folder of WordNet's database below ``root``; ``DataError`` where a file is missing."""
    folder = root / "wordnet"
    for name in WORDNET_FILES:
        if not (folder / name).is_file():
            raise DataError(f"not found: {folder / name} (expected: {EXPECTED['wordnet']})")
    return folder


def image_files(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes of the images directly in ``folder``, sorted; ``DataError`` for none."""
    with os.scandir(folder) as entries:
        found = sorted(
            (e.name, e.stat().st_size)
            for e in entries
            if e.name.lower().endswith(SUFFIXES) and not e.name.startswith(".") and e.is_file()
        )
    if not found:
        name = next((name for name in reversed(folder.parts) if name in EXPECTED), "")
        raise DataError(f"{folder} holds no images; expected: {EXPECTED.get(name, OWN_LAYOUT)}")
    return found


def hash_position(seed: int, name: str) -> float:
    """Where in [0, 1) a sample stands in the random order of ``seed``."""
    digest = hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def one_line(text: str) -> str:
    """A caption of at most 2,000 letters, without line breaks, tabs and double spaces."""
    return " ".join(text[:CAPTION_LETTERS].encode(errors="replace").decode().split())


@functools.lru_cache(maxsize=1)
def wordnet_ids() -> tuple[str, ...]:
    """The 1,000 classes of ImageNet-1K by WordNet id, in label order."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


def class_folders(folder: Path) -> list[Path]:
    """The class folders below imagenet/train or imagenet/val, in label order.

    ``DataError`` where one of the 1,000 is missing, as at a wrong depth; others do not count.
    """
    ids = wordnet_ids()
    held = {entry.name for entry in folder.iterdir() if entry.is_dir()}
    missing = [name for name in ids if name not in held]
    if missing:
        others = sorted(held.difference(ids)) or sorted(p.name for p in folder.iterdir())
        instead = f", but has {others[0]!r}" if others else ""
        raise DataError(
            f"{folder} lacks {len(missing):,} of 1,000 class folders, the first is "
            f"{missing[0]}{instead}; expected: {EXPECTED['imagenet']}"
        )
    return [folder / name for name in ids]


@functools.lru_cache(maxsize=4)
def own_classes(folder: Path) -> tuple[tuple[str, Path], ...]:
    """Name and folder of each class below a user's ``folder``, in the order of the folders' names.

    The name is the folder's, with spaces for underscores; of a WordNet id of ImageNet-1K, CLIP's.
    """
    if not folder.is_dir():
        raise DataError(f"not found: {folder} (expected: {OWN_LAYOUT})")
    held = sorted(e.name for e in folder.iterdir() if e.is_dir() and not e.name.startswith("."))
    if len(held) < 2:
        raise DataError(f"{folder} holds {len(held)} class folders; expected: {OWN_LAYOUT}")
    known = dict(zip(wordnet_ids(), open_clip.IMAGENET_CLASSNAMES, strict=True))
    names = [known.get(name, printable(name.replace("_", " "))) for name in held]
    return tuple(  # two classes of ImageNet are called missile, two sunglasses
        (name if names.count(name) == 1 else f"{name} ({printable(own)})", folder / own)
        for name, own in zip(names, held, strict=True)
    )


def part_of(part: str, count: int) -> slice:
    """The slice of a class's ``count`` shuffled images that belongs to ``part``; all of them for
    other parts.
    """
    low, high = TRAIN_PARTS.get(part, (0.0, 1.0))
    return slice(int(low * count), int(high * count))


def image_samples(
    folders: Sequence[Path], part: str, count: int, seed: int, only: int | None = None
) -> Chosen:
    """At most ``count`` images of a part of class folders, in turn over the classes.

    "inversion", "heldout" and "references" share the images; any other part takes all. With
    ``only``, images of that class alone.
    """
    turns: list[tuple[int, int, Sample]] = []
    for label, folder in enumerate(folders):
        if only not in (None, label):
            continue
        names = sorted(
            (name for name, _ in image_files(folder)), key=functools.partial(hash_position, seed)
        )
        kept = names[part_of(part, len(names))]
        turns += [
            (turn, label, Sample(f"{folder.name}/{name}", str(folder / name)))
            for turn, name in enumerate(kept[:count])
        ]
    turns = sorted(turns, key=lambda t: t[:2])[:count]
    return Chosen([sample for *_, sample in turns], labels=[label for _, label, _ in turns])


def retrieval_samples(root: Path, count: int, seed: int) -> Chosen:
    """At most ``count`` images of COCO 2017 val with their first five captions each."""
    images, captions = read_coco(root)
    enough = [name for name in images if len(captions[name]) >= CAPTIONS_PER_IMAGE]
    chosen = sorted(sorted(enough, key=lambda name: hash_position(seed, name))[:count])
    folder = root / "coco/val2017"
    return Chosen(
        [Sample(name, str(folder / name)) for name in chosen],
        captions=[captions[name][:CAPTIONS_PER_IMAGE] for name in chosen],
    )


def read_coco(root: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The images that are there and the captions of each, in the order of their ids."""
    path = root / CAPTIONS
    if not path.is_file():
        held = ", ".join(sorted(p.name for p in path.parent.glob("captions*"))) or "no captions"
        raise DataError(f"not found: {path} (there: {held}; expected: {EXPECTED['coco']})")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        names = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        texts: dict[str, list[str]] = {name: [] for name in names.values()}
        for note in sorted(content["annotations"], key=lambda a: int(a["id"])):
            texts[names[int(note["image_id"])]].append(one_line(str(note["caption"])))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path} is not a captions file of COCO ({error!r})") from None
    files = {name for name, _ in image_files(root / "coco/val2017")}
    there = [name for name in texts if name in files]  # plain names only: no path leads elsewhere
    if len(there) < SHARE * max(len(texts), len(files)):
        absent = next((name for name in texts if name not in files), "none")
        raise DataError(
            f"only {len(there):,} images are both in {path} ({len(texts):,}) and in coco/val2017 "
            f"({len(files):,}); first without a file: {absent}. Captions of another year or split, "
            f"or a half download; expected: {EXPECTED['coco']}"
        )
    return there, texts
