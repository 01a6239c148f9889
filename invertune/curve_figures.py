"""What steps 2 and 3 measure while they optimize, over their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from invertune import steps
from invertune.chain import Chain
from invertune.figures import STYLE, attack_look, in_order, legend, panels

INVERSION_CURVES = {
    "align": "$L_{align}$",
    "emb": "$L_{emb}$",
    "sim": "$L_{sim}$",
    "inverted_asr": "Held-out inverted ASR (%)",
    "mask_l1": "Mask size (L1)",
}
TUNING_CURVES = {
    "inverted_asr": "Held-out suspected ASR (%)",
    "clean_accuracy": "Held-out CA (%)",
    "activation": "$L_{activation}$",
    "preserve": "$L_{preserve}$",
}
LOG = ("align", "mask_l1", "activation", "preserve")  # else only their first steps are seen


def inversion_figure(chain: Chain) -> Figure:
    """Per attack (first seed): the inversion's losses with held-out ASR and mask size."""
    logs = {}
    for attack in ("none", *chain.settings.attacks.names):
        found = steps.inverted(chain, attack, chain.settings.seeds[0]).metrics
        states = pd.DataFrame(found["states"])
        losses = pd.DataFrame(found["log"])
        logs[attack] = losses.merge(states, on="step", how="outer").sort_values("step")
    return loss_curves(logs, INVERSION_CURVES)


def tuning_figure(chain: Chain) -> Figure:
    """Per attack (first seed): what step 3 measured at the rate it kept; circles: kept states."""
    names: Sequence[str] = chain.settings.attacks.names
    found = {a: steps.tuned(chain, a, chain.settings.seeds[0]).metrics for a in names}
    states = {a: pd.DataFrame([m["suspected"], *m["states"]]) for a, m in found.items()}
    logs = {a: s[s.lr.isin([0, found[a]["lr"]])] for a, s in states.items()}
    kept = {a: m["step"] for a, m in found.items()}
    return loss_curves(logs, TUNING_CURVES, kept)


@mpl.rc_context(STYLE)
def loss_curves(
    logs: Mapping[str, pd.DataFrame],
    titles: Mapping[str, str],
    kept: Mapping[str, int] | None = None,
) -> Figure:
    """Training over steps: one panel per column of ``titles``, one line per attack (eqs. 3-7, 11).

    Each log has a column ``step`` and some of the columns; missing values are skipped, so losses
    and what is measured less often may stand in one frame. ``kept`` steps get a circle.
    """
    kept, ring = kept or {}, {"marker": "o", "markersize": 6, "fillstyle": "none"}
    figure, axes = panels(len(titles), 0.6, 1.1, sharex=True)
    for chart, (column, title) in zip(axes.flat, titles.items(), strict=False):
        for i, name in enumerate(in_order(logs)):
            if column in logs[name]:
                points, look = logs[name].set_index("step")[column].dropna(), attack_look(name)
                drawn = points[points > 0] if column in LOG else points
                chart.plot(drawn, markevery=(0.03 * i, 0.25), **look)
                if name in kept:
                    place = (kept[name], points[kept[name]])
                    chart.plot(*place, color=look["color"], clip_on=False, **ring)
        chart.set_title(title)
        if column in LOG:
            chart.set_yscale("log", subs=[])
            chart.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            chart.yaxis.set_major_formatter("{x:,g}")
    if kept:
        axes[0, 0].plot([], [], color="black", linestyle="", label="kept state", **ring)
    figure.supxlabel("Step", fontsize=STYLE["axes.labelsize"])
    figure.legend(**legend(axes[0, 0]), loc="outside upper center", ncols=3)
    return figure
