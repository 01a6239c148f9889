"""Decodes images once into one file of raw pixels; a killed run goes on where it was.

Row r of the file is an image, uint8 [3, S, S]. Threads suffice: Pillow decodes and resizes without
the interpreter's lock, which is held for about 6 % of the time (measured at 500 x 375 and 340 x
256 px).
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import struct
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from joblib import cpu_count
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize

from invertune.files import write_atomic
from invertune.terminal import progress

CHUNK = 1024  # images between two lines of the journal
JOURNAL = "decoded.txt"
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 80_000_000  # of a source image, and of its resized form; below Pillow's own limit
MAX_BYTES = 2**26  # of an encoded image
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
# Without it a writable map larger than memory and swap may be refused (Python 3.13 names it)
MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0


@dataclass(frozen=True)
class Sample:
    """An encoded image: ``size`` bytes from ``offset`` of the file ``path`` (0: to its end)."""

    name: str
    path: str
    offset: int = 0
    size: int = 0


def decode_image(content: bytes, size_px: int) -> np.ndarray:
    """uint8 [3, S, S]: shorter side to S, bicubic, then the center square, as CLIP evaluates.

    Raises one of ``UNREADABLE`` for bytes that are no whole JPEG, PNG or WebP, or too large.
    """
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        width, height = image.size
        resized = size_px**2 * max(width, height) / min(width, height)
        if max(width * height, resized) > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels are too many")
        whole = resize(image, size_px, InterpolationMode.BICUBIC)
        square = center_crop(whole, size_px).convert("RGB")
    return np.asarray(square).transpose(2, 0, 1)


def decode_all(
    samples: Sequence[Sample], size_px: int, target: Path, work: Path, label: str
) -> list[int]:
    """Decodes ``samples`` into the rows of ``target``; returns the sample index of each row.

    An unreadable sample gets no row. The journal in ``work`` lets a killed run go on, as long as
    the samples are the same.
    """
    row = 3 * size_px**2
    flags = _resumed(work / JOURNAL, samples, target, row)
    starts = range(len(flags), len(samples), CHUNK)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("ab") as file, (work / JOURNAL).open("a") as journal:
        file.truncate(flags.count("1") * row)
        with ThreadPoolExecutor(cpu_count()) as threads:
            for start in progress(starts, label):
                chunk = samples[start : start + CHUNK]
                images = list(threads.map(partial(pixels_of, size_px=size_px), chunk))
                file.writelines(image.tobytes() for image in images if image is not None)
                file.flush()
                os.fsync(file.fileno())  # the journal must not know more than the disk
                line = "".join("01"[image is not None] for image in images)
                journal.write(f"{line}\n")
                journal.flush()
                flags += line
    return [i for i, flag in enumerate(flags) if flag == "1"]


def pixels_of(sample: Sample, size_px: int) -> np.ndarray | None:
    """The image of a sample; None where its bytes are none. ``OSError`` where a disk fails."""
    with open(sample.path, "rb") as file:
        file.seek(sample.offset)
        content = file.read(min(sample.size or MAX_BYTES, MAX_BYTES))
    try:
        return decode_image(content, size_px)
    except UNREADABLE:
        return None


def _resumed(journal: Path, samples: Sequence[Sample], target: Path, row: int) -> str:
    """A 1 or a 0 for each sample that a killed run finished; starts the journal anew."""
    digest = hashlib.sha256(repr((row, list(samples))).encode()).hexdigest()
    first, *lines = (journal.read_text() if journal.is_file() else "").split("\n")
    flags = "".join(lines[:-1]) if first == digest else ""  # the last may be half a line
    if flags and not (target.is_file() and target.stat().st_size >= flags.count("1") * row):
        flags = ""
    write_atomic(journal, f"{digest}\n{flags}\n".encode() if flags else f"{digest}\n".encode())
    return flags


def map_images(path: Path, size_px: int) -> Tensor:
    """The images of ``path``, uint8 [N, 3, S, S], read from disk as they are used.

    Writing to them changes this tensor only: the changed pages are copied, the file stays.
    """
    with path.open("rb") as file:
        flags, access = mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        content = mmap.mmap(file.fileno(), 0, flags=flags, prot=access)
    return torch.frombuffer(content, dtype=torch.uint8).view(-1, 3, size_px, size_px)
