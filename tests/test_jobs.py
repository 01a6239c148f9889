"""Filling the store in several processes: what they make, and how they end."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import QUICK_CASES, wait_until
from notebook_rows import ROWS

from invertune import data as datasets
from invertune import jobs, provenance
from invertune.__main__ import main
from invertune.chain import Model, open_chain
from invertune.plan import planned
from invertune.settings import load_settings
from invertune.store import entries

ROOT = Path(__file__).resolve().parents[1]
QUICK = QUICK_CASES | {
    "rebound": {"steps": 2, "attacks": ["badclip"]},
    "ablations": {"weight_attacks": ["badclip"], "perturbation_attacks": ["badclip"]},
}
ONE_ATTACK = {
    "data": {"poisoning_pairs": 210, "evaluation_images": 42, "retrieval_images": 20},
    "attacks": {
        "names": ["badnet", "blended"],
        "badnet": {"steps": 2, "batch": 8},
        "blended": {"steps": 2, "batch": 8},
    },
}


def test_a_notebook_computes_nothing_but_evaluations_after_its_calls(tmp_path, monkeypatch):
    (tmp_path / "templates.json").write_text('["a picture of {}"]')
    monkeypatch.setattr(datasets, "TEMPLATES", tmp_path / "templates.json")
    monkeypatch.setenv("INVERTUNE_STORE", str(tmp_path / "store"))
    chain = open_chain(load_settings("smoke", QUICK))
    found = jobs.calls(chain.settings)
    assert list(found) == sorted({work.notebook for work in planned(chain.settings)})
    for notebook, calls in found.items():
        assert jobs.missing(chain.settings, notebook), notebook
        for function, arguments in calls:
            function(chain, *arguments)
        with monkeypatch.context() as patch:
            if notebook != "06_generalization":  # its similarity_rank asks the text tower
                patch.setattr(Model, "clip", property(lambda model: pytest.fail(model.name)))
            assert jobs.missing(chain.settings, notebook) == []  # and no model was loaded
        before = {a.key for a in entries(chain.store)}
        for rows in ROWS[notebook]:
            rows(chain)
        made = {a.meta["step"] for a in entries(chain.store) if a.key not in before}
        assert made <= {"evaluation", "scores"}, notebook


@pytest.mark.parametrize("profile", ["smoke", "mini", "scenes224"])
def test_an_empty_store_holds_nothing(profile, tmp_path, monkeypatch):
    monkeypatch.setenv("INVERTUNE_STORE", str(tmp_path))
    lines = [line.split() for line in jobs.held(load_settings(profile))]
    assert [line[1:3] for line in lines] == [["0", "of"]] * 7, lines


def fill(store: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "invertune", "fill", "smoke", *arguments]
    more = {"INVERTUNE_STORE": str(store), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        env={**os.environ, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("profile", "free_gb", "count"), [("mini", 99, 4), ("mini", 6, 2), ("smoke", 99, 1)]
)
def test_one_job_a_core_while_memory_and_work_last(profile, free_gb, count, monkeypatch):
    monkeypatch.setattr(jobs, "free_bytes", lambda: free_gb * 1e9)
    monkeypatch.setattr(jobs, "cpu_count", lambda: 4)
    assert jobs.default_count(load_settings(profile, {"device": "cpu"})) == count


@pytest.mark.parametrize(("limit", "left"), [("3000", 2500), ("max", 9000)])
def test_a_containers_memory_counts(limit, left, tmp_path, monkeypatch):
    memory = SimpleNamespace(available=9000)
    monkeypatch.setattr(provenance.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(provenance, "CGROUP", tmp_path)
    assert provenance.free_bytes() == 9000  # no container
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("1200\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 700\n")
    assert provenance.free_bytes() == left


def test_two_processes_leave_what_one_leaves(tmp_path):
    for name, jobs_at_once in (("one", "1"), ("two", "2")):
        arguments = ("--only", "01", "--overrides", str(ONE_ATTACK), "--jobs", jobs_at_once)
        process = fill(tmp_path / name, *arguments)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    one, other = ({a.key: a for a in entries(tmp_path / name)} for name in ("one", "two"))
    assert one.keys() == other.keys() and len(one) > 3
    for key, artifact in one.items():
        assert artifact.metrics == other[key].metrics  # one thread each, here as there


def test_no_process_is_started_where_the_store_has_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("INVERTUNE_STORE", str(tmp_path))
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", None)
    only = {"attacks": {"names": ["badnet"], "badnet": {"steps": 1, "batch": 8}}}
    settings = load_settings("smoke", only)
    with pytest.raises(TypeError):  # it would be started
        jobs.fill(settings, "01_attacks", 2)
    jobs.fill(settings, "01_attacks", 1)
    made = {a.key for a in entries(tmp_path)}
    assert [line.split() for line in jobs.held(settings, "01")] == [["01_attacks", "2", "of", "2"]]
    jobs.fill(settings, "01_attacks", 2)
    assert {a.key for a in entries(tmp_path)} == made


def test_the_processes_end_with_the_one_that_started_them(tmp_path):
    started = fill(tmp_path, "--only", "01", "--jobs", "2")
    children = functools.partial(psutil.Process(started.pid).children, recursive=True)
    # two, what starts them, and what tracks their resources
    wait_until(lambda: len(children()) >= 4, "the processes run")
    running = children()
    started.kill()
    started.communicate()
    _, alive = psutil.wait_procs(running, timeout=120)
    assert not alive


def test_an_error_in_a_process_is_one_line(tmp_path):
    wrong = "{attacks: {names: [badnet], badnet: {weight_decay: 1.0e+38}}}"
    failed = fill(tmp_path, "--only", "01", "--jobs", "2", "--overrides", wrong)
    _, errors = failed.communicate()
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert failed.returncode == 2 and len(lines) == 1 and "lower lr (now" in lines[0], errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--jobs", "0"), "'0' is not a whole number of at least 1"),
        (("--only", "99"), "no notebook starts with '99'"),
    ],
)
def test_a_wrong_argument_is_named(arguments, words, capsys):
    with pytest.raises(SystemExit) if "--jobs" in arguments else pytest.MonkeyPatch.context():
        assert main(["fill", "smoke", *arguments]) == 2
    assert words in capsys.readouterr().err
