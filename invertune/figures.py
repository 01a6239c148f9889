"""The charts of the paper and of this artifact: data in, a matplotlib Figure out.

One look: sizes fit the paper's columns, colors are safe for color-blind readers, and an attack or a
defense has the same color and place everywhere. ``Values`` map an attack (or another name) to one
number per seed. Rates are in percent.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from invertune.files import write_atomic
from invertune.results import natural_order
from invertune.tables import label

COLUMN_IN, PAGE_IN = 3.3, 6.9  # widths of one and of two columns of the paper, in inches
DPI = 400

# Attacks: seaborn's "colorblind" palette without its pairs of blues and of oranges, filled up with
# red and black; defenses: Paul Tol's "muted". A color means an attack or a defense (gray: none).
ATTACK_COLORS = {
    "none": "#BBBBBB",
    "clean_finetuned": "#CA9161",
    "badnet": "#0173B2",
    "blended": "#DE8F05",
    "sig": "#029E73",
    "wanet": "#CC78BC",
    "badencoder": "#A61C00",
    "badclip": "#000000",
}
ATTACK_MARKERS = dict(zip(ATTACK_COLORS, "|_osD^vX", strict=True))
DEFENSE_COLORS = {
    "none": "#BBBBBB",
    "ft": "#88CCEE",
    "cleanclip": "#117733",
    "cleanerclip": "#999933",
    "par": "#CC6677",
    "invertune": "#332288",
}
MARKED, PLAIN, BEFORE, AFTER = "#D55E00", "#949494", "#BBBBBB", "#332288"
WHISKERS = "min to max over seeds"
OWN = "this profile's value"

STYLE: Any = {
    **sns.axes_style("ticks"),
    **sns.plotting_context("paper"),
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same text on every machine
    "figure.dpi": 150,  # as notebooks show them
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.0,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,
}

Values = Mapping[str, Sequence[float]]


def save(figure: Figure, folder: Path, name: str) -> Figure:
    """Writes NAME.png (400 dpi) and NAME.pdf, and returns the figure.

    The same figure gives the same bytes, so no dates.
    """
    undated: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    for suffix, metadata in undated.items():
        content = io.BytesIO()
        with mpl.rc_context(STYLE):
            figure.savefig(content, format=suffix, dpi=DPI, metadata=metadata)
        write_atomic(folder / f"{name}.{suffix}", content.getvalue())
    return figure


def canvas(
    rows: int, columns: int, width_in: float, height_in: float, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes [rows, columns]. It is closed: a notebook shows it once, when told."""
    figure, axes = plt.subplots(
        rows, columns, figsize=(width_in, height_in), squeeze=False, layout="constrained", **options
    )
    plt.close(figure)
    return figure, axes


def panels(
    count: int, height_in: float, line_in: float, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A column's width of ``count`` charts, two a line; a place that is left over stays empty.

    ``height_in`` and ``line_in`` for every line make up the height.
    """
    lines, columns = max(1, -(-count // 2)), max(1, min(2, count))
    figure, axes = canvas(lines, columns, COLUMN_IN, height_in + line_in * lines, **options)
    for chart in axes.flat[count:]:
        chart.set_axis_off()
    for chart in axes.flat[max(0, count - 2) : count]:
        chart.tick_params(labelbottom=True)  # shared, but nothing is below
    return figure, axes


def in_order(*groups: Mapping[str, Any]) -> list[str]:
    """The attacks named in any of ``groups``, in the one order of this artifact."""
    return sorted({n for group in groups for n in group}, key=partial(natural_order, "attack"))


def attack_look(name: str) -> dict[str, Any]:
    """Color, marker and label of an attack's line."""
    color, marker = ATTACK_COLORS[name], ATTACK_MARKERS[name]
    return {"color": color, "marker": marker, "markersize": 3, "label": label("attack", name)}


def rate_text(value: float) -> str:
    """One decimal, in four characters at most; only zero is shown as zero."""
    if abs(value) < 0.05:
        return "<0.1" if value else "0"
    return f"{value:.1f}".replace("100.0", "100")


@mpl.rc_context(STYLE)
def figure5a(
    increases: Mapping[str, float], target: str = "", top: int = 20, title: str = ""
) -> Figure:
    """Figure 5(a): the ``top`` classes by rise of their share of the predictions, in points.

    ``target`` colors one class; the method does not know it, only the caller may.
    """
    figure, axes = canvas(1, 1, COLUMN_IN, 0.9 + 0.125 * min(top, len(increases)))
    increase_bars(axes[0, 0], increases, target, top)
    axes[0, 0].set(xlabel="Increase of predicted share (percentage points)", title=title)
    return figure


def increase_bars(axes: Axes, increases: Mapping[str, float], target: str, top: int) -> None:
    """Draws horizontal bars, the largest on top; equal increases in alphabetical order."""
    names = sorted(increases, key=lambda name: (-increases[name], name))[:top]
    values = [increases[name] for name in names]
    colors = [MARKED if name == target else PLAIN for name in names]
    bars = axes.barh(range(len(names)), values, color=colors, height=0.75)
    axes.bar_label(bars, [rate_text(value) for value in values], padding=2, fontsize=5.5)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(min(0.0, 1.15 * min(values)), 118)  # beside a clean model's, equal lengths


def bars(
    axes: Axes,
    names: Sequence[str],
    groups: Mapping[str, Values],
    colors: Sequence[str] = (BEFORE, AFTER),
    column: str = "attack",
) -> None:
    """Draws horizontal bars: for each of ``names``, of a ``column`` of the results, one per group.

    A bar is the mean over seeds, which is written beside the chart; whiskers go from min to max if
    seeds are several. A group need not have every name.
    """
    several = any(len(v) > 1 for values in groups.values() for v in values.values())
    height = 0.8 / len(groups)
    for i, (title, values) in enumerate(groups.items()):
        known = [place for place, name in enumerate(names) if name in values]
        found = [values[names[place]] for place in known]
        means = [float(np.mean(v)) for v in found]
        ends = [[np.mean(v) - min(v) for v in found], [max(v) - np.mean(v) for v in found]]
        drawn = axes.barh(
            [place + (i - (len(groups) - 1) / 2) * height for place in known],
            means,
            0.9 * height,
            color=colors[i],
            edgecolor=colors[i],  # a bar of length zero is a line
            linewidth=0.8,
            label=title,
            xerr=np.abs(ends) if several else None,
            ecolor="black",
            error_kw={"elinewidth": 0.8, "label": WHISKERS if i == 0 else "_nolegend_"},
        )
        if drawn.errorbar is not None:  # a white edge: seen on light and on dark bars
            drawn.errorbar[2][0].set_path_effects([withStroke(linewidth=1.4, foreground="white")])
        beside = axes.get_yaxis_transform()
        for bar, mean in zip(drawn, means, strict=True):
            middle = bar.get_y() + bar.get_height() / 2
            axes.text(1.02, middle, rate_text(mean), transform=beside, va="center", fontsize=5)
    axes.set_yticks(range(len(names)), [label(column, name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)


def bar_panels(names: int, groups: int, lines: int = 1) -> tuple[Figure, np.ndarray]:
    """Two charts a line that share the names of their ``bars``."""
    height = 0.4 + lines * (0.4 + 0.085 * names * (groups + 1))
    return canvas(lines, 2, COLUMN_IN, height, sharey=True)


def percent_axis(axes: Axes, title: str) -> None:
    """A horizontal axis for 0 to 100 percent, with room to see a bar of 0."""
    axes.set(xlabel=title, xlim=(-2, 102), xticks=range(0, 101, 25))


def legend_above(figure: Figure, axes: Axes) -> None:
    """One legend over the whole figure, so that it never covers a bar."""
    figure.legend(**legend(axes), loc="outside upper center", ncols=2)


def legend(axes: Axes) -> dict[str, list[Any]]:
    """Handles and labels of a chart's legend; bars come first."""
    pairs = list(zip(*axes.get_legend_handles_labels(), strict=True))
    pairs.sort(key=lambda pair: not isinstance(pair[0], BarContainer))
    return {"handles": [pair[0] for pair in pairs], "labels": [pair[1] for pair in pairs]}


def zoom(axes: Axes) -> None:
    """A vertical axis of percent: from 0, or from 90 where nothing is lower, which the title says.

    Charts beside each other have one of two scales then, and an image or two make no jump.
    """
    low = 90 if 90 <= axes.dataLim.y0 <= 100 else 0
    margin = (100 - low) / 20
    axes.set(ylim=(low - margin, 100 + margin), yticks=(low, (low + 100) // 2, 100))
    axes.set_title("zoomed: 90 to 100 %" if low else "")


def mark_own(axes: Axes, place: float) -> None:
    """A dotted vertical line at the profile's own value, on a line chart."""
    axes.axvline(place, color="black", linestyle=":", linewidth=0.8, zorder=0, label=OWN)


@mpl.rc_context(STYLE)
def figure5b(original: Values, inverted: Values) -> Figure:
    """Figure 5(b): ASR of the original and the inverted triggers, in percent.

    Models without a backdoor have inverted triggers only: the level to tell the others from.
    """
    names = in_order(original, inverted)
    figure, axes = canvas(1, 1, COLUMN_IN, 0.8 + 0.26 * len(names))
    bars(axes[0, 0], names, {"original trigger": original, "inverted trigger": inverted})
    percent_axis(axes[0, 0], "Zero-shot ASR (%)")
    legend_above(figure, axes[0, 0])
    return figure


@mpl.rc_context(STYLE)
def attack_gate(
    asr: Values,
    ca_loss: Values,
    asr_gate: float,
    ca_gate: float,
    failed: Mapping[str, str] | None = None,
) -> Figure:
    """ASR and CA loss of the undefended models with the gate: at least, and at most.

    ``failed`` says of an attack in which seeds it missed the gate, and by what.
    """
    names = in_order(asr, ca_loss)
    figure, axes = bar_panels(len(names), 1)
    for chart, values, gate in zip(axes[0], (asr, ca_loss), (asr_gate, ca_gate), strict=True):
        bars(chart, names, {"mean (the number)": values})
        chart.axvline(gate, color="black", linestyle="--", linewidth=0.8, label="gate")
    axes[0, 0].set(xlabel=f"ASR (%), at least {asr_gate:g}", xticks=range(0, 101, 25))
    axes[0, 1].set_xlabel(f"CA loss (points), at most {ca_gate:g}")
    notes = [f"{label('attack', name)} {text}" for name, text in (failed or {}).items()]
    figure.supxlabel("\n".join(notes), fontsize=STYLE["axes.labelsize"])
    legend_above(figure, axes[0, 0])
    return figure


@mpl.rc_context(STYLE)
def before_after(found: Mapping[str, tuple[Values, Values]]) -> Figure:
    """Rates per attack before and after tuning, four charts: (before, after) by a chart's title."""
    names = in_order(*(values for pair in found.values() for values in pair))
    figure, axes = bar_panels(len(names), 2, lines=2)
    for chart, (title, (before, after)) in zip(axes.flat, found.items(), strict=True):
        bars(chart, names, {"before tuning": before, "after tuning": after})
        percent_axis(chart, title)
    legend_above(figure, axes[0, 0])
    return figure


@mpl.rc_context(STYLE)
def layer_impact(
    impact: Mapping[str, float], threshold: float, critical: Collection[str], title: str = ""
) -> Figure:
    """Layer impacts (eq. 8, a ratio) in the given order; the critical layers are colored."""
    figure, axes = canvas(1, 1, COLUMN_IN, 0.9 + 0.16 * len(impact))
    chart, names = axes[0, 0], list(impact)
    for color, text in ((PLAIN, "other layer"), (MARKED, "critical layer")):
        places = [i for i, name in enumerate(names) if (name in critical) == (color == MARKED)]
        chart.barh(places, [impact[names[i]] for i in places], 0.7, color=color, label=text)
    line = {"color": "black", "linestyle": "--", "linewidth": 0.8}
    chart.axvline(threshold, label=f"mean + std = {threshold:.4f}", **line)
    chart.set_yticks(range(len(names)), [label("layer", name) for name in names])
    chart.invert_yaxis()
    chart.set(xlabel="Layer impact (ratio, eq. 8)", title=title)
    legend_above(figure, chart)
    return figure
