"""The charts of the paper and of this artifact: data in, a matplotlib Figure out.

One look: sizes fit the paper's columns, colors are safe for color-blind readers, and an attack or a
defense has the same color and place everywhere. ``Values`` map an attack to one number per seed;
bars show the mean and whiskers min and max over seeds. Rates are in percent.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from invertune.files import write_atomic
from invertune.results import ATTACKS
from invertune.tables import label

COLUMN_IN, PAGE_IN = 3.3, 6.9  # widths of one and of two columns of the paper, in inches
DPI = 200

# seaborn's "colorblind" palette for attacks, Paul Tol's "muted" for defenses: two families, so that
# a color never means an attack in one chart and a defense in the next.
ATTACK_COLORS = {
    "none": "#949494",
    "clean_finetuned": "#CA9161",
    "badnet": "#0173B2",
    "blended": "#DE8F05",
    "sig": "#029E73",
    "wanet": "#D55E00",
    "badencoder": "#CC78BC",
    "badclip": "#56B4E9",
}
DEFENSE_COLORS = {
    "none": "#BBBBBB",
    "ft": "#88CCEE",
    "cleanclip": "#117733",
    "cleanerclip": "#999933",
    "par": "#CC6677",
    "invertune": "#332288",
}
OTHER_COLOR = "#ECE133"  # an attack or defense added later
MARKED, PLAIN, BEFORE, AFTER = "#D55E00", "#949494", "#BBBBBB", "#332288"

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


def save(figure: Figure, folder: Path, name: str) -> None:
    """Writes NAME.png (200 dpi) and NAME.pdf; the same figure gives the same bytes, so no dates."""
    undated: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    for suffix, metadata in undated.items():
        content = io.BytesIO()
        with mpl.rc_context(STYLE):
            figure.savefig(content, format=suffix, dpi=DPI, metadata=metadata)
        write_atomic(folder / f"{name}.{suffix}", content.getvalue())


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
    return figure, axes


def in_order(*groups: Mapping[str, Any]) -> list[str]:
    """The attacks named in any of ``groups``, in the one order of this artifact."""
    names = {name for group in groups for name in group}
    return sorted(names, key=lambda n: (ATTACKS.index(n) if n in ATTACKS else len(ATTACKS), n))


@mpl.rc_context(STYLE)
def figure5a(increases: Mapping[str, float], target: str = "", top: int = 20) -> Figure:
    """Figure 5(a): the ``top`` classes by rise of their share of the predictions, in points.

    ``target`` colors one class; the method does not know it, only the caller may.
    """
    figure, axes = canvas(1, 1, COLUMN_IN, 0.9 + 0.125 * min(top, len(increases)))
    increase_bars(axes[0, 0], increases, target, top)
    axes[0, 0].set_xlabel("Increase of predicted share (percentage points)")
    return figure


def increase_bars(axes: Axes, increases: Mapping[str, float], target: str, top: int) -> None:
    """Draws horizontal bars, the largest on top; equal increases in alphabetical order."""
    names = sorted(increases, key=lambda name: (-increases[name], name))[:top]
    values = [increases[name] for name in names]
    colors = [MARKED if name == target else PLAIN for name in names]
    bars = axes.barh(range(len(names)), values, color=colors, height=0.75)
    axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=2, fontsize=5.5)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.15)


@mpl.rc_context(STYLE)
def figure5b(original: Values, inverted: Values, null: Values | None = None) -> Figure:
    """Figure 5(b): ASR of the original and the inverted triggers, per attack, in percent.

    ``null``: ASR of triggers inverted on models without a backdoor (none, clean_finetuned).
    """
    names = in_order(original, inverted)
    figure, axes = canvas(1, 1, COLUMN_IN, 2.1)
    bars(axes[0, 0], names, original, -0.2, BEFORE, "original trigger")
    bars(axes[0, 0], names, inverted, 0.2, AFTER, "inverted trigger")
    null_lines(axes[0, 0], null or {})
    percent_axis(axes[0, 0], "ASR (%)")
    legend_above(figure, axes[0, 0])
    return figure


def bars(
    axes: Axes,
    names: Sequence[str],
    values: Values,
    shift: float,
    color: str | Sequence[str],
    title: str | None = None,
    inside: bool = False,
    column: str = "attack",
    hatch: str = "",
) -> None:
    """Draws one bar per name (mean over seeds), whiskers from min to max when seeds differ.

    The mean is written on top of its bar, or ``inside`` where lines cross the chart. ``names`` are
    those of a ``column`` of the results.
    """
    known = [(place, values[name]) for place, name in enumerate(names) if name in values]
    places = [place + shift for place, _ in known]
    means = [float(np.mean(v)) for _, v in known]
    ends = [
        [m - min(v) for m, (_, v) in zip(means, known, strict=True)],
        [max(v) - m for m, (_, v) in zip(means, known, strict=True)],
    ]
    several = any(len(v) > 1 for _, v in known)
    drawn = axes.bar(
        places,
        means,
        width=0.38 if shift else 0.7,
        color=color,
        label=title,
        yerr=np.abs(ends) if several else None,
        error_kw={"elinewidth": 0.7},
        hatch=hatch,
    )
    texts = [f"{mean:.1f}" if mean >= 1 else f"{mean:.2f}" for mean in means]  # 0.02 % is no zero
    texts = [text.replace("100.0", "100") for text in texts]  # as wide as the others
    axes.bar_label(drawn, texts, padding=1, fontsize=5, label_type="center" if inside else "edge")
    axes.set_xticks(range(len(names)), [label(column, name) for name in names], rotation=20)


def null_lines(axes: Axes, null: Values) -> None:
    """A dotted line at each null model's mean: the level that a bar must be told from."""
    for name in in_order(null):
        axes.axhline(
            float(np.mean(null[name])),
            color=ATTACK_COLORS.get(name, OTHER_COLOR),
            linestyle=":",
            linewidth=1.2,
            label=f"{label('attack', name)}, inverted",
        )


def percent_axis(axes: Axes, title: str) -> None:
    """A vertical axis from 0 to 100 percent."""
    axes.set(ylabel=title, ylim=(0, 110), yticks=range(0, 101, 25))


def legend_above(figure: Figure, axes: Axes) -> None:
    """One legend over the whole figure, so that it never covers a bar."""
    handles, titles = axes.get_legend_handles_labels()
    columns = 2 if figure.get_figwidth() <= COLUMN_IN else len(titles)
    figure.legend(handles, titles, loc="outside upper center", ncols=max(1, columns))


@mpl.rc_context(STYLE)
def attack_gate(
    asr: Values, ca: Values, clean_ca: float, asr_gate: float = 80.0, ca_gate: float = 2.0
) -> Figure:
    """ASR and CA of the undefended models with the gate: ASR at least, CA loss at most (points)."""
    names = in_order(asr, ca)
    figure, axes = canvas(2, 1, COLUMN_IN, 3.4, sharex=True)
    colors = [ATTACK_COLORS.get(name, OTHER_COLOR) for name in names]
    gates = {"ASR (%)": (asr, asr_gate), "CA (%)": (ca, clean_ca - ca_gate)}
    for chart, (title, (values, gate)) in zip(axes[:, 0], gates.items(), strict=True):
        shown = [color for name, color in zip(names, colors, strict=True) if name in values]
        bars(chart, names, values, 0, shown, inside=True)
        chart.axhline(gate, color="black", linestyle="--", linewidth=0.8, label="gate")
        percent_axis(chart, title)
    axes[1, 0].axhline(clean_ca, color="black", linewidth=0.6, label="clean model")
    legend_above(figure, axes[1, 0])
    return figure


@mpl.rc_context(STYLE)
def before_after(ca: tuple[Values, Values], asr: tuple[Values, Values]) -> Figure:
    """CA and ASR per attack before and after tuning; each argument is (before, after)."""
    names = in_order(*ca, *asr)
    figure, axes = canvas(2, 1, COLUMN_IN, 3.4, sharex=True)
    for chart, title, (before, after) in zip(
        axes[:, 0], ("CA (%)", "ASR (%)"), (ca, asr), strict=True
    ):
        bars(chart, names, before, -0.2, BEFORE, "before tuning")
        bars(chart, names, after, 0.2, AFTER, "after tuning")
        percent_axis(chart, title)
    legend_above(figure, axes[0, 0])
    return figure


@mpl.rc_context(STYLE)
def layer_impact(impact: Mapping[str, float], threshold: float) -> Figure:
    """Layer impacts (eq. 8, a ratio) in the given order; critical layers are colored."""
    figure, axes = canvas(1, 1, COLUMN_IN, 0.9 + 0.16 * len(impact))
    chart, values = axes[0, 0], list(impact.values())
    chart.barh(
        range(len(values)),
        values,
        height=0.7,
        color=[MARKED if value > threshold else PLAIN for value in values],
    )
    chart.axvline(
        threshold,
        color="black",
        linestyle="--",
        linewidth=0.8,
        label=f"mean + std = {threshold:.4f}",
    )
    chart.set_yticks(range(len(values)), [label("layer", name) for name in impact])
    chart.invert_yaxis()
    chart.set_xlabel("Layer impact (ratio, eq. 8)")
    legend_above(figure, chart)
    return figure
