# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy==2.4.6", "pillow==13.0.0", "pip", "resvg_py==0.4.0"]
# ///
"""Rebuilds ``data/mini/sprites.zip`` from its source packages and compares old and new.

For maintainers, on a Debian system with npm, apt-get, dpkg-deb and pip. Which drawing shows which
class is data, not code: ``drawings.csv`` (a row per drawing) and ``taxonomy.json`` (a category per
class, and the background photos); README.md in this folder says how they were chosen.
"""

from __future__ import annotations

import argparse
import csv
import functools
import html
import io
import json
import re
import shutil
import sys
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image
from sprite_packages import PACKAGES, STYLES, fetch, unpack

HERE = Path(__file__).resolve().parent
COMMITTED = HERE.parent / "data" / "mini" / "sprites.zip"
SIDE = 96  # px, the longer side of a drawing
PHOTO_SIDE = 300  # px, the shorter side of a background
MIN_DRAWINGS, MIN_FAMILIES = 6, 4  # a class needs this many
HOLDABLE = ("fluent", "noto", "twemoji")  # one of these is held out of training in each class
PHOTO_FOLDERS = {
    "deb": Path("wallpapers/usr/share/backgrounds"),
    "pypi": Path("scikit-image/skimage/data"),
}
EPOCH = (2026, 1, 1, 0, 0, 0)  # one date for all, so that equal content gives an equal archive


# Drawings


@dataclass(frozen=True)
class Drawing:
    """A row of drawings.csv: ``emoji`` is a hex code, empty for openclipart; ``source`` is the
    icon's name, the asset's name or the SVG file's path inside the style's package."""

    file: str
    label: str
    emoji: str
    source: str

    @property
    def style(self) -> str:
        return self.file.split("/")[0]

    @property
    def family(self) -> str:
        """The design family: Fluent's flat and 3D drawings are one design in two finishes."""
        return "fluent" if self.style.startswith("fluent") else self.style


def read_drawings(path: Path) -> list[Drawing]:
    """Reads drawings.csv, ordered by class and file, and checks that every class has enough."""
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        drawings = [Drawing(r["file"], r["class"], r["emoji"], r["source"]) for r in rows]
    for label, count in Counter(d.label for d in drawings).items():
        families = {d.family for d in drawings if d.label == label}
        if count < MIN_DRAWINGS or len(families) < MIN_FAMILIES:
            raise ValueError(
                f"{path.name}: {label} has {count} drawings in {len(families)} design "
                f"families; it needs {MIN_DRAWINGS} in {MIN_FAMILIES}"
            )
    return sorted(drawings, key=lambda d: (d.label, d.file))


def held_out_family(label: str, families: set[str]) -> str:
    """The design family that class ``label`` keeps out of training, by a checksum of its name."""
    choices = sorted(families & set(HOLDABLE))
    return choices[zlib.crc32(label.encode()) % len(choices)]


@functools.cache
def read_json(path: Path) -> Any:
    """A JSON file's content, read once; not to be changed."""
    return json.loads(path.read_text())


def icon_picture(name: str, icons: dict[str, Any]) -> Image.Image:
    """Renders an Iconify icon 192 px wide; an alias may ask for its mirror image."""
    alias = {} if name in icons["icons"] else icons["aliases"][name]
    icon = icons["icons"][alias.get("parent", name)]
    width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">'
        f"{icon['body']}</svg>"
    )
    picture = rendered(svg_string=svg, width=192)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if alias.get("hFlip") else picture


def rendered(**options: Any) -> Image.Image:
    """An SVG as RGBA pixels; no fonts of this system, so that it looks the same everywhere."""
    png = bytes(resvg_py.svg_to_bytes(skip_system_fonts=True, **options))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def openclipart_file(drawing: Drawing, packages: Path) -> Path:
    """Where the unpacked Debian package keeps the SVG of an openclipart drawing."""
    return packages / "openclipart/usr/share/openclipart/svg" / drawing.source


def picture_of(drawing: Drawing, packages: Path) -> Image.Image:
    """The drawing as its package has it, RGBA, not yet cropped."""
    if drawing.style == "openclipart":
        path = openclipart_file(drawing, packages)
        return rendered(svg_path=str(path), width=256, dpi=96.0)
    folder = packages / drawing.style / "package"
    if drawing.style == "fluent-3d":
        return Image.open(folder / "assets" / f"{drawing.source}.webp").convert("RGBA")
    return icon_picture(drawing.source, read_json(folder / "icons.json"))


def fit(picture: Image.Image) -> Image.Image:
    """Crops an RGBA picture to its visible part and scales the longer side to ``SIDE``.

    Colors are resampled multiplied by alpha, so that invisible pixels do not bleed into edges.
    """
    pixels = np.asarray(picture, np.float32) / 255
    visible = pixels[..., 3] > np.float32(12 / 255)
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = SIDE / max(pixels.shape[:2])
    height, width = (max(1, round(n * scale)) for n in pixels.shape[:2])
    method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    channels = np.concatenate([pixels[..., :3] * pixels[..., 3:], pixels[..., 3:]], 2)
    scaled = np.stack(
        [
            np.asarray(Image.fromarray(c).resize((width, height), method))
            for c in np.moveaxis(channels, 2, 0)
        ],
        2,
    ).clip(0, 1)
    alpha = scaled[..., 3:]
    color = np.where(alpha > 1e-3, scaled[..., :3] / np.maximum(alpha, 1e-3), 0)
    canvas = np.zeros((SIDE, SIDE, 4), np.uint8)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    fitted = np.concatenate([color, alpha], 2) * 255 + 0.5
    canvas[top : top + height, left : left + width] = fitted.clip(0, 255).astype(np.uint8)
    return Image.fromarray(canvas)


def webp(picture: Image.Image, **options: Any) -> bytes:
    """The picture as lossy WebP at the encoder's slowest, smallest setting."""
    data = io.BytesIO()
    picture.save(data, "WEBP", method=6, **options)
    return data.getvalue()


# Backgrounds


def photo_of(background: dict[str, Any], packages: Path) -> Image.Image:
    """A background photo: cropped, ``PHOTO_SIDE`` px high or wide, at most 1.6 times as wide as
    high; a gray texture is tinted to the mean color given."""
    folder = packages / PHOTO_FOLDERS[background["source"].split(":")[0]]
    photo = Image.open(folder / background["file"]).convert("RGB")
    width, height = photo.size
    x0, y0, x1, y1 = background.get("crop", (0, 0, 1, 1))
    photo = photo.crop((int(x0 * width), int(y0 * height), int(x1 * width), int(y1 * height)))
    scale = PHOTO_SIDE / min(photo.size)
    size = (round(photo.width * scale), round(photo.height * scale))
    photo = photo.resize(size, Image.Resampling.LANCZOS)
    margin = (photo.width - int(1.6 * photo.height)) // 2
    if margin > 0:
        photo = photo.crop((margin, 0, photo.width - margin, photo.height))
    if "tint" not in background:
        return photo
    tinted = np.asarray(photo, np.float32) / 128 * np.float32(background["tint"])
    return Image.fromarray(tinted.clip(0, 255).astype(np.uint8))


# The archive


def straight(text: str) -> str:
    """Text in lower case with typewriter quotes, as class names and labels are written."""
    return text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'}).lower()


def author_of(path: Path) -> str:
    """The creator that an openclipart file names in its metadata; empty if it names none."""
    text = path.read_bytes().decode("utf-8", "ignore")
    found = re.search(r"<dc:creator>.*?<dc:title>\s*([^<]*?)\s*</dc:title>", text, re.DOTALL)
    return html.unescape(found[1]) if found else ""


def make_index(drawings: list[Drawing], taxonomy: dict[str, Any], packages: Path) -> dict[str, Any]:
    """Everything about the pictures that is not a picture: the archive's index.json."""
    data = read_json(packages / "emojibase" / "package" / "en" / "data.json")
    emoji = {entry["hexcode"].lower(): entry for entry in data}
    classes, sprites = [], []
    for label, category in taxonomy["classes"].items():
        own = [d for d in drawings if d.label == label]
        tags = {t.lower() for d in own if d.emoji for t in emoji[d.emoji].get("tags", [])}
        classes.append({"name": label, "category": category, "keywords": sorted(tags)})
        held_out = held_out_family(label, {d.family for d in own})
        for d in own:
            entry = {"file": d.file, "class": label, "style": d.style}
            entry["held_out"] = d.family == held_out
            if d.emoji:
                entry |= {"hex": d.emoji, "label": straight(emoji[d.emoji]["label"])}
            else:
                author = author_of(openclipart_file(d, packages))
                entry |= {"source_file": d.source, "author": author}
            sprites.append(entry)
    sources = {s: {"source": PACKAGES[s].source, "license": PACKAGES[s].license} for s in STYLES}
    credits = ("words", "licence", "author", "source", "file")
    backgrounds = {b["name"]: {k: b[k] for k in credits} for b in taxonomy["backgrounds"]}
    return {
        "size": SIDE,
        "classes": classes,
        "sprites": sprites,
        "sources": sources,
        "backgrounds": backgrounds,
    }


def build(packages: Path, out: Path) -> None:
    """Writes the archive ``out`` from the unpacked ``packages``."""
    drawings = read_drawings(HERE / "drawings.csv")
    taxonomy = json.loads((HERE / "taxonomy.json").read_text())
    index = make_index(drawings, taxonomy, packages)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for d in drawings:
            picture = fit(picture_of(d, packages))
            archive.writestr(
                zipfile.ZipInfo(d.file, EPOCH), webp(picture, quality=80, alpha_quality=80)
            )
        for b in taxonomy["backgrounds"]:
            name = zipfile.ZipInfo(f"photos/{b['name']}.webp", EPOCH)
            archive.writestr(name, webp(photo_of(b, packages), quality=78))
        text = json.dumps(index, separators=(",", ":"))
        archive.writestr(zipfile.ZipInfo("index.json", EPOCH), text, zipfile.ZIP_DEFLATED)


# Comparison


def compare(new: Path, old: Path) -> Counter[str]:
    """Counts how the files of two archives agree: identical, same pixels, different, missing."""
    with zipfile.ZipFile(new) as first, zipfile.ZipFile(old) as second:
        names = {a: set(a.namelist()) for a in (first, second)}
        counts = Counter({"missing": len(names[first] ^ names[second])})
        for name in sorted(names[first] & names[second]):
            counts[agreement(name, first.read(name), second.read(name))] += 1
    return counts


def agreement(name: str, first: bytes, second: bytes) -> str:
    """How the two versions of file ``name`` agree; pixels are compared after decoding."""
    if first == second:
        return "identical"
    if name.endswith(".json"):
        return "same content" if json.loads(first) == json.loads(second) else "different"
    new, old = (np.asarray(Image.open(io.BytesIO(b)).convert("RGBA")) for b in (first, second))
    return "same pixels" if np.array_equal(new, old) else "different"


def main() -> None:
    """The command line: downloads, builds, compares, and only with --replace overwrites."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/sprites"),
        help="folder for packages and the new archive (%(default)s)",
    )
    parser.add_argument(
        "--check", action="store_true", help="exit with an error unless every file agrees"
    )
    parser.add_argument("--replace", action="store_true", help=f"overwrite {COMMITTED.name}")
    options = parser.parse_args()
    for name, package in PACKAGES.items():
        file = fetch(package, options.work / "downloads" / name)
        unpack(package, file, options.work / "packages" / name)
    new = options.work / "sprites.zip"
    build(options.work / "packages", new)
    counts = compare(new, COMMITTED)
    print(f"{new} against {COMMITTED}: " + ", ".join(f"{n} {k}" for k, n in counts.items()))
    if options.check and counts["missing"] + counts["different"]:
        sys.exit("the archives do not agree")
    if options.replace:
        shutil.copyfile(new, COMMITTED)


if __name__ == "__main__":
    main()
