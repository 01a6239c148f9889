"""run_all.sh and the command line: help, plans, clear errors, finished work, kills, two at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import wait_until

from invertune.settings import load_settings
from tools import run_notebooks

REPOSITORY = Path(__file__).resolve().parents[1]
RUNNER = """
import sys
from pathlib import Path
from tools import run_notebooks
sys.exit(run_notebooks.main(sys.argv[2:], root=Path(sys.argv[1])))
"""


def environment(**more: str) -> dict[str, str]:
    own = {"INVERTUNE_VENV": sys.prefix, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    kept = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    return {**kept, **own, **more}


def run_all(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [REPOSITORY / "run_all.sh", *arguments],
        env=environment(),
        cwd="/",
        capture_output=True,
        text=True,
    )


def invertune(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "invertune", *arguments],
        capture_output=True,
        env=environment(**more),
        text=True,
    )


def test_help_names_every_option_without_an_environment():
    result = subprocess.run(
        [REPOSITORY / "run_all.sh", "mini", "--help"],
        capture_output=True,
        env={"PATH": "/usr/bin:/bin"},
        text=True,
    )
    assert result.returncode == 0 and result.stderr == ""
    for word in (
        "smoke",
        "mini",
        "paper",
        "--only",
        "--seeds",
        "--jobs",
        "--dry-run",
        "--overrides",
        "purify",
        "check",
        "lab",
        "env",
    ):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mimi",), "unknown profile 'mimi'; choose one of mini, paper, scenes224, smoke"),
        (("smoke", "--seeds", "1,x"), "--seeds '1,x' is not a list of whole numbers"),
        (("smoke", "--seeds", "1,1"), "seeds = [1, 1]: a seed stands there twice"),
        (("smoke", "--overrides", "{inversion: {stps: 3}}"), "unknown key 'inversion.stps'"),
        (("smoke", "--overrides", "{attacks: {names: [x]}}"), "'badnet', 'blended'"),
        (("smoke", "--overrides", "{backbone: RN5}"), "'RN50', 'RN101'"),
        (("smoke", "--overrides", "3"), "is not a mapping"),
        (("smoke", "--overrides", "{a"), "is not YAML"),
        (("smoke", "--only", "99"), "no notebook starts with '99'; there are: 01_attacks"),
        (("smoke", "--only", "9", "--dry-run"), "no notebook starts with '9'"),
        (("smoke", "--fast"), "unrecognized arguments: --fast"),
        (("smoke", "--overrides", "{target: mushrom}"), "'mushrom' is not in the list of 210"),
        (
            ("smoke", "--only", "01", "--overrides", "{generalization: {targets: [lemmon]}}"),
            "'lemmon' is not in the list of 210",
        ),
        (
            ("smoke", "--overrides", "{identification: {candidates: 211}}"),
            "candidates = 211, but there are 210 classes",
        ),
        (("env",), "env needs a command, for example: ./run_all.sh env python -m invertune --help"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(arguments, words):
    result = run_all(*arguments)
    assert result.returncode == 2 and words in result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("usage:")]
    assert len(lines) == 1


def test_a_command_shows_its_own_help():
    assert "local-dir:FOLDER" in run_all("purify", "--help").stdout


def test_env_runs_any_command_in_the_environment():
    result = run_all("env", "python", "-m", "invertune", "plan", "--help")
    assert result.returncode == 0 and result.stdout.startswith("usage: python -m invertune plan")
    code = "import os, sys; print(sys.prefix, os.getcwd(), *sys.argv[1:], sep='|'); sys.exit(7)"
    result = run_all("env", "python", "-c", code, "two words", "-h")
    assert result.stdout == f"{sys.prefix}|{REPOSITORY}|two words|-h\n"
    assert result.returncode == 7
    assert run_all("env", "torchrun", "--help").stdout.startswith("usage: torchrun")


def test_the_users_packages_and_kernels_do_not_enter_the_environment(tmp_path):
    (tmp_path / "numpy.py").write_text("raise SystemExit('not the locked one')")
    code = "import numpy, os; print(numpy.__version__, os.environ.get('JUPYTER_PATH'))"
    result = subprocess.run(
        [REPOSITORY / "run_all.sh", "env", "python", "-c", code],
        env=environment(PYTHONPATH=str(tmp_path), JUPYTER_PATH=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and result.stdout.endswith("None\n"), result.stderr


def test_a_folder_of_other_files_never_becomes_an_environment(tmp_path):
    kept = tmp_path / "thesis.txt"
    kept.write_text("years of work")
    result = subprocess.run(
        [REPOSITORY / "run_all.sh", "check"],
        env=environment(INVERTUNE_VENV=str(tmp_path), INVERTUNE_PYTHON=sys.executable),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and kept.read_text() == "years of work"
    assert f"{tmp_path} holds other files and no environment" in result.stderr


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    result = subprocess.run(
        [REPOSITORY / "run_all.sh", "mini", "--dry-run", "--seeds", "1,2", "--only", "03"],
        env=environment(INVERTUNE_STORE=str(tmp_path / "store")),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "seeds 1, 2" in result.stdout and "03_trigger_inversion" in result.stdout
    assert "204,800" in result.stdout  # 2 seeds x 8 models x 200 steps x 64 images
    assert "01_attacks" not in result.stdout and "minutes" in result.stdout
    assert "jobs at once: " in result.stdout
    assert re.search(r"the store holds:\n  03_trigger_inversion +0 of 16\n", result.stdout)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("store", "show", "ffff"), "0 artifacts have a key that starts with 'ffff'"),
        (("pretrain", "RN5"), "'RN50', 'RN101'"),
        (("publish", "mimi"), "unknown profile 'mimi'"),
        (("data", "mimi"), "unknown profile 'mimi'"),
    ],
)
def test_command_line_errors_are_one_line(tmp_path, arguments, words):
    result = invertune(*arguments, INVERTUNE_STORE=str(tmp_path))
    assert result.returncode == 2 and words in result.stderr
    assert result.stderr.count("\n") == 1


def test_check_names_what_is_there_and_the_next_command(tmp_path):
    result = invertune("check", INVERTUNE_STORE=str(tmp_path), HF_HUB_CACHE=str(tmp_path))
    first = [line.split()[0] for line in result.stdout.splitlines() if line[0] != " "]
    assert first == [
        "versions",
        "device",
        "memory",
        "disk",
        "data",
        *["model"] * 4,
        *["weights"] * 4,
        "store",
        "next",
    ]
    assert "hf download timm/resnet101_clip.openai open_clip_model.safetensors" in result.stdout
    assert "Traceback" not in result.stderr
    wrong = re.search(r"^model .*: (MISSING|DAMAGED)", result.stdout, re.MULTILINE)
    assert result.returncode == (1 if wrong else 0)


def test_check_tells_found_data_of_the_paper_from_missing(tmp_path):
    (tmp_path / "wordnet").mkdir()
    for kind in ("noun", "verb", "adj", "adv"):
        (tmp_path / "wordnet" / f"data.{kind}").touch()
    given = {"INVERTUNE_STORE": str(tmp_path), "INVERTUNE_DATA": str(tmp_path)}
    lines = [line.strip() for line in invertune("check", **given).stdout.splitlines()]
    assert f"found in {tmp_path}: wordnet" in lines
    assert [" ".join(n.split()[:2]) for n in lines if n.startswith("MISSING")] == [
        "MISSING cc3m:",
        "MISSING imagenet:",
        "MISSING coco:",
    ]
    (tmp_path / "wordnet/data.adv").unlink()
    result = invertune("check", **given)
    assert f"MISSING wordnet: not found: {tmp_path}/wordnet/data.adv" in result.stdout
    assert f"found in {tmp_path}: nothing" in result.stdout


CELL = """
import os, sys, time
sys.path.insert(0, {repository!r})
assert os.environ["HF_HUB_OFFLINE"] == "1"  # smoke and mini stay on this machine
from pathlib import Path
import torch
from invertune.settings import load_settings
from invertune.store import default_root, obtain
settings = load_settings(profile, overrides)
out = Path("results") / settings.profile
for part in range(3):
    (out / "began").open("a").write(f"{{part}} ")
    while part >= {hold} and not Path("go").exists():
        time.sleep(0.01)
    work = lambda _: ({{"w": {{"x": torch.randn(3)}}}}, {{"seconds": time.time()}})
    obtain(default_root(), f"part{{part}}", 1, {{}}, [], "d", work, settings.seeds[0])
(out / "left.txt").write_text("done")
figures = Path("figures") / settings.profile
figures.mkdir(parents=True, exist_ok=True)
(figures / "table1.md").write_text("| ASR |")
"""


def make_root(folder: Path, hold: int = 9, extra: str = "") -> Path:
    """A folder with one tiny notebook that waits at part ``hold`` until "go" exists."""
    v4 = nbformat.v4
    parameters = v4.new_code_cell('profile = "smoke"\noverrides = {}')
    parameters.metadata["tags"] = ["parameters"]
    work = v4.new_code_cell(CELL.format(repository=str(REPOSITORY), hold=hold) + extra)
    notebook = v4.new_notebook(cells=[parameters, work])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    (folder / "notebooks").mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / "notebooks" / "01_tiny.ipynb")
    return folder


def start(root: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUNNER, str(root), *arguments]
    return subprocess.Popen(
        command,
        env=environment(INVERTUNE_STORE=str(root / "store")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate()
    return process.returncode, out, err


def wait_for_part(root: Path, part: int) -> None:
    began = root / "results" / "smoke" / "began"
    wait_until(lambda: began.exists() and str(part) in began.read_text().split(), f"part {part}")


def stored(root: Path) -> dict[str, bytes]:
    return {p.parent.name: p.read_bytes() for p in (root / "store").glob("*/w.safetensors")}


def test_a_second_run_does_nothing_until_something_changes(tmp_path):
    root = make_root(tmp_path)
    code, out, err = finish(start(root, "smoke"))
    assert code == 0, err
    assert "01_tiny: running" in out and "01_tiny: done" in out
    executed = root / "results" / "smoke" / "notebooks" / "01_tiny.ipynb"
    before, first = stored(root), executed.stat().st_mtime_ns
    code, out, _ = finish(start(root, "smoke"))
    assert code == 0 and out.count("\n") == 1 and "finished before, nothing to do" in out
    assert executed.stat().st_mtime_ns == first

    lost = root / "results" / "smoke" / "left.txt"
    changed = root / "figures" / "smoke" / "table1.md"
    lost.unlink()
    code, out, _ = finish(start(root, "smoke"))
    assert code == 0 and out.count("stored (") == 0 and lost.exists() and stored(root) == before
    changed.write_text("another run's")
    code, out, _ = finish(start(root, "smoke"))
    assert code == 0 and out.count("stored (") == 0 and changed.read_text() == "| ASR |"

    executed.with_suffix(".done.json").write_text("")  # as a machine that lost power may leave it
    code, out, _ = finish(start(root, "smoke"))
    assert code == 0 and "01_tiny: running" in out and out.count("stored (") == 0

    code, out, _ = finish(start(root, "smoke", "--seeds", "5"))
    assert code == 0 and out.count("stored (") == 3 and len(stored(root)) == 6


def test_other_weights_at_the_same_place_are_other_inputs(tmp_path):
    settings = load_settings("smoke", {"weights": f"local-dir:{tmp_path}/{{backbone}}"})
    notebook, hashes = make_root(tmp_path) / "notebooks" / "01_tiny.ipynb", set()
    for backbone, content in (("RN50", "one"), ("RN50", "two"), ("RN50", "two"), ("ViT-B-32", "")):
        (tmp_path / backbone).mkdir(exist_ok=True)
        (tmp_path / backbone / "weights").write_text(content)
        hashes.add(run_notebooks._inputs(notebook, settings))
    assert len(hashes) == 3


def test_killed_at_several_points_it_resumes_without_repeating_a_step(tmp_path):
    for part in range(3):
        process = start(make_root(tmp_path, hold=part), "smoke")
        wait_for_part(tmp_path, part)
        kept = stored(tmp_path)
        assert len(kept) == part
        process.kill()
        process.wait()
        assert not (tmp_path / "results" / "smoke" / "notebooks" / "01_tiny.done.json").exists()
    code, out, err = finish(start(make_root(tmp_path), "smoke"))
    assert code == 0, err
    assert out.count("stored (") == 1
    assert kept.items() <= stored(tmp_path).items() and len(stored(tmp_path)) == 3


def test_two_runs_of_a_profile_at_once(tmp_path):
    first = start(make_root(tmp_path, hold=0), "smoke")
    wait_for_part(tmp_path, 0)
    code, _, err = finish(start(tmp_path, "smoke"))
    assert code == 3
    assert err == (
        f"error: another run of profile smoke is going on (pid {first.pid}); "
        "wait for it, or stop it\n"
    )
    (tmp_path / "go").touch()
    assert finish(first)[0] == 0


def test_a_failing_notebook_is_one_line_and_keeps_its_traceback(tmp_path):
    root = make_root(
        tmp_path,
        extra="from invertune.store import StoreError\n"
        "raise StoreError('the disk is full: 0 MB free')",
    )
    code, _, err = finish(start(root, "smoke"))
    assert code == 1 and "Traceback" not in err
    assert "01_tiny, cell [3]: StoreError: the disk is full: 0 MB free" in err.splitlines()[-1]
    executed = root / "results" / "smoke" / "notebooks" / "01_tiny.ipynb"
    assert "Traceback" in json.dumps(nbformat.read(executed, as_version=4))
    assert not executed.with_suffix(".done.json").exists()


@pytest.mark.parametrize(
    "script", ["run_all.sh", "run_tests.sh", "tools/environment.sh", "workflow/run.sh"]
)
def test_scripts_are_sound_bash(script):
    subprocess.run(["bash", "-n", REPOSITORY / script], check=True)
