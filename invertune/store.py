"""Content-addressed artifacts on disk: a step that was computed once is found again in 0 s.

An entry is a folder named by its key: ``*.safetensors``, ``metrics.json`` and ``meta.json``. It is
written beside its place and renamed into it, so an entry is either whole or absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from invertune import distributed, provenance
from invertune.files import REPOSITORY, file_hash, full_disk, hold, open_lock, sync
from invertune.terminal import printable

METRICS, META = "metrics.json", "meta.json"
WORK, PARTIAL, LOCKS, DAMAGED = ".work", ".partial", ".locks", ".damaged"
SUMMARY = "{step:24} seed {seed:<3} {seconds:9.1f} s  {created}"  # of an entry's META, in a list
IDENTITY = ("step", "version", "settings", "upstream", "data")  # what a key is the hash of

Values = Mapping[str, Any]  # plain JSON values
Tensors = Mapping[str, Mapping[str, Tensor]]  # file stem: {name: tensor}
Made = tuple[Tensors, Values]  # what a step leaves: its tensors and its metrics
Compute = Callable[[Path], Made]


class StoreError(RuntimeError):
    """An artifact that cannot be named, read or written; says why in one line."""


class MissingError(StoreError):
    """An artifact that was only looked for, and is not in the store."""


@dataclass(frozen=True)
class Artifact:
    """One entry of the store: its 64-digit ``key`` and the ``folder`` that holds it."""

    key: str
    folder: Path
    computed: bool = field(default=False, compare=False)  # just now; else it was found

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of ``name.safetensors``, on the CPU; ``StoreError`` where there are none."""
        path = self.folder / f"{name}.safetensors"
        try:
            return load_file(path)
        except FileNotFoundError:
            held = ", ".join(sorted(p.stem for p in self.folder.glob("*.safetensors"))) or "none"
            raise StoreError(f"{self.folder} has no tensors {name!r}; it has: {held}") from None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path} cannot be read ({str(error)[:120]})") from None

    def beside(self, kind: str) -> Path:
        """The place of this entry in one of the store's own folders, e.g. WORK."""
        return self.folder.parent / kind / self.key

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
    return Path(os.environ.get("INVERTUNE_STORE") or REPOSITORY / "results" / "store")


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
    step: str, version: int, settings: Values, upstream: Sequence[str], data: str
) -> str:
    """The 64-digit key of what ``step`` makes from these settings, artifacts and data.

    ``upstream`` holds the keys of the artifacts used, ``data`` the data manifest's hash. Raise
    ``version`` whenever the code of the step changes its results.
    """
    parts = (step, version, settings, list(upstream), data)
    return hashlib.sha256(canonical(dict(zip(IDENTITY, parts, strict=True))).encode()).hexdigest()


def obtain(
    root: Path,
    step: str,
    version: int,
    settings: Values,
    upstream: Sequence[str],
    data: str,
    compute: Compute | None,
    seed: int,
    label: str | None = None,
    device: str = "cpu",
    together: bool = False,
) -> Artifact:
    """Finds the artifact of these settings and ``seed``, or computes and keeps it.

    ``compute(work)`` returns ({file stem: tensors}, metrics); what it writes below ``work``
    (checkpoints) outlives a kill and is removed once the artifact is stored. Two processes never
    compute the same key: the second waits. ``settings`` gets the seed, so each seed has its key.
    Under torchrun the first process computes and writes; the others compute along where the step
    is done ``together``, and wait.
    Raises ``StoreError`` where the disk is full or the metrics are no plain JSON, and
    ``MissingError`` where ``compute`` is None and the artifact is not there.
    """
    parts = (step, version, {**settings, "seed": seed}, list(upstream), data)
    key = artifact_key(*parts)
    entry, name = Artifact(key, root / key), label or step
    if compute is None:
        if damage(entry.folder) is None:
            return entry
        raise MissingError(f"{name} is not in the store at {root}")
    if not distributed.first():
        while distributed.from_first(False):
            compute(entry.beside(WORK))
        return entry
    identity = {**dict(zip(IDENTITY, parts, strict=True)), "seed": seed}
    entry = _found_or_made(entry, name, compute, identity, device, together)
    distributed.from_first(False)  # it is there: the others need not wait any more
    return entry


def _found_or_made(
    entry: Artifact, name: str, compute: Compute, identity: Values, device: str, together: bool
) -> Artifact:
    """In the first process: finds the entry, or makes it, alone or with the others."""
    if _found(entry):
        return entry
    with _locked(entry, name):
        if _found(entry):  # another job made it meanwhile
            return entry
        _clear(entry, name)
        with contextlib.nullcontext() if together else distributed.alone():
            if (count := distributed.processes()) > 1:
                device = f"{count} x {device}"
                distributed.from_first(True)  # the others compute along
            _make(entry, name, compute, identity, device)
    return replace(entry, computed=True)


def _found(entry: Artifact) -> bool:
    if damage(entry.folder) is not None:
        return False
    shutil.rmtree(entry.beside(WORK), ignore_errors=True)  # left by a kill after the rename
    return True


def _clear(entry: Artifact, name: str) -> None:
    """Under the lock: moves a damaged entry aside, removes what a killed run half wrote."""
    if entry.folder.exists():
        aside, problem = entry.beside(DAMAGED), printable(damage(entry.folder) or "")
        print(
            f"{name} in store ({entry.key[:8]}) is damaged: {problem}; computed again "
            f"(the damaged one is now {aside})",
            flush=True,
        )
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        entry.folder.rename(aside)
    shutil.rmtree(entry.beside(PARTIAL), ignore_errors=True)


def _make(entry: Artifact, name: str, compute: Compute, identity: Values, device: str) -> None:
    work, partial, root = entry.beside(WORK), entry.beside(PARTIAL), entry.folder.parent
    cuda = "cuda" in device
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start, needed = time.perf_counter(), 0
    try:
        no_link(work).mkdir(parents=True, exist_ok=True)
        tensors, metrics = compute(work)
        needed = sum(t.numel() * t.element_size() for g in tensors.values() for t in g.values())
        meta = {
            **identity,
            "seconds": round(time.perf_counter() - start, 3),
            "device": device,
            "peak_mb": provenance.peak_mb(cuda),
            "versions": provenance.versions(),
            "commit": provenance.commit(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        _write(partial, tensors, metrics, meta)
        os.rename(partial, entry.folder)
        sync(root)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if full := full_disk(error, root, needed):
            raise StoreError(f"{name}: {full}") from None
        raise
    shutil.rmtree(work, ignore_errors=True)
    print(f"{name} stored ({entry.key[:8]}), {meta['seconds']:.0f} s", flush=True)


def _write(folder: Path, tensors: Tensors, metrics: Values, meta: Values) -> None:
    """Writes a whole entry into ``folder`` and waits until the disk has it."""
    folder.mkdir(parents=True)
    for stem, group in tensors.items():
        copies = {k: t.detach().cpu().contiguous().clone() for k, t in group.items()}
        (folder / f"{stem}.safetensors").write_bytes(save(copies))  # save_file's no other may read
    (folder / METRICS).write_text(_pretty(_plain(metrics, "metrics")))
    files = {p.name: file_hash(p) for p in sorted(folder.iterdir())}
    (folder / META).write_text(_pretty({**meta, "files": files}))
    for path in (*folder.iterdir(), folder):
        sync(path)


def no_link(path: Path) -> Path:
    """``path``, where the store is to write; ``StoreError`` where it is a link to another place."""
    if path.is_symlink():
        raise StoreError(f"{path} is a link, which the store does not write through; remove it")
    return path


def damage(folder: Path) -> str | None:
    """What is wrong with an entry ("absent" where there is none); None for a sound one."""
    if not folder.is_dir():
        return "absent"
    try:
        meta = _read_json(folder / META)
        _read_json(folder / METRICS)
        key = artifact_key(*(meta[k] for k in IDENTITY))
        files = {**meta["files"]}
        SUMMARY.format_map(meta)
    except (StoreError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        return f"not whole: {error}"
    if key != folder.name:
        return f"{META} describes another artifact ({key[:8]})"
    if unlisted := {METRICS, *(p.name for p in folder.glob("[!.]*.safetensors"))}.difference(files):
        return f"{META} does not list {min(unlisted)}"
    for name, digest in files.items():
        if not os.path.isfile(folder / name):
            return f"{name} is missing"
        try:
            found = file_hash(folder / name)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found != digest:
            return f"{name} does not have the recorded SHA-256"
    return None


def entries(root: Path) -> list[Artifact]:
    """Every entry, damaged ones too, in the order of their keys."""
    return [Artifact(p.name, p) for p in sorted(root.glob("[0-9a-f]" * 64))]


def verify(root: Path) -> dict[str, str]:
    """Reads every entry in full: {key: what is wrong} of the damaged ones."""
    return {a.key: problem for a in entries(root) if (problem := damage(a.folder))}


@contextlib.contextmanager
def _locked(entry: Artifact, name: str) -> Iterator[None]:
    """Holds the key's lock; the system gives it back when the process ends, however it ends."""
    path = entry.beside(LOCKS)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open_lock(path)
    except OSError as error:
        raise StoreError(f"cannot write to the store at {path}: {error.strerror}") from None
    with file:
        hold(file, lambda pid: print(f"{name}: process {pid} is computing it; waiting", flush=True))
        yield


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise StoreError(f"{path.name} cannot be read ({error})") from None


def _pretty(value: Any) -> str:
    return json.dumps(value, sort_keys=True, indent=1) + "\n"
