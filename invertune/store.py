"""Content-addressed artifacts on disk: a step that was computed once is found again in 0 s.

An entry is a folder named by its key: ``*.safetensors``, ``metrics.json`` and ``meta.json``. It is
written beside its place and renamed into it, so an entry is either whole or absent.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from invertune import provenance

METRICS, META = "metrics.json", "meta.json"
WORK, PARTIAL, LOCKS, DAMAGED = ".work", ".partial", ".locks", ".damaged"

Produced = tuple[Mapping[str, Mapping[str, Tensor]], Mapping[str, Any]]


class StoreError(RuntimeError):
    """An artifact that cannot be named, read or written; says why in one line."""


@dataclass(frozen=True)
class Artifact:
    """One entry of the store: its 64-digit ``key`` and the ``folder`` that holds it."""

    key: str
    folder: Path

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of ``name.safetensors``, on the CPU; ``StoreError`` where there are none."""
        path = self.folder / f"{name}.safetensors"
        try:
            return load_file(path)
        except FileNotFoundError:
            held = ", ".join(sorted(p.stem for p in self.folder.glob("*.safetensors"))) or "none"
            raise StoreError(f"{self.folder} has no tensors {name!r}; it has: {held}") from None
        except SafetensorError as error:
            raise StoreError(f"{path} is not a readable safetensors file ({error})") from None

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The step's numbers."""
        return _read_json(self.folder / METRICS)

    @cached_property
    def meta(self) -> dict[str, Any]:
        """Where the entry comes from: settings, hashes, versions, seconds, peak memory, seed."""
        return _read_json(self.folder / META)


def default_root() -> Path:
    """``$INVERTUNE_STORE``, or results/store in the repository."""
    return Path(os.environ.get("INVERTUNE_STORE") or provenance.REPOSITORY / "results" / "store")


def canonical(value: Any) -> str:
    """JSON that is the same text for equal values: sorted keys, no spaces, shortest floats.

    Raises ``StoreError`` for what JSON cannot carry: NaN, infinities, keys that are no strings.
    """
    return json.dumps(_plain(value, "settings"), sort_keys=True, separators=(",", ":"))


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        wrong = [k for k in value if not isinstance(k, str)]
        if wrong:
            raise StoreError(f"{where} has the key {wrong[0]!r}; keys must be strings")
        return {k: _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise StoreError(f"{where} is {value}; only finite numbers can be stored")
        return value + 0.0  # -0.0 is equal to 0.0
    if value is None or isinstance(value, str | int):
        return value
    raise StoreError(f"{where} is a {type(value).__name__}; only plain JSON values can be stored")


def artifact_key(
    step: str, version: int, settings: Mapping[str, Any], upstream: Sequence[str], data: str
) -> str:
    """The 64-digit key of what ``step`` makes from these settings, artifacts and data.

    ``upstream`` holds the keys of the artifacts used, ``data`` the data manifest's hash. Raise
    ``version`` whenever the code of the step changes its results.
    """
    named = {
        "step": step,
        "version": version,
        "settings": settings,
        "upstream": list(upstream),
        "data": data,
    }
    return hashlib.sha256(canonical(named).encode()).hexdigest()


def obtain(
    root: Path,
    step: str,
    version: int,
    settings: Mapping[str, Any],
    upstream: Sequence[str],
    data: str,
    compute: Callable[[Path], Produced],
    seed: int,
    label: str | None = None,
    device: str = "cpu",
) -> Artifact:
    """Finds the artifact of these settings and ``seed``, or computes and keeps it.

    ``compute(work)`` returns ({file stem: tensors}, metrics); what it writes below ``work``
    (checkpoints) outlives a kill and is removed once the artifact is stored. Two processes never
    compute the same key: the second waits. ``settings`` gets the seed, so each seed has its key.
    Raises ``StoreError`` where the disk is full or the metrics are no plain JSON.
    """
    settings = {**settings, "seed": seed}
    key = artifact_key(step, version, settings, upstream, data)
    name = label or step
    if found := _found(root, key, name):
        return found
    with _locked(root, key, name):
        if found := _found(root, key, name):
            return found
        _clear(root, key, name)
        identity = {
            "step": step,
            "version": version,
            "settings": settings,
            "upstream": list(upstream),
            "data": data,
            "seed": seed,
        }
        return _make(root, key, name, compute, identity, device)


def _found(root: Path, key: str, name: str) -> Artifact | None:
    if damage(root / key) is not None:
        return None
    shutil.rmtree(root / WORK / key, ignore_errors=True)  # left by a kill after the rename
    print(f"{name} found in store ({key[:8]}), 0 s", flush=True)
    return Artifact(key, root / key)


def _clear(root: Path, key: str, name: str) -> None:
    """Under the lock: moves a damaged entry aside, removes what a killed run half wrote."""
    if (root / key).exists():
        aside = root / DAMAGED / key
        print(
            f"{name} in store ({key[:8]}) is damaged: {damage(root / key)}; computed again "
            f"(the damaged one is now {aside})",
            flush=True,
        )
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        (root / key).rename(aside)
    shutil.rmtree(root / PARTIAL / key, ignore_errors=True)


def _make(
    root: Path,
    key: str,
    name: str,
    compute: Callable[[Path], Produced],
    identity: Mapping[str, Any],
    device: str,
) -> Artifact:
    work, partial = root / WORK / key, root / PARTIAL / key
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start, needed = time.perf_counter(), 0
    try:
        work.mkdir(parents=True, exist_ok=True)
        tensors, metrics = compute(work)
        seconds = time.perf_counter() - start
        needed = sum(t.numel() * t.element_size() for g in tensors.values() for t in g.values())
        _write(
            partial,
            tensors,
            metrics,
            {
                **identity,
                "seconds": round(seconds, 3),
                "device": device,
                "peak_mb": provenance.peak_mb(cuda),
                "versions": provenance.versions(),
                "commit": provenance.commit(),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )
        os.rename(partial, root / key)
        _sync(root)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if no_space(error):
            raise StoreError(f"{name}: {full_disk(root, needed)}") from None
        raise
    shutil.rmtree(work, ignore_errors=True)
    print(f"{name} stored ({key[:8]}), {seconds:.0f} s", flush=True)
    return Artifact(key, root / key)


def _write(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    metrics: Mapping[str, Any],
    meta: Mapping[str, Any],
) -> None:
    """Writes a whole entry into ``folder`` and waits until the disk has it."""
    folder.mkdir(parents=True)
    for stem, group in tensors.items():
        own = {
            k: t.detach().cpu().clone(memory_format=torch.contiguous_format)
            for k, t in group.items()
        }
        save_file(own, folder / f"{stem}.safetensors")
    (folder / METRICS).write_text(_pretty(_plain(metrics, "metrics")))
    files = {p.name: _sha256(p) for p in sorted(folder.iterdir())}
    (folder / META).write_text(_pretty({**meta, "files": files}))
    for path in (*folder.iterdir(), folder):
        _sync(path)


def damage(folder: Path) -> str | None:
    """What is wrong with an entry ("absent" where there is none); None for a sound one."""
    if not folder.is_dir():
        return "absent"
    try:
        meta = _read_json(folder / META)
        _read_json(folder / METRICS)
        key = artifact_key(*(meta[k] for k in ("step", "version", "settings", "upstream", "data")))
        files = dict(meta["files"])
    except StoreError as error:
        return str(error)
    except (KeyError, TypeError, ValueError) as error:
        return f"{META} is not whole ({error!r})"
    if key != folder.name:
        return f"{META} describes another artifact ({key[:8]})"
    for name, digest in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != digest:
            return f"{name} does not have the recorded SHA-256"
    return None


def entries(root: Path) -> list[Artifact]:
    """Every entry, damaged ones too, in the order of their keys."""
    if not root.is_dir():
        return []
    folders = sorted(p for p in root.iterdir() if re.fullmatch("[0-9a-f]{64}", p.name))
    return [Artifact(p.name, p) for p in folders]


def verify(root: Path) -> dict[str, str]:
    """Reads every entry in full: {key: what is wrong} of the damaged ones."""
    found = {a.key: damage(a.folder) for a in entries(root)}
    return {key: problem for key, problem in found.items() if problem}


@contextlib.contextmanager
def _locked(root: Path, key: str, name: str) -> Iterator[None]:
    """Holds the key's lock; the system gives it back when the process ends, however it ends."""
    path = root / LOCKS / key
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise StoreError(f"cannot write to the store {root}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            print(f"{name}: process {file.read().strip()} is computing it; waiting", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def no_space(error: BaseException) -> bool:
    """Whether ``error`` says that the disk, or the user's part of it, is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, SafetensorError) and "No space left" in str(error)


def full_disk(folder: Path, needed: int = 0) -> str:
    """One line for a full disk: what is free, what is needed (bytes, 0: unknown), and where."""
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free / 1e6
    wanted = f", {needed / 1e6:.1f} MB needed" if needed else ""
    return (
        f"the disk is full: {free:.1f} MB free{wanted} at {folder}; make room or set "
        f"INVERTUNE_STORE to another disk, then run again"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise StoreError(f"{path.name} is missing") from None
    except (ValueError, TypeError) as error:
        raise StoreError(f"{path.name} is not readable JSON ({error})") from None


def _pretty(value: Any) -> str:
    return json.dumps(value, sort_keys=True, indent=1) + "\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
