"""Other targets and other backbones: Tables 4, 5 and 13-15 (section 4.5, appendix D.3).

A case is the profile's chain with one setting changed, so the store holds what the two share. Rows
for the results table first, then what notebook 06 shows. Rates are in percent.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from invertune import defenses, reports, steps, tables
from invertune.chain import Chain
from invertune.figures import (
    COLUMN_IN,
    DEFENSE_COLORS,
    STYLE,
    bars,
    canvas,
    legend_above,
    percent_axis,
)
from invertune.results import to_frame
from invertune.rows import Rows, metric_row, shared_columns
from invertune.sections import EMBEDDED
from invertune.settings import other_models, suspects
from invertune.weights import for_any_backbone, locked_hash

NOT_SHIPPED = "weights not shipped"


@dataclass(frozen=True)
class Case:
    """One target (``item`` table4) or backbone (table5) with its chain."""

    item: str
    name: str
    chain: Chain

    @property
    def shipped(self) -> bool:
        """Whether the backbone has weights of its own; without them nothing of the case is run."""
        settings = self.chain.settings
        if settings.weights == EMBEDDED:
            return locked_hash(settings.backbone) is not None
        return self.item == "table4" or for_any_backbone(settings.weights)

    @property
    def place(self) -> dict[str, str]:
        """The columns that tell the case's rows from others'."""
        settings = self.chain.settings
        attack = settings.generalization.attack
        return {"backbone": settings.backbone, "target": settings.target, "attack": attack}


def cases(chain: Chain) -> tuple[Case, ...]:
    """The profile's other targets (Table 4), then its other backbones (Table 5)."""
    other = other_models(chain.settings)
    return tuple(Case(item, name, one_attack(chain, **{key: name})) for item, key, name in other)


def shipped(chain: Chain) -> list[Case]:
    """The ``cases`` that can be run."""
    return [case for case in cases(chain) if case.shipped]


def one_attack(chain: Chain, **settings: Any) -> Chain:
    """The chain with other settings, and notebook 06's one attack."""
    own = chain.settings
    attacks = own.attacks.model_copy(update={"names": (own.generalization.attack,)})
    return chain.with_settings(attacks=attacks, **settings)


def describe(found: Sequence[Case]) -> str:
    """A line per case: what is run, or that its weights are missing and what would make them."""
    lines = []
    for case in found:
        backbone, target, name = case.place.values()
        attack, item = tables.label("attack", name), case.item.replace("table", "Table ")
        line = f"{item}: {attack} on {backbone}, target {target}"
        make = f"python -m invertune pretrain {backbone}"
        if case.chain.settings.weights != EMBEDDED:
            make = "write {backbone} where the folders in weights differ"
        lines.append(line if case.shipped else f"{line}: {NOT_SHIPPED}, left out ({make})")
    return "\n".join(lines)


def with_rates(case: Case, main: Chain, seed: int, names: Iterable[str] | None = None) -> Chain:
    """The case's chain with ``baseline_lrs`` rates of the grids of the baselines ``names``.

    Without ``names``, of all. Where that is not the whole grid, it begins at the rate that the same
    attack got in Table 1 (``main``), on held-out images; the case then chooses among its rates on
    its own model.
    """
    baselines, own = case.chain.settings.baselines, main.settings.generalization
    grids: dict[str, Any] = {}
    for name in own.baselines if names is None else names:
        section = getattr(baselines, name)
        if len(section.lrs) > own.baseline_lrs:
            lrs = sorted(section.lrs, reverse=True)
            chosen = defenses.baseline(main, name, own.attack, seed).metrics["lr"]
            start = min(lrs.index(chosen), len(lrs) - own.baseline_lrs)
            few = tuple(lrs[start : start + own.baseline_lrs])
            grids[name] = section.model_copy(update={"lrs": few})
    return one_attack(case.chain, baselines=baselines.model_copy(update=grids))


def generalization_rows(chain: Chain) -> Rows:
    """Tables 4, 5 and 13-15, for every case whose weights are there."""
    return [row for case in shipped(chain) for row in case_rows(case, chain)]


def fill(main: Chain, item: str, name: str, defense: str, seed: int) -> None:
    """Makes what ``case_rows`` finds of one defense, or of "none"; nothing without weights."""
    case = next(case for case in cases(main) if (case.item, case.name) == (item, name))
    attack = main.settings.generalization.attack
    if not case.shipped:
        return
    if defense == "none":
        reports.undefended_rows(case.chain, attack, seed)
    else:
        tried = [defense] if defense in main.settings.generalization.baselines else []
        if not tried:
            steps.impacts(case.chain, attack, seed)
        reports.defense_rows(with_rates(case, main, seed, tried), defense, attack, seed)


def case_rows(case: Case, main: Chain) -> Rows:
    """One case: CA and ASR of every defense, layer impacts, and the true target's rank."""
    rows: Rows = []
    for attack, seed in suspects(case.chain.settings):
        chain = with_rates(case, main, seed)
        measured = reports.undefended_rows(chain, attack, seed)
        for defense in main.settings.generalization.defenses:
            measured += reports.defense_rows(chain, defense, attack, seed)
        rows += [{**r, "paper_item": _item(case, r)} for r in measured]
        layers = reports.layer_rows(chain, attack, seed)
        rows += layers if case.item == "table5" else [{**r, "paper_item": "extra"} for r in layers]
        rows += _found_rows(chain, attack, seed)
    return rows


def _found_rows(chain: Chain, attack: str, seed: int) -> Rows:
    """The candidates of step 1, and whether the last layer (of however many) is critical."""
    found, moved = (step(chain, attack, seed) for step in (steps.identified, steps.impacts))
    base = shared_columns(chain, attack, seed, found.key, task="zeroshot")
    critical = steps.critical(chain, attack, seed).layers
    last = int([*steps.layer_impacts(chain, attack, seed)][-1] in critical)
    layer = shared_columns(chain, attack, seed, moved.key, variant={"layer": "last"})
    return [*reports.candidate_rows(chain, found, base), metric_row(layer, "layer_selected", last)]


def _item(case: Case, row: dict[str, str]) -> str:
    """Tables 4 and 5 hold what Table 1 has of zero-shot classification; the rest are extras."""
    zero_shot = row["paper_item"] == "table1" and row["task"] == "zeroshot"
    return case.item if zero_shot else "extra"


def _rate(results: pd.DataFrame, case: Case, **where: str) -> list[float]:
    """The case's values, one per seed."""
    wanted = {**case.place, "task": "zeroshot", "k": "1", "variant": "", **where}
    return list(tables.select(results, **wanted).value)


def accuracy_table(
    found: Sequence[Case], main: Chain, results: pd.DataFrame, item: str
) -> pd.DataFrame:
    """Table 4 or 5: a line per defense, CA and ASR per case (means over seeds)."""
    chosen = [case for case in found if case.item == item]
    lines = []
    for defense in ("none", *main.settings.generalization.defenses):
        line: dict[str, Any] = {"defense": tables.label("defense", defense)}
        for case, metric in itertools.product(chosen, ("ca", "asr")):
            where = {"paper_item": item, "defense": defense, "metric": metric}
            value = np.mean(_rate(results, case, **where)) if case.shipped else NOT_SHIPPED
            line[f"{case.name} {tables.label('metric', metric)}"] = value
        lines.append(line)
    return pd.DataFrame(lines)


def case_table(found: Sequence[Case], main: Chain) -> pd.DataFrame:
    """Per case and seed: the attack's gate, what InverTune found, the baselines' rates.

    A star marks a baseline none of whose rates kept held-out CA within the allowance.
    """
    lines: list[dict[str, Any]] = []
    for case in found:
        for attack, seed in suspects(case.chain.settings):
            line = {"case": case.name, "seed": seed, "attack": NOT_SHIPPED}
            lines.append(line | (_chosen(case, main, attack, seed) if case.shipped else {}))
    return pd.DataFrame(lines)


def _chosen(case: Case, main: Chain, attack: str, seed: int) -> dict[str, Any]:
    chain, gate = with_rates(case, main, seed), case.chain.settings.attacks
    missed = tables.gate_missed(to_frame(reports.undefended_rows(chain, attack, seed)), gate)
    line: dict[str, Any] = {
        "attack": "FAILED" if attack in missed else "passed",
        "found": steps.first_candidate(chain, attack, seed),
        "held-out inverted ASR": steps.inverted(chain, attack, seed).metrics["inverted_asr"],
        "critical layers": tables.layers(steps.critical(chain, attack, seed).layers),
    }
    for name in main.settings.generalization.baselines:
        made = defenses.baseline(chain, name, attack, seed).metrics
        star = "" if made["qualified"] else "*"
        line[f"{tables.label('defense', name)} lr"] = f"{made['lr']:g}{star}"
    return line


@mpl.rc_context(STYLE)
def asr_figure(chain: Chain, results: pd.DataFrame) -> Figure:
    """ASR of every defense on Table 1's model (where it was run), other targets and backbones."""
    first = Case("table1", f"{chain.settings.target}, {chain.settings.backbone}", one_attack(chain))
    undefended = {"paper_item": first.item, "defense": "none", "metric": "asr"}
    shown = [*([first] if _rate(results, first, **undefended) else []), *shipped(chain)]
    names = ("none", *chain.settings.generalization.defenses)
    groups = {}
    for defense in names:
        where = {"defense": defense, "metric": "asr"}
        found = {case.name: _rate(results, case, paper_item=case.item, **where) for case in shown}
        groups[tables.label("defense", defense)] = {name: v for name, v in found.items() if v}
    figure, axes = canvas(1, 1, COLUMN_IN, 0.7 + 0.085 * len(shown) * (len(names) + 1))
    colors = [DEFENSE_COLORS[defense] for defense in names]
    bars(axes[0, 0], [case.name for case in shown], groups, colors, column="case")
    attack = tables.label("attack", chain.settings.generalization.attack)
    percent_axis(axes[0, 0], f"Zero-shot ASR (%), {attack}")
    legend_above(figure, axes[0, 0])
    return figure
