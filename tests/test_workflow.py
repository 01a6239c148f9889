"""The grid on Snakemake: its jobs, the path a remote job takes, resuming, and the report."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ("data", "expected", "invertune", "notebooks", "params", "workflow")
CELL = Path("results/smoke/grid/attack/badclip-0.done")
REMOTE = ("--executor=cluster-generic", "--cluster-generic-submit-cmd=bash")  # runs the job script
pytestmark = pytest.mark.skipif(
    shutil.which("snakemake") is None, reason="Snakemake is an extra: ./run_tests.sh installs it"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with the repository's parts, so that every job is still to be done."""
    for name in SHARED:
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def snakemake(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    store = os.environ.get("INVERTUNE_STORE") or str(folder / "store")
    return subprocess.Popen(
        ["snakemake", "--profile=workflow/profiles/local", *arguments],
        cwd=folder,
        env={**os.environ, "INVERTUNE_STORE": store, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return out


def kill_job(folder: Path) -> None:
    """Kills the running notebook of the cell, as a cluster does at its time limit."""
    notebook = folder / CELL.with_suffix(".ipynb")
    deadline = time.monotonic() + 200
    while not notebook.exists():
        assert time.monotonic() < deadline, "the job did not start"
        time.sleep(0.05)
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
            own = Path(os.readlink(process / "cwd")) == folder
        except OSError:
            continue
        if own and any(part.endswith(b"bin/papermill") for part in command):
            os.kill(int(process.name), signal.SIGKILL)
            found += 1
    assert found == 1


def test_a_killed_remote_job_is_run_again_and_reported(folder):
    arguments = (*REMOTE, "--seconds-between-status-checks=1", "--config", "profile=smoke", "--")
    process = snakemake(folder, *arguments, str(CELL))
    kill_job(folder)
    out, _ = process.communicate()
    assert process.returncode != 0 and not (folder / CELL).exists(), out

    assert "1 of 1 steps (100%) done" in finish(snakemake(folder, *arguments, str(CELL)))
    assert (folder / CELL).exists()
    assert r"\"names\": [\"badclip\"]" in (folder / CELL.with_suffix(".ipynb")).read_text()
    seconds, *_ = (folder / CELL.with_suffix(".tsv")).read_text().splitlines()[1].split("\t")
    assert float(seconds) > 0

    finish(
        snakemake(folder, "--config", "profile=smoke", "--report", "report.html", "--", str(CELL))
    )
    assert '"rule": "attack", "runtime"' in (folder / "report.html").read_text()


def test_the_grid_of_the_paper_trains_in_as_many_processes_as_a_job_has_gpus(folder):
    names = ("--config", "profile=paper", "seeds=1,2", "--set-resources", "attack:gpu=4")
    out = finish(snakemake(folder, "--dry-run", "--printshellcmds", *names))
    count = {
        p[0]: int(p[1])
        for line in out.splitlines()
        if len(p := line.split()) == 2 and p[1].isdigit()
    }
    assert count["attack"] == count["tune"] == 6 * 2 and count["baseline"] == 6 * 4 * 2
    assert count["target"] == count["backbone"] == 3 * 5 * 2 and count["whole"] == 7
    assert count["page"] == 1
    fill = "torchrun --standalone --nproc-per-node 4 -m invertune fill paper --only 01 --overrides"
    narrow = """'{"seeds": [2], "attacks": {"names": ["sig"]}}'"""
    assert f"{fill} {narrow} && papermill notebooks/01_attacks.ipynb" in out
    assert out.count("torchrun") == count["attack"]
    beside = r'"attacks": {"names": ["badclip", "sig"]}, "baselines": {"names": ["par"]}'
    assert beside in out  # notebook 05 draws the rebound, which is BadCLIP's
