"""README shows the published numbers, and every file it links to exists."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from invertune.claims import load_claims
from invertune.plan import RATES, planned
from invertune.results import PUBLISHED
from invertune.settings import load_settings

ROOT = Path(__file__).resolve().parents[1]


def changed_figures(root: Path) -> str:
    """What git says of published files that are not the committed ones; "" where git cannot say."""
    command = ["git", "status", "--porcelain", *(f"figures/{name}" for name in PUBLISHED)]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def test_the_results_table_is_fresh() -> None:
    if changed_figures(ROOT):
        pytest.skip("figures holds another run's files: git restore figures")
    command = [sys.executable, "-m", "tools.update_readme", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_another_runs_figures_are_told_from_the_committed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "figures" / "mini" / "table1.md"
    page.parent.mkdir(parents=True)
    page.touch()
    assert changed_figures(tmp_path) == ""  # no repository
    if shutil.which("git"):
        subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
        assert changed_figures(tmp_path).startswith("?? figures/mini/")
    monkeypatch.setenv("PATH", "")
    assert changed_figures(tmp_path) == ""  # no git


@pytest.mark.parametrize(
    ("name", "least"), [("README.md", 9), ("REPRODUCING.md", 3), ("RESULTS.md", 4)]
)
def test_every_link_leads_to_a_file(name: str, least: int) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text())
    local = [link for link in links if "://" not in link]
    assert len(local) >= least and not [link for link in local if not (ROOT / link).exists()]


def test_the_map_names_every_module() -> None:
    page = (ROOT / "invertune" / "README.md").read_text()
    modules = {path.stem for path in (ROOT / "invertune").glob("*.py")} - {"__init__"}
    assert not [name for name in modules if f"`{name}`" not in page]


def test_reproducing_names_every_claim_and_notebook() -> None:
    page = (ROOT / "REPRODUCING.md").read_text()
    groups = {f"`{claim.id.split('.')[0]}.*`" for claim in load_claims()}
    notebooks = {f"{path.stem}.done" for path in (ROOT / "notebooks").glob("0*.ipynb")}
    assert not [words for words in groups | notebooks if words not in page]


def test_reproducing_has_the_exposures_of_the_plan() -> None:
    page = (ROOT / "REPRODUCING.md").read_text()
    totals: Counter[str] = Counter()
    for work in planned(load_settings("paper")):
        totals[work.notebook] += work.total
    found = re.findall(r"/grid/(\w+)\.done` \| ([\d.,]+) \|", page)
    assert dict(found) == {name: f"{total / 1e6:,.1f}" for name, total in totals.items()}
    assert f"| {totals.total() / 1e6:,.1f} | |" in page  # the last line: all of them
    of_any = [r for r in json.loads(RATES.read_text()) if "profile" not in r]
    measured = next(r for r in of_any if r["image_size_px"] == 224)
    rate = measured["images_per_second"]["finetune"]
    baselines, everything = (n / rate / 3600 for n in (totals["05_baselines"], totals.total()))
    (row,) = (line for line in page.splitlines() if line.startswith(f"| {rate:,} | an H200"))
    assert row.endswith(f"| {baselines:.0f} h | {everything:.0f} h |")
