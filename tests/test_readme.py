"""README shows the published numbers, and every file it links to exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from invertune.claims import load_claims

ROOT = Path(__file__).resolve().parents[1]


def test_the_results_table_is_fresh() -> None:
    command = [sys.executable, "-m", "tools.update_readme", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "least"), [("README.md", 9), ("REPRODUCING.md", 3)])
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
