"""The charts of notebook 07: Tables 2 and 3 as curves and bars, Figure 6, and inversion length.

Bands and whiskers go from min to max over seeds. Rates are in percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from invertune import figures, tables
from invertune.ablations import ours, variant
from invertune.chain import Chain
from invertune.figures import AFTER, ATTACK_COLORS, BEFORE, COLUMN_IN, MARKED, STYLE, canvas, panels
from invertune.reports import grid
from invertune.sections import WEIGHTS
from invertune.settings import compared


@mpl.rc_context(STYLE)
def table2_figure(
    chain: Chain, results: pd.DataFrame, metric: str = "inverted_asr", state: str = ""
) -> Figure:
    """Table 2 as curves, a panel per compared weight, a line per attack (bands: over seeds).

    ``state`` "last": the last state of each inversion instead of the chosen one.
    """
    several = [w for w in WEIGHTS if len(compared(chain.settings, "inversion", w)) > 1]
    figure, axes = panels(len(several), 0.4, 1.4, sharey=True)
    titles = {"inverted_asr": "Inverted ASR (%)", "mask_l1": "Mask size (L1)", "ssim": "SSIM"}
    for chart, weight in zip(axes.flat, several, strict=False):
        values = sorted(compared(chain.settings, "inversion", weight))
        for attack in chain.settings.ablations.weight_attacks:
            texts = [variant(weight, v) + (f";state={state}" if state else "") for v in values]
            rows = ours(chain, results, texts, attack=attack, metric=metric)
            look = {"color": ATTACK_COLORS[attack], "marker": "o", "markersize": 2}
            _curve(chart, rows, texts, label=tables.label("attack", attack), **look)
        chart.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        chart.set_xlabel(rf"$\lambda_{weight[-1]}$ (no unit)")
    for chart in axes[:, 0]:
        chart.set_ylabel(titles[metric])
    if metric == "mask_l1":
        axes[0, 0].set_yscale("log")  # a whole mask stands for an ASR never reached
    if metric == "inverted_asr":
        axes[0, 0].set_ylim(-3, 105)  # a line at 0 is seen
    figures.legend_above(figure, axes[0, 0])
    return figure


def _curve(axes: Axes, rows: pd.DataFrame, texts: Sequence[str], **look: Any) -> None:
    """Means of the variants ``texts`` at 0, 1, ...; a band from min to max over seeds."""
    found = tables.by_seed(rows, "variant")
    known = [(place, found[text]) for place, text in enumerate(texts) if text in found]
    if not known:
        return
    places = [place for place, _ in known]
    axes.plot(places, [float(np.mean(v)) for _, v in known], **look)
    if any(len(v) > 1 for _, v in known):
        ends = [min(v) for _, v in known], [max(v) for _, v in known]
        axes.fill_between(places, *ends, color=look["color"], alpha=0.2, linewidth=0)


@mpl.rc_context(STYLE)
def table3_figure(chain: Chain, results: pd.DataFrame) -> Figure:
    """Table 3's ASR at top 1 and top 10, by the trigger that the model was tuned with."""
    wanted = chain.settings.ablations.perturbation_attacks
    names = list(dict(grid(chain, among=wanted)))
    figure, axes = canvas(2, 1, COLUMN_IN, 3.2, sharex=True)
    looks = (("uap", -0.2, BEFORE, "universal perturbation"), ("inverted", 0.2, AFTER, "inverted"))
    for chart, k in zip(axes[:, 0], ("1", "10"), strict=True):
        for source, shift, color, title in looks:
            about = {"paper_item": "table3", "metric": "asr", "k": k}
            rows = ours(chain, results, [f"trigger={source}"], **about)
            values = tables.by_seed(rows, "attack")
            figures.bars(chart, names, values, shift, color, title)
        rows = ours(chain, results, ["trigger=both"], paper_item="table3", metric="asr", k=k)
        both = {a: np.mean(v) for a, v in tables.by_seed(rows, "attack").items()}
        places = [names.index(attack) for attack in both]
        if both:
            chart.plot(places, list(both.values()), "D", color=MARKED, markersize=3, label="both")
        figures.percent_axis(chart, f"ASR, top {k} (%)")
    figures.legend_above(figure, axes[0, 0])
    return figure


@mpl.rc_context(STYLE)
def rounds_figure(chain: Chain, results: pd.DataFrame) -> Figure:
    """ASR and CA after one and after two rounds of steps 2 and 3, per attack."""
    names = list(dict(grid(chain, among=chain.settings.ablations.round_attacks)))
    figure, axes = canvas(2, 1, COLUMN_IN, 3.2, sharex=True)
    for chart, metric in zip(axes[:, 0], ("asr", "ca"), strict=True):
        looks = ((1, -0.2, BEFORE, "one round"), (2, 0.2, AFTER, "two rounds"))
        for number, shift, color, title in looks:
            rows = ours(chain, results, [variant("rounds", number)], metric=metric)
            values = tables.by_seed(rows, "attack")
            figures.bars(chart, names, values, shift, color, title)
        figures.percent_axis(chart, f"{metric.upper()} (%)")
    figures.legend_above(figure, axes[0, 0])
    return figure


@mpl.rc_context(STYLE)
def figure6(chain: Chain, results: pd.DataFrame) -> Figure:
    """Figure 6: CA (left axis) and ASR (right axis) over beta, a panel per attack."""
    names = list(dict(grid(chain, among=chain.settings.ablations.beta_attacks)))
    values = sorted(compared(chain.settings, "tuning", "beta"))
    texts = [variant("beta", value) for value in values]
    figure, axes = canvas(max(1, len(names)), 1, COLUMN_IN, 0.4 + 1.8 * max(1, len(names)))
    for chart, attack in zip(axes[:, 0], names, strict=False):  # none: an empty chart
        right = chart.twinx()
        right.spines["right"].set_visible(True)
        last = [f"{text};state=last" for text in texts]
        looks = (
            (chart, "ca", texts, AFTER, "o", "-", "CA"),
            (chart, "ca", last, AFTER, "", ":", "CA, last step (held-out)"),
            (right, "asr", texts, MARKED, "s", "--", "ASR"),
        )
        for place, metric, wanted, color, marker, line, title in looks:
            rows = ours(chain, results, wanted, attack=attack, metric=metric, defense="invertune")
            look = {"color": color, "marker": marker, "markersize": 3, "linestyle": line}
            _curve(place, rows, wanted, label=title, **look)
            chart.plot([], [], label=title, **look) if place is right else None
        chart.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        chart.set(xlabel=r"$\beta$ (no unit)", title=tables.label("attack", attack), ylim=(0, 100))
        chart.set_ylabel("CA (%)", color=AFTER)
        right.set_ylabel("ASR (%)", color=MARKED)
        right.set_ylim(0, max(10, right.get_ylim()[1]))  # tenths of a percent look small
    figures.legend_above(figure, axes[0, 0])
    return figure


@mpl.rc_context(STYLE)
def updates_figure(chain: Chain, results: pd.DataFrame) -> Figure:
    """Held-out inverted ASR and mask size over the updates of the longest inversion."""
    figure, axes = canvas(1, 2, COLUMN_IN, 1.9)
    titles = {"inverted_asr": "Inverted ASR (%)", "mask_l1": "Mask size (L1)"}
    rows = results[results.variant.str.startswith("updates=")]
    for chart, (metric, title) in zip(axes[0], titles.items(), strict=True):
        for attack in dict(grid(chain, among=chain.settings.ablations.switch_attacks)):
            own = ours(chain, rows, rows.variant.unique(), attack=attack, metric=metric)
            means = own.groupby(own.variant.str.removeprefix("updates=").astype(int)).value.mean()
            chart.plot(means, color=ATTACK_COLORS[attack], label=tables.label("attack", attack))
        chart.axvline(
            chain.settings.inversion.steps, color="black", linestyle=":", label="own length"
        )
        chart.set(xlabel="Updates", ylabel=title, ylim=(0, None))
    figures.legend_above(figure, axes[0, 0])
    return figure
