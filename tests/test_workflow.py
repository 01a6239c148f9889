"""The grid on Snakemake: its jobs, the path a remote job takes, resuming, and the report."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import wait_until

from invertune.settings import load_settings

ROOT = Path(__file__).resolve().parents[1]
SHARED = ("data", "expected", "invertune", "notebooks", "params", "workflow")
SLURM = ROOT / "workflow/profiles/slurm/config.yaml"
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
    wait_until(notebook.exists, "the job starts")
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


def suggested() -> dict[str, int]:
    """How many GPUs a job of each rule gets, by the example in the profile slurm."""
    _, example = SLURM.read_text().split("# set-resources:\n")
    rules = yaml.safe_load("".join(line.removeprefix("#") for line in example.splitlines(True)))
    return {rule: own["gpu"] for rule, own in rules.items()}


def test_the_suggested_gpus_hold_the_batch_of_par():
    batch, per_pair_gb = load_settings("paper").baselines.par.batch, 0.067  # RN50, measured
    for rule, times in (("baseline", 1), ("target", 1), ("backbone", 2)):  # ViT-B/16: about twice
        gpus = suggested()[rule]
        assert batch % gpus == 0 and times * per_pair_gb * batch / gpus < 80


def test_the_grid_of_the_paper_trains_in_as_many_processes_as_a_job_has_gpus(folder):
    resources = [f"{rule}:gpu={gpus}" for rule, gpus in suggested().items()]
    names = ("--config", "profile=paper", "seeds=1,2", "--set-resources", *resources)
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
    for number, rules in (("05", ["baseline"]), ("06", ["target", "backbone"])):
        for rule in rules:
            launch = f"torchrun --standalone --nproc-per-node {suggested()[rule]} -m invertune fill"
            assert f"{launch} paper --only {number}" in out
    assert out.count("torchrun") == sum(count[rule] for rule in suggested())
    assert '"attacks": {"names": ["sig"]}, "baselines": {"names": ["par"]}' in out
