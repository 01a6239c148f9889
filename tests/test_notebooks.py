"""The rules that keep the notebooks thin and alike (shape, parameters cell, no outputs)."""

from __future__ import annotations

import ast
import copy
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
PARAMETERS = {"profile": "smoke", "overrides": {}}
FORBIDDEN = re.compile(r"\.backward\(|\.step\(|torch\.optim|\boptimizer\b|zero_grad")


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def lines(cell: Any) -> list[str]:
    return [line for line in cell.source.splitlines() if line.strip()]


def broken_rules(notebook: Any) -> list[str]:
    """Every rule that the notebook breaks, in words."""
    cells, found = code_cells(notebook), []
    if len(cells) > 13:
        found.append(f"{len(cells)} code cells, at most 13")
    if max(map(len, map(lines, cells)), default=0) > 15:
        found.append("a cell of more than 15 lines")
    if sum(len(lines(cell)) for cell in cells) > 100:
        found.append("more than 100 lines of code")
    if any(cell.outputs or cell.execution_count for cell in cells):
        found.append("outputs; run nbstripout")
    if notebook.cells[0].cell_type != "markdown" or not notebook.cells[0].source.startswith("# "):
        found.append("no title at the top")
    for number, cell in enumerate(cells):
        if any("\t" in line or len(line) > 100 for line in lines(cell)):
            found.append(f"code cell {number}: a line of more than 100 characters")
        found += [f"code cell {number}: {what}" for what in thick(cell.source)]
    return found + parameter_rules(cells)


def thick(source: str) -> list[str]:
    """Definitions and training code, which belong in the module."""
    tree = ast.parse(source)
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    found = [type(node).__name__ for node in ast.walk(tree) if isinstance(node, definitions)]
    found += ["while loop" for node in ast.walk(tree) if isinstance(node, ast.While)]
    return found + [f"training code ({m})" for m in FORBIDDEN.findall(source)]


def parameter_rules(cells: list[Any]) -> list[str]:
    tagged = [i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1:
        return [f"{len(tagged)} cells with the tag parameters, exactly 1"]
    cell = cells[tagged[0]]
    tree = ast.parse(cell.source)
    values = {
        ast.unparse(node.targets[0]): ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
    }
    found = []
    if values != PARAMETERS or list(values) != list(PARAMETERS) or len(tree.body) != 2:
        found.append('the parameters cell is not profile = "smoke" and overrides = {}')
    after = cells[tagged[0] + 1].source if tagged[0] + 1 < len(cells) else ""
    if "load_settings(profile, overrides)" not in after:
        found.append("the cell after the parameters does not load the settings")
    return found


def existing() -> list[Path]:
    return sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", existing(), ids=lambda p: p.stem)
def test_notebook_keeps_the_rules(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert broken_rules(notebook) == []
    assert notebook.metadata.get("kernelspec", {}).get("name", "python3") == "python3"


@pytest.mark.parametrize("path", existing(), ids=lambda p: p.stem)
def test_notebook_says_where_it_differs(path):
    notebook = nbformat.read(path, as_version=4)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert re.search("differs from the paper", texts[-1])


def thin() -> Any:
    """A notebook that keeps every rule."""
    v4 = nbformat.v4
    parameters = v4.new_code_cell('profile = "smoke"  # params/<profile>.yml\noverrides = {}')
    parameters.metadata["tags"] = ["parameters"]
    return v4.new_notebook(
        cells=[
            v4.new_markdown_cell("# Title"),
            parameters,
            v4.new_code_cell("settings = load_settings(profile, overrides)\nprint(settings)"),
        ]
    )


def append(source: str):
    return lambda n: n.cells.append(nbformat.v4.new_code_cell(source))


BREAKS = {
    "at most 13": lambda n: [append("x = 1")(n) for _ in range(12)],
    "15 lines": append("x = 1\n" * 16),
    "100 lines": lambda n: [append("x = 1\n" * 14)(n) for _ in range(8)],
    "FunctionDef": append("def f(): ..."),
    "ClassDef": append("class A: ..."),
    "Lambda": append("f = lambda: 1"),
    "while loop": append("while True: break"),
    "training code": append("loss.backward()"),
    "100 characters": append("x = '" + "x" * 100 + "'"),
    "title": lambda n: n.cells.pop(0),
    "nbstripout": lambda n: n.cells[2].update(execution_count=3),
    "exactly 1": lambda n: n.cells[1].metadata.pop("tags"),
    'profile = "smoke"': lambda n: n.cells[1].update(source='profile = "mini"\noverrides = {}'),
    "overrides = {}": lambda n: n.cells[1].update(source='profile = "smoke"'),
    "load the settings": lambda n: n.cells[2].update(source="print(1)"),
}


@pytest.mark.parametrize("words", BREAKS)
def test_every_rule_can_fail(words):
    notebook = copy.deepcopy(thin())
    assert broken_rules(notebook) == []
    BREAKS[words](notebook)
    assert any(words in rule for rule in broken_rules(notebook))
