"""Table 1 whole: every defense on every attack, what it costs, and its rebound (section 4.2).

Rows for the results table first, then what notebook 05 shows. Rates are in percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from seaborn.utils import relative_luminance

from invertune import defenses, steps, tables
from invertune.chain import Chain
from invertune.evaluation import evaluated
from invertune.figures import COLUMN_IN, STYLE, bars, canvas, legend_above, percent_axis, rate_text
from invertune.plan import invertune_passes
from invertune.reports import defense_rows
from invertune.rows import TASK_KS, Rows, mean, metric_row, own_rows, rates, shared_columns
from invertune.settings import suspects
from invertune.store import Artifact


def defenses_compared(chain: Chain) -> tuple[str, ...]:
    """The baselines of the profile, then InverTune."""
    return (*chain.settings.baselines.names, "invertune")


def comparison_rows(chain: Chain) -> Rows:
    """Table 1 and each defense's data: images it may use, and images that it was shown."""
    rows: Rows = []
    for attack, seed in suspects(chain.settings):
        for defense in defenses_compared(chain):
            rows += defense_rows(chain, defense, attack, seed)
            key = defenses.defended(chain, defense, attack, seed).key
            base = shared_columns(chain, attack, seed, key, defense=defense)
            available, seen = data_use(chain, defense, attack, seed)
            rows.append(metric_row(base, "images_available", available))
            rows.append(metric_row(base, "images_seen", seen))
    return rows


def data_use(chain: Chain, defense: str, attack: str, seed: int) -> tuple[int, int]:
    """Clean images a defense may use (held-out ones aside), and how many it saw, each as often as
    it was shown, over all rates tried; a second view of an image is not counted again.
    """
    if defense == "invertune":
        settings, passes = chain.settings, invertune_passes(chain.settings)
        tried = {row["lr"] for row in steps.tuned(chain, attack, seed).metrics["log"]}
        passes["tuning"] = len(tried) * settings.tuning.steps * settings.tuning.batch
        return settings.data.inversion_images, sum(passes.values())
    seen = defenses.baseline(chain, defense, attack, seed).metrics["images_seen"]
    return chain.settings.baselines.pairs, seen


def rebound_rows(chain: Chain) -> Rows:
    """CA and ASR after benign fine-tuning of every defended model, and of the undefended one."""
    rows: Rows = []
    for attack, seed in suspects(chain.settings, among=chain.settings.rebound.attacks):
        suspect = steps.poisoned(chain, attack, seed)
        for defense in ("none", *defenses_compared(chain)):
            model = defenses.rebound_model(chain, defense, attack, seed)
            done = evaluated(chain, model, model.trigger, suspect.key, seed)
            base = shared_columns(chain, attack, seed, done.key, defense=defense)
            for task, k in TASK_KS:
                for metric in ("ca", "asr"):
                    rate = rates(done)[f"{task}.{metric}.{k}"]
                    rows.append(metric_row(base, f"rebound_{metric}", rate, task=task, k=k))
    return rows


def table1(chain: Chain, results: pd.DataFrame) -> pd.DataFrame:
    """Table 1: CA and ASR of both tasks, a line per defense (means over seeds, lowest and highest).

    A star marks an attack that missed its gate in a seed.
    """
    rows = own_rows(chain, results)
    names = starred(chain, rows)
    rows = tables.select(rows, paper_item="table1", metric=["ca", "asr"])
    table = tables.wide(rows, *tables.LAYOUT["table1"], spread=True)
    if rows.seed.nunique() > 1:
        table.insert(3, "seeds", rows.seed.nunique())
    return table.rename(columns=names)


def starred(chain: Chain, rows: pd.DataFrame) -> dict[str, str]:
    """The labels of the attacks that missed their gate in a seed, each with a star."""
    missed = tables.gate_missed(rows, chain.settings.attacks)
    return {name: f"{name}*" for name in (tables.label("attack", attack) for attack in missed)}


def summary_table(chain: Chain, results: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """Per defense: mean ASR and CA loss over the attacks, the paper's mean over them, the costs."""
    lines, results = [], own_rows(chain, results)
    paper = paper[paper.attack.isin(chain.settings.attacks.names)]
    for defense in defenses_compared(chain):
        line: dict[str, Any] = {"defense": tables.label("defense", defense)}
        for task, k in TASK_KS:
            where = {"defense": defense, "task": task, "k": k, "variant": ""}
            title = tables.label("task", task)
            line[f"{title} ASR"] = mean(results, metric="asr", paper_item="table1", **where)
            line[f"{title} ASR (paper)"] = mean(paper, metric="asr", paper_item="table1", **where)
            line[f"{title} CA loss"] = mean(results, metric="ca_loss", **where)
        for metric in ("images_available", "images_seen"):
            line[metric.replace("_", " ")] = round(mean(results, metric=metric, defense=defense))
        lines.append(line | costs(chain, defense))
    return pd.DataFrame(lines)


def costs(chain: Chain, defense: str) -> dict[str, float]:
    """Mean seconds a model, over attacks and seeds, and the highest peak memory in MB."""
    spent = [_artifacts(chain, defense, attack, seed) for attack, seed in suspects(chain.settings)]
    seconds = np.mean([sum(a.meta["seconds"] for a in made) for made in spent])
    peak = max(a.meta["peak_mb"] for made in spent for a in made)
    return {"seconds": float(seconds), "peak MB": float(peak)}


def _artifacts(chain: Chain, defense: str, attack: str, seed: int) -> Sequence[Artifact]:
    if defense != "invertune":
        return [defenses.baseline(chain, defense, attack, seed)]
    made = (steps.identified, steps.inverted, steps.tuned)
    return [step(chain, attack, seed) for step in made]


def learning_rate_table(chain: Chain) -> pd.DataFrame:
    """How each baseline's learning rate was chosen: held-out CA at every rate that was run."""
    lines = []
    for attack, seed in suspects(chain.settings):
        for defense in chain.settings.baselines.names:
            found = defenses.baseline(chain, defense, attack, seed).metrics
            lines.append(
                {
                    "attack": tables.label("attack", attack),
                    "seed": seed,
                    "defense": tables.label("defense", defense),
                    "held-out CA before": found["suspected_accuracy"],
                    "chosen": f"{found['lr']:g}",
                    "within the allowance": "yes" if found["qualified"] else "NO",
                    **{f"held-out CA at {lr:g}": accuracy for lr, accuracy in found["tried"]},
                }
            )
    return pd.DataFrame(lines)


def rebound_table(chain: Chain, results: pd.DataFrame) -> pd.DataFrame:
    """CA and ASR of both tasks before and after benign fine-tuning, a line per task and defense."""
    own, among = own_rows(chain, results), chain.settings.rebound.attacks
    before = tables.select(own, paper_item="table1", metric=["ca", "asr"], variant="")
    after = tables.select(own, metric=["rebound_ca", "rebound_asr"])
    rows = pd.concat([before[before.attack.isin(among)], after])
    return tables.wide(rows, ["task", "defense"], ["attack", "metric"])


@mpl.rc_context(STYLE)
def table1_figure(chain: Chain, results: pd.DataFrame) -> Figure:
    """Table 1 as two heatmaps a task: ASR (%) and CA loss (points), defenses by attacks.

    A cell is the mean over seeds, with the lowest and the highest below if they are several.
    """
    looks = (
        ("asr", "ASR (%), light 0 to dark 100", 100),
        ("ca_loss", "CA loss (points), light 0 to dark 12 or more", 12),
    )
    rows, names = own_rows(chain, results), defenses_compared(chain)
    attacks = {name: tables.label("attack", name) for name in chain.settings.attacks.names}
    stars = starred(chain, rows)
    figure, axes = canvas(4, 1, COLUMN_IN, 1.3 + 0.96 * len(names), sharex=True)
    for line, (task, k) in zip(axes[:, 0].reshape(2, 2), TASK_KS, strict=True):
        for chart, (metric, title, top) in zip(line, looks, strict=True):
            where = {"task": task, "k": k, "variant": "", "metric": metric}
            found = {d: tables.by_seed(rows, "attack", defense=d, **where) for d in names}
            cells = pd.DataFrame(found).T.reindex(columns=list(attacks))
            cells.index = pd.Index([tables.label("defense", name) for name in names])
            cells = cells.rename(columns=attacks).rename(columns=stars)
            sns.heatmap(
                cells.map(np.mean).astype(float),
                ax=chart,
                vmin=0,
                vmax=top,
                annot=cells.map(_cell),
                fmt="",
                annot_kws={"size": 5.5, "linespacing": 1.1},
                cmap="rocket_r" if metric == "asr" else "mako_r",
                cbar=False,  # every cell has its number
            )
            for text, color in zip(chart.texts, chart.collections[0].get_facecolors(), strict=True):
                text.set_color("0.15" if relative_luminance(color) > 0.18 else "white")
            chart.set(xlabel="", ylabel="", title=f"{tables.label('task', task)}: {title}")
            chart.tick_params(length=0)
            chart.tick_params("x", rotation=20)
            chart.tick_params("y", rotation=0)
    notes = ["below a mean: lowest to highest seed"] if rows.seed.nunique() > 1 else []
    notes += ["*: missed the attack's gate in a seed"] if stars else []
    figure.supxlabel("\n".join(notes), fontsize=STYLE["axes.labelsize"])
    return figure


def _cell(values: Sequence[float]) -> str:
    """The mean, and below it the lowest and the highest of several."""
    mean, low, high = (rate_text(float(f(values))) for f in (np.mean, np.min, np.max))
    return f"{mean}\n{low}-{high}" if np.size(values) > 1 else mean


@mpl.rc_context(STYLE)
def rebound_figure(chain: Chain, results: pd.DataFrame) -> Figure:
    """Zero-shot ASR of each defended model, and of the undefended one, before and after benign
    fine-tuning.
    """
    looks = {
        "before fine-tuning": {"metric": "asr", "paper_item": "table1"},
        "after fine-tuning": {"metric": "rebound_asr"},
    }
    names = [a for a in chain.settings.attacks.names if a in chain.settings.rebound.attacks]
    results, count = own_rows(chain, results), max(1, len(names))
    figure, axes = canvas(count, 1, COLUMN_IN, 0.5 + 1.3 * count, sharex=True)
    for chart, attack in zip(axes[:, 0], names, strict=False):  # none: an empty chart
        shared = {"attack": attack, "task": "zeroshot", "k": "1", "variant": ""}
        groups = {t: tables.by_seed(results, "defense", **shared, **w) for t, w in looks.items()}
        bars(chart, ("none", *defenses_compared(chain)), groups, column="defense")
        percent_axis(chart, "Zero-shot ASR (%)")
        chart.set_title(tables.label("attack", attack))
        chart.label_outer()
    if names:
        legend_above(figure, axes[0, 0])
    return figure
