"""The paper's data: parts of CC3M, ImageNet-1K and COCO, decoded once and mapped from the disk.

Each part becomes one raw file in the store, ``.images/KEY.u8`` (150,528 bytes an image at 224 px,
75 GB for 500,000 pairs), beside the entry that holds its captions, labels and sample names. A
user's own class folders ("images:FOLDER") are read the same way; they have no captions.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from torch import Tensor

from invertune import distributed
from invertune.cc3m import PAIR_PARTS, caption_source, pair_samples
from invertune.decoding import CHUNK, JOURNAL, decode_all, map_images
from invertune.files import file_hash
from invertune.layouts import (
    CAPTIONS,
    EXPECTED,
    OWN_LAYOUT,
    SHARE,
    TRAIN_PARTS,
    WORDNET_FILES,
    Chosen,
    DataError,
    class_folders,
    data_root,
    image_files,
    image_samples,
    own_classes,
    part_of,
    read_coco,
    retrieval_samples,
    wordnet_folder,
)
from invertune.metrics import word_matches
from invertune.sections import OWN_IMAGES, Data, Settings
from invertune.store import Artifact, Made, no_link, obtain
from invertune.terminal import printable

VERSION = 2  # raise where other images or other pixels come out
IMAGES = ".images"
REFERENCES = 64  # images of the target that an attacker collects (BadCLIP's code)


@dataclass(frozen=True)
class Part:
    """Images [N, 3, H, W] uint8, mapped copy-on-write from ``file``.

    ``captions`` holds a list per image, or is empty; ``labels`` [N] are class indices, or empty.
    """

    images: Tensor
    captions: list[list[str]]
    labels: Tensor
    file: Path


def own_folder(data: Data) -> Path | None:
    """The user's folder of class folders that ``data.source`` names; None for the paper's data."""
    named = data.source.startswith(OWN_IMAGES)
    return Path(data.source.removeprefix(OWN_IMAGES)) if named else None


def image_root(data: Data) -> Path:
    """Where the images lie: the user's folder, or that of the paper's data, which is all there."""
    return own_folder(data) or data_root()


def class_names(data: Data) -> tuple[str, ...]:
    """The classes in label order: CLIP's curated names of ImageNet-1K's, or the user's."""
    folder = own_folder(data)
    if folder is None:
        return tuple(open_clip.IMAGENET_CLASSNAMES)
    return tuple(name for name, _ in own_classes(folder))


def templates() -> tuple[str, ...]:
    """CLIP's 80 prompt templates, each with one ``{}`` (CLIP, section 3.1.4)."""
    return tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)


def manifest(data: Data) -> str:
    """A hash of every file's name and size, the size of images and the seed of the draws.

    Raises ``DataError`` where the layout is wrong, before any work starts.
    """
    files = fingerprint(image_root(data), own_folder(data) is not None)
    text = (VERSION, files, class_names(data), templates())
    return hashlib.sha256(repr((*text, data.image_size_px, data.seed)).encode()).hexdigest()


@functools.lru_cache(maxsize=4)
def fingerprint(root: Path, own: bool) -> str:
    """A hash of the files below ``root``: names and sizes; of CSV, captions and words the content.

    ``own``: a user's class folders.
    """
    digest = hashlib.sha256()
    lines = _class_files(folder for _, folder in own_classes(root)) if own else _inventory(root)
    for line in lines:
        digest.update(f"{line}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _inventory(root: Path) -> Iterator[str]:
    source = caption_source(root)
    read_coco(root)
    if isinstance(source, Path):
        yield f"{source.name} {file_hash(source)}"
    else:
        yield from (f"{path.name} {path.stat().st_size}" for path in source)
    for split in ("train", "val"):
        folders = class_folders(root / "imagenet" / split)
        yield from (f"{split} {line}" for line in _class_files(folders))
    yield from (f"{name} {size}" for name, size in image_files(root / "coco/val2017"))
    yield file_hash(root / CAPTIONS)
    yield from (file_hash(root / "wordnet" / name) for name in WORDNET_FILES)


def _class_files(folders: Iterable[Path]) -> Iterator[str]:
    for folder in folders:
        yield from (f"{folder.name} {name} {size}" for name, size in image_files(folder))


def problems(root: Path) -> Iterator[str]:
    """What is wrong with each data set below ``root``, at a glance: a line for each."""
    looks: dict[str, Callable[[], object]] = {
        "cc3m": lambda: caption_source(root),
        "imagenet": lambda: [class_folders(root / "imagenet" / s) for s in ("train", "val")],
        "coco": lambda: read_coco(root),
        "wordnet": lambda: wordnet_folder(root),
    }
    for name, look in looks.items():
        try:
            look()
        except DataError as error:
            yield f"{name}: {error}"
        except FileNotFoundError as error:
            yield f"{name}: not found: {error.filename} (expected: {EXPECTED[name]})"


def decoded_bytes(settings: Settings) -> int:
    """Bytes of the store that the parts of a whole profile take once they are decoded."""
    data, few = settings.data, settings.generalization
    images = data.inversion_images + data.heldout_images + data.evaluation_images
    images += data.retrieval_images + few.few_images + few.few_heldout_images
    pairs = data.poisoning_pairs + settings.baselines.pairs + settings.rebound.pairs
    return (images + pairs) * 3 * data.image_size_px**2


def pairs(data: Data, part: str, count: int, store: Path) -> Part:
    """``count`` pairs of CC3M, one caption each: "poisoning", "defense" or "rebound"."""
    _require_captions(data)
    return _part(data, part, count, store, lambda r: pair_samples(r, part, count, data.seed))


def labeled(data: Data, part: str, count: int, store: Path, only: int | None = None) -> Part:
    """``count`` images of ImageNet-1K in turn over the classes, or of the class ``only``.

    "evaluation" is the validation set; "inversion", "heldout" and "references" share no image of
    the training set, or of the user's images.
    """
    name = part if only is None else f"{part} of class {only}"

    def choose(root: Path) -> Chosen:
        if own_folder(data):
            folders = [folder for _, folder in own_classes(root)]
        else:
            split = "train" if part in TRAIN_PARTS else "val"
            folders = class_folders(root / "imagenet" / split)
        return image_samples(folders, part, count, data.seed, only)

    return _part(data, name, count, store, choose)


def fitted(settings: Settings) -> Settings:
    """The settings with at most as many images for inversion and held out as a user's folder has.

    Raises ``DataError`` where these are too few for what the settings ask of steps 1 to 3.
    """
    root, data = own_folder(settings.data), settings.data
    if root is None:
        return settings
    sizes = [len(image_files(folder)) for _, folder in own_classes(root)]
    held = {}
    for part in ("inversion", "heldout"):
        there = sum(len(range(size)[part_of(part, size)]) for size in sizes)
        held[f"{part}_images"] = min(there, getattr(data, f"{part}_images"))
    least = {
        "identification.batch": settings.identification.batch,
        "inversion.batch": settings.inversion.batch,
        "tuning.images": settings.tuning.images,
    }
    name = max(least, key=lambda key: least[key])
    if held["heldout_images"] == 0 or held["inversion_images"] < least[name]:
        raise DataError(
            f"{root} holds {sum(sizes):,} images, which leave {held['inversion_images']:,} for "
            f"inversion and {held['heldout_images']:,} held out, but {name} = {least[name]}; add "
            f"images or lower it by --overrides; expected: {OWN_LAYOUT}"
        )
    return settings.model_copy(update={"data": data.model_copy(update=held)})


def retrieval(data: Data, store: Path) -> Part:
    """COCO 2017 val with the first five captions of each image."""
    _require_captions(data)
    count = data.retrieval_images
    return _part(data, "retrieval", count, store, lambda r: retrieval_samples(r, count, data.seed))


def target_captions(data: Data, target: int, count: int, store: Path) -> tuple[str, ...]:
    """The first ``count`` captions of the poisoning part that hold the target's name as a word.

    Plurals count, by ``word_matches`` (appendix A.1: 131 captions about mushrooms from CC3M). Where
    there are fewer, these; raises ``DataError`` for less than half.
    """
    name = class_names(data)[target]
    parts = pairs(data, "poisoning", data.poisoning_pairs, store).captions
    captions = [texts[0] for texts in parts]
    held = word_matches(captions, [name]).tolist()
    found = tuple(itertools.compress(captions, held))[:count]
    if len(found) < max(1, count / 2):
        raise DataError(
            f"only {len(found)} of {len(captions):,} captions of CC3M hold the word {name!r}, "
            f"{count} wanted (attacks.target_captions); raise data.poisoning_pairs or lower it"
        )
    if len(found) < count:
        print(f"target captions: {len(found)} of {count} found", flush=True)
    return found


def target_images(data: Data, target: int, store: Path) -> Tensor:
    """Images of the target, uint8 [64, 3, H, W], as an attacker would collect them.

    They come from ImageNet's training set and are used for nothing else.
    """
    return labeled(data, "references", REFERENCES, store, only=target).images


def _part(data: Data, name: str, count: int, store: Path, choose: Callable[[Path], Chosen]) -> Part:
    """Decodes a part, or finds it in the store; decodes again where its pixels were deleted."""

    def compute(work: Path) -> Made:
        return _decoded(choose(image_root(data)), name, count, data.image_size_px, store, work)

    find = functools.partial(
        obtain,
        store,
        "images",
        VERSION,
        {"part": name, "count": count},
        [],
        manifest(data),
        compute,
        data.seed,
        f"images for {name}",
    )
    artifact = find()
    if not distributed.from_first(_complete(artifact)):
        if distributed.first():
            shutil.rmtree(artifact.folder, ignore_errors=True)  # by another job, just now
        artifact = find()
    file = _pixels(artifact)
    labels = artifact.tensors("labels")["labels"]
    return Part(map_images(file, data.image_size_px), artifact.metrics["captions"], labels, file)


def _pixels(artifact: Artifact) -> Path:
    return artifact.beside(IMAGES).with_suffix(".u8")


def _complete(artifact: Artifact) -> bool:
    file = _pixels(artifact)
    return file.is_file() and file.stat().st_size == artifact.metrics["bytes"]


def _decoded(chosen: Chosen, name: str, count: int, size_px: int, store: Path, work: Path) -> Made:
    """Decodes the samples into the store's file for the key that ``work`` is named by."""
    file = no_link(store / IMAGES / f"{work.name}.u8")
    _require(name, len(chosen.samples), count, chosen.notes)
    needed = len(chosen.samples) * 3 * size_px**2
    held = file.stat().st_blocks * 512 if file.is_file() else 0
    free = shutil.disk_usage(store).free
    if needed - held > free:
        raise DataError(
            f"the decoded images for {name} take {needed / 1e9:.1f} GB, but {store} has "
            f"{free / 1e9:.1f} GB free; set INVERTUNE_STORE to a larger disk"
        )
    order = decode_all(chosen.samples, size_px, file, work, f"decoding {name}, by {CHUNK:,}")
    notes = chosen.notes
    if lost := sorted(set(range(len(chosen.samples))).difference(order)):
        first = chosen.samples[lost[0]].name
        notes = (*notes, f"images that cannot be read: {len(lost):,}, the first is {first}")
    if len(order) < SHARE * count:
        (work / JOURNAL).unlink()  # for the images to be read again when they are mended
    _require(name, len(order), count, notes)
    found = f"{name}: {len(order):,} of {count:,} images found"
    print(printable("; ".join((found, *notes))), flush=True)
    labels = torch.tensor([chosen.labels[i] for i in order if chosen.labels], dtype=torch.long)
    return {"labels": {"labels": labels}}, {
        "captions": [chosen.captions[i] for i in order if chosen.captions],
        "samples": [chosen.samples[i].name for i in order],
        "bytes": len(order) * 3 * size_px**2,
        "wanted": count,
        "notes": list(notes),
    }


def _require_captions(data: Data) -> None:
    if own_folder(data):
        raise DataError(
            f"data.source = {data.source!r}: a folder of images has no captions, which attacks, "
            "baselines and retrieval need; the command purify needs none"
        )


def _require(name: str, found: int, count: int, notes: tuple[str, ...]) -> None:
    if found < SHARE * count:
        pairs = name in PAIR_PARTS
        shares = " (poisoning and defense take 49 % of CC3M each, rebound 2 %)" if pairs else ""
        raise DataError(
            f"{name}: {found:,} of {count:,} images found, fewer than {SHARE:.0%}"
            f"{''.join(f'; {note}' for note in notes)}. Complete the data, or ask for fewer in the "
            f"profile{shares}"
        )
