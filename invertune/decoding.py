"""Decodes images once into one file of raw pixels; a killed run goes on where it was.

Row r of the file is an image, uint8 [3, S, S]. Threads suffice: Pillow decodes and resizes without
the interpreter's lock, which is held for about 6 % of the time (measured at 500 x 375 and 340 x
256 px), so that 16 cores are still kept busy.
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
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from invertune.files import write_atomic
from invertune.terminal import progress

CHUNK = 256  # images between two lines of the journal
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
        (width, height), short = image.size, min(image.size)
        resized = (int(size_px * width / short), int(size_px * height / short))
        if max(width * height, resized[0] * resized[1]) > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels are too many")
        whole = image if resized == image.size else image.resize(resized, Image.Resampling.BICUBIC)
        left, top = (round((side - size_px) / 2.0) for side in resized)
        square = whole.crop((left, top, left + size_px, top + size_px)).convert("RGB")
    return np.asarray(square).transpose(2, 0, 1)


def decode_all(
    samples: Sequence[Sample], size_px: int, target: Path, work: Path, label: str
) -> list[int]:
    """Decodes ``samples`` into the rows of ``target``; returns the sample index of each row.

    An unreadable sample gets no row: rows from the end fill the gaps. The journal in ``work`` lets
    a killed run go on, as long as the samples are the same.
    """
    journal, row = work / JOURNAL, 3 * size_px * size_px
    done = _resumed(journal, samples, target, row)
    todo = [start for start in range(0, len(samples), CHUNK) if start not in done]
    if todo:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
        os.truncate(target, len(samples) * row)  # a sparse file until its rows are written
    with journal.open("a") as log, ThreadPoolExecutor(cores()) as pool:
        jobs = pool.map(
            lambda start: _decode_chunk(
                samples[start : start + CHUNK], size_px, target, start * row
            ),
            todo,
        )
        try:
            total = len(done) + len(todo)
            for start, flags in zip(todo, progress(jobs, label, len(done), total), strict=True):
                done[start] = flags
                log.write(f"{start} {flags}\n")
                log.flush()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return _fill_gaps(target, "".join(done[start] for start in sorted(done)), row)


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decode_chunk(samples: Sequence[Sample], size_px: int, target: Path, position: int) -> str:
    """Writes the samples' pixels at byte ``position``; "1" for each that was readable, else "0"."""
    pixels = np.zeros((len(samples), 3, size_px, size_px), np.uint8)
    flags = ""
    for place, sample in zip(pixels, samples, strict=True):
        try:
            place[:] = decode_image(_content(sample), size_px)
            flags += "1"
        except UNREADABLE:
            flags += "0"
    with target.open("r+b") as file:
        file.seek(position)
        file.write(pixels.data)
        file.flush()
        os.fsync(file.fileno())  # the journal must not know more than the disk
    return flags


def _content(sample: Sample) -> bytes:
    with open(sample.path, "rb") as file:
        file.seek(sample.offset)
        return file.read(min(sample.size or MAX_BYTES, MAX_BYTES))


def _resumed(journal: Path, samples: Sequence[Sample], target: Path, row: int) -> dict[int, str]:
    """What a killed run finished, as {first sample: flags}; starts the journal anew."""
    digest = hashlib.sha256(repr((row, list(samples))).encode()).hexdigest()
    lines = journal.read_text().splitlines() if journal.is_file() else []
    done: dict[int, str] = {}
    if lines and lines[0] == digest and target.is_file():
        for line in lines[1:]:
            start, _, flags = line.partition(" ")
            if start.isdigit() and len(flags) == len(samples[int(start) : int(start) + CHUNK]):
                done[int(start)] = flags
    kept = sum(flags.count("1") for flags in done.values())
    sizes = {len(samples) * row}
    if sum(map(len, done.values())) == len(samples):
        sizes.add(kept * row)  # the gaps are filled already
    if done and target.stat().st_size not in sizes:
        done = {}
    lines = [digest, *(f"{start} {flags}" for start, flags in done.items())]
    write_atomic(journal, "".join(f"{line}\n" for line in lines).encode())
    return done


def _fill_gaps(target: Path, flags: str, row: int) -> list[int]:
    """Moves rows from the end into those without an image and cuts the file; see decode_all.

    The moved rows stay where they were until the cut, so a killed run can do it again.
    """
    kept = flags.count("1")
    gaps = [i for i in range(kept) if flags[i] == "0"]
    moved = [i for i in range(kept, len(flags)) if flags[i] == "1"]
    order = list(range(kept))
    for gap, source in zip(gaps, moved, strict=True):
        order[gap] = source
    if target.stat().st_size > kept * row:
        with target.open("r+b") as file:
            for gap, source in zip(gaps, moved, strict=True):
                file.seek(source * row)
                content = file.read(row)
                file.seek(gap * row)
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
            file.truncate(kept * row)
    return order


def map_images(path: Path, size_px: int) -> Tensor:
    """The images of ``path``, uint8 [N, 3, S, S], read from disk as they are used.

    Writing to them changes this tensor only: the changed pages are copied, the file stays.
    """
    with path.open("rb") as file:
        flags, access = mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        content = mmap.mmap(file.fileno(), 0, flags=flags, prot=access)
    return torch.frombuffer(content, dtype=torch.uint8).view(-1, 3, size_px, size_px)
