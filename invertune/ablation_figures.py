"""The charts of notebook 07: Tables 2 and 3 as curves and bars, Figure 6, and inversion length.

Bands and whiskers go from min to max over seeds. Rates are in percent.
"""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from invertune import figures, tables
from invertune.ablations import ours, variant
from invertune.chain import Chain
from invertune.figures import AFTER, BEFORE, COLUMN_IN, MARKED, STYLE, attack_look, canvas, panels
from invertune.results import read_paper
from invertune.sections import WEIGHTS
from invertune.settings import compared, suspects, sweep_values

HELD_OUT_ASR = "Inverted ASR,\nheld-out (%)"
PAPERS = "#88CCEE"  # the color of what is tuned in the paper's form


@mpl.rc_context(STYLE)
def table2_figure(
    chain: Chain, results: pd.DataFrame, metric: str = "inverted_asr", state: str = ""
) -> Figure:
    """Table 2 as curves, a panel per compared weight, a line per attack (bands: over seeds).

    ``state`` "last": the last state of each inversion instead of the chosen one.
    """
    several = compared(chain.settings, "inversion", WEIGHTS)
    masks = metric == "mask_l1"
    figure, axes = panels(len(several), 0.7, 1.3, sharey=masks)
    asr = HELD_OUT_ASR if state else "Inverted ASR (%)"
    titles = {"inverted_asr": asr, "mask_l1": "Mask size (L1)"}
    for chart, weight in zip(axes.flat, several, strict=False):
        values = sorted(sweep_values(chain.settings, "inversion", weight))
        suffix = f";state={state}" if state else ""
        places = {variant(weight, v) + suffix: i for i, v in enumerate(values)}
        for attack in chain.settings.ablations.weight_attacks:
            rows = ours(chain, results, list(places), attack=attack, metric=metric)
            _curve(chart, rows, places, attack)
        chart.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        chart.set_xlabel(rf"$\lambda_{weight[-1]}$")
        figures.mark_own(chart, values.index(getattr(chain.settings.inversion, weight)))
        if metric == "inverted_asr":
            figures.zoom(chart)
    for chart in axes[:, 0]:
        chart.set_ylabel(titles[metric])
    if masks:
        if any(np.isfinite(chart.dataLim.y1) for chart in axes.flat):  # else no mask is there
            axes[0, 0].set_yscale("log", subs=[])  # ticks at powers only, none among open markers
            axes[0, 0].margins(y=0.2)  # room for these
        line = {"color": "0.6", "linewidth": 0.6, "label": "above it: ASR floor not reached"}
        for chart in axes.flat[: len(several)]:
            chart.plot([0, 1], [0.9, 0.9], transform=chart.transAxes, **line)
    _explain_bands(axes[0, 0])
    figures.legend_above(figure, axes[0, 0])
    return figure


def _curve(axes: Axes, rows: pd.DataFrame, places: Mapping[str, float], attack: str) -> None:
    """Means over seeds at the places of their variants; a band from min to max over seeds.

    An infinite one, a mask that never reached the ASR floor, is an open marker in a band on top.
    """
    found = {places[text]: v for text, v in tables.by_seed(rows, "variant").items()}
    if not found:
        return
    look = attack_look(attack)
    finite = {place: found[place] for place in sorted(found) if np.isfinite(found[place]).all()}
    axes.plot(list(finite), [np.mean(v) for v in finite.values()], **look)
    never = [place for place in found if place not in finite]
    top = {"transform": axes.get_xaxis_transform(), "fillstyle": "none", "linestyle": ""}
    axes.plot(never, [0.95] * len(never), **{**look, **top, "label": None})
    if any(len(v) > 1 for v in finite.values()):
        ends = [min(v) for v in finite.values()], [max(v) for v in finite.values()]
        axes.fill_between(list(finite), *ends, color=look["color"], alpha=0.2, linewidth=0)


def _explain_bands(axes: Axes) -> None:
    """Names the bands of ``_curve``, if there are any, in the legend."""
    if axes.collections:
        axes.fill_between([], [], color="0.5", alpha=0.4, label=figures.WHISKERS)


@mpl.rc_context(STYLE)
def table3_figure(chain: Chain, results: pd.DataFrame) -> Figure:
    """Table 3's ASR at top 1 and top 10, by the trigger that the model was tuned with."""
    names = list(
        dict(suspects(chain.settings, among=chain.settings.ablations.perturbation_attacks))
    )
    figure, axes = figures.bar_panels(len(names), 4)
    titles = {
        "trigger=inverted": "tuned with inverted trigger",
        "form=paper;trigger=inverted": "the same, in the paper's form",
        "trigger=uap": "with universal perturbation",
        "trigger=both": "with both",
    }
    for chart, k in zip(axes[0], ("1", "10"), strict=True):
        about, groups = {"paper_item": "table3", "metric": "asr", "k": k}, {}
        for source, title in titles.items():
            rows = ours(chain, results, [source], **about)
            groups[title] = tables.by_seed(rows, "attack")
        figures.bars(chart, names, groups, (AFTER, PAPERS, BEFORE, MARKED))
        figures.percent_axis(chart, f"Zero-shot ASR, top {k} (%)")
    figures.legend_above(figure, axes[0, 0])
    return figure


@mpl.rc_context(STYLE)
def rounds_figure(chain: Chain, results: pd.DataFrame) -> Figure:
    """ASR and CA after one and after two rounds of steps 2 and 3, per attack."""
    names = list(dict(suspects(chain.settings, among=chain.settings.ablations.round_attacks)))
    figure, axes = figures.bar_panels(len(names), 2)
    for chart, metric in zip(axes[0], ("asr", "ca"), strict=True):
        groups = {}
        for number, title in ((1, "one round"), (2, "two rounds")):
            rows = ours(chain, results, [variant("rounds", number)], metric=metric)
            groups[title] = tables.by_seed(rows, "attack")
        figures.bars(chart, names, groups)
        figures.percent_axis(chart, f"Zero-shot {metric.upper()} (%)")
    figures.legend_above(figure, axes[0, 0])
    return figure


@mpl.rc_context(STYLE)
def figure6(chain: Chain, results: pd.DataFrame) -> Figure:
    """Figure 6: CA and ASR over beta, a line per attack.

    CA is that of the chosen state on evaluation images, and that of the last step on held-out
    images, which show drawings that the model was trained on. The paper's stand beside ours.
    """
    values = sorted(sweep_values(chain.settings, "tuning", "beta"))
    own = chain.settings.tuning.beta
    figure, axes = canvas(1, 3, COLUMN_IN, 1.9)
    shown = (
        ("CA,\nevaluation (%)", "ca", ""),
        ("held-out CA,\nlast step (%)", "ca", ";state=last"),
        ("ASR,\nevaluation (%)", "asr", ""),
    )
    for chart, (title, metric, state) in zip(axes[0], shown, strict=True):
        places = {variant("beta", value) + state: value for value in values}
        for attack in dict(suspects(chain.settings, among=chain.settings.ablations.beta_attacks)):
            where = {"attack": attack, "metric": metric, "defense": "invertune"}
            _curve(chart, ours(chain, results, list(places), **where), places, attack)
        figures.mark_own(chart, own)
        if metric == "ca":
            chart.set_ylim(0, 100)
        chart.set(title=title, xlabel=r"$\beta$", xticks=sorted({values[0], own, values[-1]}))
    look = {"marker": "o", "markersize": 3, "fillstyle": "none", "linestyle": "--"}
    for chart, metric in ((axes[0, 0], "ca"), (axes[0, 2], "asr")):
        printed = tables.select(read_paper(), paper_item="figure6", metric=metric)
        betas = printed.variant.str.removeprefix("beta=").astype(float)
        chart.plot(betas, printed.value, color=MARKED, label="the paper's", **look)
    _explain_bands(axes[0, 0])
    figures.legend_above(figure, axes[0, 0])
    return figure


@mpl.rc_context(STYLE)
def updates_figure(chain: Chain, results: pd.DataFrame) -> Figure:
    """Held-out inverted ASR and mask size over the updates of the longest inversion."""
    figure, axes = canvas(1, 2, COLUMN_IN, 1.9)
    titles = {"inverted_asr": HELD_OUT_ASR, "mask_l1": "Mask size (L1)"}
    rows = results[results.variant.str.startswith("updates=")]
    for chart, (metric, title) in zip(axes[0], titles.items(), strict=True):
        for attack in dict(suspects(chain.settings, among=chain.settings.ablations.switch_attacks)):
            points = ours(chain, rows, rows.variant.unique(), attack=attack, metric=metric)
            means = points.groupby(
                points.variant.str.removeprefix("updates=").astype(int)
            ).value.mean()
            chart.plot(means, **attack_look(attack))
        figures.mark_own(chart, chain.settings.inversion.steps)
        chart.set(xlabel="Updates", ylabel=title)
    figures.zoom(axes[0, 0])
    axes[0, 1].set_yscale("log", subs=[])
    axes[0, 1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0, 1].yaxis.set_major_formatter("{x:g}")
    figures.legend_above(figure, axes[0, 0])
    return figure
