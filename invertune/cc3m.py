"""CC3M: pairs from WebDataset shards, as img2dataset writes them, or from a CSV as CleanCLIP's.

Nothing is unpacked: images are read from where they lie in the shards, and only regular members and
paths below the CSV's folder count.
"""

from __future__ import annotations

import csv
import errno
import os
import tarfile
from pathlib import Path, PurePosixPath

from invertune.decoding import MAX_BYTES, Sample
from invertune.layouts import EXPECTED, SUFFIXES, Chosen, DataError, hash_position, one_line
from invertune.terminal import progress

IMAGE_COLUMNS, CAPTION_COLUMNS = ("image", "filepath", "path"), ("caption", "title")
END_BYTES = 1024
BROKEN = (  # what tarfile raises for headers that are wrong or hostile
    tarfile.TarError,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    RecursionError,
    MemoryError,
)
PAIR_PARTS = {"poisoning": (0.0, 0.49), "defense": (0.49, 0.98), "rebound": (0.98, 1.0)}


def caption_source(root: Path) -> Path | list[Path]:
    """The shards of CC3M, or its CSV; ``DataError`` for neither, or more than one CSV."""
    shards, tables = (
        sorted(path for path in (root / "cc3m").glob(f"*.{kind}") if path.is_file())
        for kind in ("tar", "csv")
    )
    if shards:
        return shards
    if len(tables) != 1:
        held = f"{len(tables)} CSV files" if tables else "no .tar and no .csv"
        raise DataError(f"{root / 'cc3m'} holds {held}; expected: {EXPECTED['cc3m']}")
    return tables[0]


def pair_samples(root: Path, part: str, count: int, seed: int) -> Chosen:
    """At most ``count`` pairs of a part of CC3M: "poisoning", "defense" or "rebound"."""
    if part not in PAIR_PARTS:
        raise DataError(f"CC3M has no part {part!r}; its parts are {', '.join(PAIR_PARTS)}")
    source = caption_source(root)
    if isinstance(source, Path):
        return _table_pairs(source, PAIR_PARTS[part], count, seed)
    chosen: list[tuple[Sample, str]] = []
    broken = []
    low, high = PAIR_PARTS[part]
    order = sorted(source, key=lambda path: hash_position(seed, path.name))
    for shard in progress(order, f"reading shards for {part}"):
        pairs, whole = read_shard(shard)
        chosen += [(s, text) for s, text in pairs if low <= hash_position(seed, s.name) < high]
        if not whole:
            broken.append(shard.name)
        if len(chosen) >= count:
            break
    notes = (f"damaged shards: {', '.join(sorted(broken))}",) if broken else ()
    return _pairs(chosen[:count], notes)


def _pairs(chosen: list[tuple[Sample, str]], notes: tuple[str, ...]) -> Chosen:
    return Chosen([s for s, _ in chosen], captions=[[text] for _, text in chosen], notes=notes)


def read_shard(path: Path) -> tuple[list[tuple[Sample, str]], bool]:
    """The images of a tar with their captions, and whether the tar is whole.

    A tar ends with two blocks of zeros; without them it was cut off, whatever can still be read.
    """
    images: dict[str, Sample] = {}
    texts: dict[str, str] = {}
    length, whole = path.stat().st_size, _ends(path)
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                key, _, suffix = PurePosixPath(member.name).name.partition(".")
                if member.size < 0:  # the next one would be an earlier one
                    raise ValueError(f"{member.size} bytes")
                if not member.isreg() or member.issparse() or member.size > MAX_BYTES:
                    continue
                if member.offset_data + member.size > length:
                    break
                if f".{suffix.lower()}" in SUFFIXES:
                    name = f"{path.stem}/{key}"
                    images[key] = Sample(name, str(path), member.offset_data, member.size)
                elif suffix == "txt" and (content := shard.extractfile(member)) is not None:
                    texts[key] = one_line(content.read().decode(errors="replace"))
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # of the disk, not of the header
        whole = False
    return [(images[key], texts[key]) for key in images if texts.get(key)], whole


def _ends(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-min(END_BYTES, path.stat().st_size), os.SEEK_END)
        return file.read() == bytes(END_BYTES)


def _table_pairs(path: Path, part: tuple[float, float], count: int, seed: int) -> Chosen:
    """The rows of a part whose image is there, in the table's order."""
    rows = [
        (hash_position(seed, name), line, name, text)
        for line, (name, text) in enumerate(read_table(path))
        if part[0] <= hash_position(seed, name) < part[1]
    ]
    found: list[tuple[int, Sample, str]] = []
    missing = 0
    for _, line, name, text in sorted(rows):
        if len(found) == count:
            break
        if os.path.isfile(path.parent / name):
            found.append((line, Sample(name, str(path.parent / name)), text))
        else:
            missing += 1
    notes = (f"images of {path.name} that are missing: {missing:,}",) if missing else ()
    return _pairs([(sample, text) for _, sample, text in sorted(found, key=lambda f: f[0])], notes)


def read_table(path: Path) -> list[tuple[str, str]]:
    """(Image path, caption) of every row that has both; comma- or tab-separated, UTF-8.

    Raises ``DataError`` for other columns and for a path that leads out of the table's folder.
    """
    rows = []
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        delimiter = "\t" if "\t" in file.readline() else ","
        file.seek(0)
        table = csv.DictReader(file, delimiter=delimiter)
        try:
            header = table.fieldnames or []
            image = next((c for c in IMAGE_COLUMNS if c in header), None)
            caption = next((c for c in CAPTION_COLUMNS if c in header), None)
            if image is None or caption is None:
                raise DataError(
                    f"{path} has the columns {', '.join(header)[:200] or 'none'}; it needs one of "
                    f"{', '.join(IMAGE_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}"
                )
            for row in table:
                name, text = row[image] or "", one_line(row[caption] or "")
                pure = PurePosixPath(name)
                if pure.is_absolute() or ".." in pure.parts:
                    raise DataError(
                        f"{path}, line {table.line_num}: {name!r} leads out of {path.parent}; "
                        "paths must be relative to the CSV"
                    )
                if name and text:
                    rows.append((name, text))
        except csv.Error as error:
            raise DataError(f"{path}, line {table.line_num}: {error}") from None
    return rows
