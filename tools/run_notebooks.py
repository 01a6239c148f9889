"""Runs the notebooks of one profile, in order, through papermill; called by run_all.sh.

A finished notebook is not run again while nothing it came from has changed. Every artifact is in
the store, so a notebook that must run again finds there what it had.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from invertune.__main__ import explain, show_plan
from invertune.arguments import add_options, add_run_options, overrides_of
from invertune.files import REPOSITORY, file_hash, hold, open_lock, read_stamp, write_atomic
from invertune.sections import PICTOGRAMS, Settings
from invertune.settings import PARAMS, SettingsError, load_settings, stay_offline
from invertune.terminal import quiet_in_a_log

FAILED, WRONG, BUSY = 1, 2, 3


class BusyError(RuntimeError):
    """Another run of the same profile is going on."""


class NotebookError(RuntimeError):
    """A notebook that failed: its name, its cell, and the last line of the error."""


def main(arguments: list[str] | None = None, root: Path = REPOSITORY) -> int:
    """Runs what the arguments name; returns the exit code (see run_all.sh --help).

    ``root`` is the folder that holds notebooks/, and results/ and figures/ as far as they are not
    written by the notebooks themselves, which always write to the repository.
    """
    parser = argparse.ArgumentParser(prog="./run_all.sh", usage="see ./run_all.sh --help")
    add_options(parser)
    add_run_options(parser)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    try:
        notebooks = _chosen(root / "notebooks", options.only)
        if options.dry_run:
            return show_plan(options)
        overrides = overrides_of(options)
        settings = load_settings(options.profile, overrides)
        with _only_run(root / "results" / settings.profile):
            run_all(notebooks, settings, overrides, root, options.jobs)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    except (BusyError, NotebookError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BUSY if isinstance(error, BusyError) else FAILED
    except Exception as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return WRONG
    return 0


def _chosen(folder: Path, only: str | None) -> list[Path]:
    notebooks = sorted(folder.glob("0*.ipynb"))
    chosen = [n for n in notebooks if n.name.startswith(only or "")]
    if not chosen:
        known = ", ".join(n.stem for n in notebooks) or f"none in {folder}"
        raise SettingsError(f"no notebook starts with {only or '0'!r}; there are: {known}")
    return chosen


@contextmanager
def _only_run(results: Path) -> Iterator[None]:
    """Holds the profile's lock, which ends with the process however it ends."""

    def busy(pid: str) -> None:
        raise BusyError(
            f"another run of profile {results.name} is going on (pid {pid}); "
            "wait for it, or stop it"
        )

    results.mkdir(parents=True, exist_ok=True)
    with open_lock(results / ".lock") as lock:
        hold(lock, busy)
        yield


def run_all(
    notebooks: list[Path],
    settings: Settings,
    overrides: dict[str, Any],
    root: Path,
    jobs: int | None = None,
) -> None:
    """Runs each notebook that is not finished; raises ``NotebookError`` at the first failure.

    What it looks for in the store is made before, by as many processes as ``jobs`` says.
    """
    stay_offline(settings)
    quiet_in_a_log()
    store = Path(os.environ.get("INVERTUNE_STORE") or root / "results" / "store")
    for notebook in notebooks:
        output = root / "results" / settings.profile / "notebooks" / notebook.name
        stamp = output.with_suffix(".done.json")
        inputs = _inputs(notebook, settings)
        if _finished(stamp, inputs, root, store):
            print(f"{notebook.stem}: finished before, nothing to do ({output})", flush=True)
            continue
        print(f"{notebook.stem}: running", flush=True)
        stamp.unlink(missing_ok=True)
        start = time.time()
        _fill(notebook.stem, settings, jobs)
        execute(notebook, output, {"profile": settings.profile, "overrides": overrides}, root)
        left = {"inputs": inputs, **_left(settings, root, store, start)}
        write_atomic(stamp, json.dumps(left).encode())
        _page(settings, root)
        print(f"{notebook.stem}: done in {time.time() - start:.0f} s", flush=True)


def _fill(notebook: str, settings: Settings, count: int | None) -> None:
    """Makes what the notebook looks for in the store; of one process the notebook is as good."""
    from invertune import data, jobs  # import torch, which finished notebooks need not wait for

    data.check(settings, (settings.target, *settings.generalization.targets))
    try:
        count = count or jobs.default_count(settings)
        if count > 1:
            jobs.fill(settings, notebook, count)
    except Exception as error:
        raise NotebookError(f"{notebook}: {explain(error)}") from None


def _page(settings: Settings, root: Path) -> None:
    """Writes the page of all that the notebooks have left so far, if they left numbers."""
    if (root / "results" / settings.profile / "results.csv").is_file():
        from invertune import gallery  # imports pandas

        print(f"claims, figures and tables: {gallery.write(settings, root)}", flush=True)


def execute(notebook: Path, output: Path, parameters: dict[str, Any], root: Path) -> None:
    """Executes ``notebook`` into ``output``, which is replaced only when the run has ended."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    unknown = set(parameters) - set(papermill.inspect_notebook(str(notebook)))
    if unknown:
        raise NotebookError(f"{notebook.stem}: its parameters cell lacks {', '.join(unknown)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}")
    try:
        papermill.execute_notebook(
            str(notebook),
            str(partial),
            parameters,
            kernel_name="python3",
            cwd=str(root),
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
            coalesce_streams=True,  # of a progress bar, only its last state
            extra_arguments=["--log-level=ERROR"],  # not: "running over TCP without encryption"
        )
    except papermill.PapermillExecutionError as error:
        os.replace(partial, output)
        last = str(error.evalue).strip().splitlines()[-1:] or ["no message"]
        raise NotebookError(
            f"{notebook.stem}, cell [{error.exec_count}]: {error.ename}: {last[0]} "
            f"(traceback in {output})"
        ) from None
    except DeadKernelError:
        raise NotebookError(
            f"{notebook.stem}: the kernel died, most likely for lack of memory; "
            "run again to go on where it was"
        ) from None
    os.replace(partial, output)


def _inputs(notebook: Path, settings: Settings) -> str:
    """A hash of what decides a notebook's results: itself, the settings, the code, the data.

    Of the settings also those of profile paper, whose form of step 3 Table 3 compares.
    """
    digest = hashlib.sha256(notebook.read_bytes() + settings.model_dump_json().encode())
    expected = [REPOSITORY / "expected" / name for name in ("claims.yml", "items.yml", "paper.csv")]
    code = sorted((REPOSITORY / "invertune").glob("*.py"))
    for path in [*code, *expected, PARAMS / "paper.yml"]:
        digest.update(path.read_bytes())
    for path in sorted(p for p in (REPOSITORY / "data").rglob("*") if p.is_file()):
        status = path.stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    backbones = {settings.backbone, *settings.generalization.backbones}
    named = {settings.weights.replace("{backbone}", name).partition(":")[2] for name in backbones}
    places = [Path(place) for place in sorted(named) if place]
    for path in [p for place in places for p in sorted([place, *place.glob("*")])]:
        if path.is_file():
            digest.update(f"{path} {file_hash(path)}\n".encode())
    if settings.data.source != PICTOGRAMS:
        from invertune import data  # imports torch, which the embedded data need not wait for

        digest.update(data.manifest(settings.data).encode())
    return digest.hexdigest()


def _left(settings: Settings, root: Path, store: Path, start: float) -> dict[str, Any]:
    """What a notebook that began at ``start`` has left: its seeds, the hash of every table and
    figure, and whose numbers, result files and artifacts stand there.
    """
    folder, results = (root / name / settings.profile for name in ("figures", "results"))
    drawn = [p for p in sorted(folder.glob("*")) if p.stat().st_mtime >= start]
    return {
        "seeds": [str(seed) for seed in settings.seeds],
        "figures": {p.name: file_hash(p) for p in drawn},
        "files": sorted(p.name for p in results.glob("*") if p.name[0] != "."),
        "numbers": sorted(_numbers(results)),
        "artifacts": sorted(p.name for p in store.glob("?" * 64)),
    }


def _numbers(results: Path) -> set[str]:
    """The artifacts that the rows of results.csv came from."""
    path = results / "results.csv"
    if not path.is_file():
        return set()
    with path.open() as file:
        return {row["key"] for row in csv.DictReader(file)}


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and file_hash(path) == digest


def _finished(stamp: Path, inputs: str, root: Path, store: Path) -> bool:
    """Whether the notebook ran to its end on the same inputs and all it left is as it was."""
    if not stamp.is_file() or not stamp.with_suffix("").with_suffix(".ipynb").is_file():
        return False
    left, results = read_stamp(stamp), stamp.parents[1]
    if left.get("inputs") != inputs:
        return False
    figures = root / "figures" / results.name
    return (
        all(_is(figures / name, digest) for name, digest in left["figures"].items())
        and all((results / name).exists() for name in left["files"])
        and _numbers(results).issuperset(left["numbers"])
        and all((store / key).is_dir() for key in left["artifacts"])
    )


if __name__ == "__main__":
    sys.exit(main())
