"""Files on which several processes work: replaced whole, by one writer at a time; full disks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from invertune.terminal import printable

REPOSITORY = Path(__file__).resolve().parent.parent
FULL = ("No space left", "quota exceeded")  # in the message of an error for a full disk


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, content: bytes) -> None:
    """Writes ``content`` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        partial.write_bytes(content)
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_stamp(path: Path) -> dict[str, Any]:
    """What a finished notebook has left, as ``tools/run_notebooks`` noted; empty if damaged."""
    try:
        left = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return left if isinstance(left, dict) else {}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock beside ``path``: read, merge and replace must not interleave between jobs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(path.parent / f".{path.name}.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def open_lock(path: Path) -> TextIO:
    """Opens a lock, new or old, and leaves what it holds; ``OSError`` where it is a link."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "is a link, which a lock must not be; remove it", str(path))
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")


def hold(lock: TextIO, busy: Callable[[str], None]) -> None:
    """Takes an open lock, which then says who has it: the system frees it when the process ends.

    Where another process has it, calls ``busy`` with that one's number, then waits.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        busy(printable(lock.read().strip()))
        fcntl.flock(lock, fcntl.LOCK_EX)
    lock.seek(0)
    lock.truncate()
    lock.write(str(os.getpid()))
    lock.flush()


def sync(path: Path) -> None:
    """Waits until the disk has a file or a folder (its list of names)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def full_disk(error: BaseException, root: Path, needed: int) -> str | None:
    """What to do where ``error`` came from a full disk below ``root``; None for any other error.

    ``needed`` is how many bytes were to be written, 0 where unknown.
    """
    if not any(text in str(error) for text in FULL):
        return None
    wanted = f", {needed / 1e6:.1f} MB needed" if needed else ""
    return (
        f"the disk is full: {shutil.disk_usage(root).free / 1e6:.1f} MB free{wanted} at {root}; "
        "make room or set INVERTUNE_STORE to another disk, then run again"
    )
