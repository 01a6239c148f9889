"""The loader alone, on a miniature of CC3M: a WebDataset shard as img2dataset writes it.

ours: pixels of a batch, on the device, from the file that holds each image decoded once. plain:
the batch's JPEGs decoded anew, by as many threads. ceiling: the batch lies in memory.
"""

from __future__ import annotations

import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from joblib import cpu_count
from PIL import Image
from torch import Tensor

from benchmarks.timing import Contender
from invertune.cc3m import read_shard
from invertune.decoding import Sample, decode_all, map_images, pixels_of
from invertune.models import to_pixels
from invertune.sampling import batch_indices

SIDES = (340, 256)  # pixels of a source image: img2dataset's 256 on the shorter side


def write_shard(path: Path, count: int) -> None:
    """A tar of ``count`` JPEGs, smooth with some grain, and their captions."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as shard:
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
            grain = rng.integers(-6, 7, (SIDES[1], SIDES[0], 3))
            pixels = np.asarray(coarse.resize(SIDES), np.int64) + grain
            content = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=95)
            text = f"a photo of object number {number} on a table in a room".encode()
            for suffix, data in (("jpg", content.getvalue()), ("txt", text)):
                member = tarfile.TarInfo(f"{number:09}.{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))


def decoded(shard: Path, size_px: int) -> tuple[Tensor, list[str]]:
    """The shard's images, decoded beside it and mapped, and its captions."""
    pairs, _ = read_shard(shard)
    target = shard.with_name(f"{size_px}.u8")
    _decode([sample for sample, _ in pairs], size_px, target)
    return map_images(target, size_px), [text for _, text in pairs]


def _decode(samples: list[Sample], size_px: int, target: Path) -> None:
    work = target.with_suffix(".work")
    work.mkdir(exist_ok=True)
    decode_all(samples, size_px, target, work, "decoding")


def decoding(shard: Path, size_px: int) -> dict[str, Contender]:
    """Decoding a whole part, once in its life."""
    samples = [sample for sample, _ in read_shard(shard)[0]]
    target = shard.with_name("once.u8")

    def ours() -> None:
        target.unlink(missing_ok=True)
        _decode(samples, size_px, target)

    return {"ours": Contender(ours, 1, len(samples), "ours")}


def batches(
    shard: Path, size_px: int, batch: int, steps: int, device: torch.device
) -> dict[str, Contender]:
    """Batches of pixels in [0, 1] on ``device``."""
    samples = [sample for sample, _ in read_shard(shard)[0]]
    mapped, _ = decoded(shard, size_px)
    held = mapped.clone()

    def given(images: Tensor) -> None:
        for step in range(steps):
            to_pixels(images[batch_indices(len(images), batch, 0, step)], device)

    contenders = {
        "ours": lambda: given(mapped),
        "plain": lambda: _decoded_anew(samples, size_px, batch, steps, device),
        "ceiling": lambda: given(held),
    }
    return {name: Contender(run, steps, steps * batch) for name, run in contenders.items()}


def _decoded_anew(
    samples: list[Sample], size_px: int, batch: int, steps: int, device: torch.device
) -> None:
    decoded = partial(pixels_of, size_px=size_px)
    with ThreadPoolExecutor(cpu_count()) as pool:
        for step in range(steps):
            drawn = [samples[row] for row in batch_indices(len(samples), batch, 0, step).tolist()]
            to_pixels(torch.from_numpy(np.stack(list(pool.map(decoded, drawn)))), device)
