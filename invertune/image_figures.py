"""Figures made of images: Figure 7 (triggers) and Figure 1 (overview).

Images are arrays [H, W, 3] with values in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from invertune.figures import (
    COLUMN_IN,
    PAGE_IN,
    STYLE,
    Values,
    bars,
    canvas,
    in_order,
    increase_bars,
    legend,
    percent_axis,
)
from invertune.tables import label


@dataclass(frozen=True)
class Example:
    """A triggered image and its trigger as an image, with a ``note`` to stand below that."""

    image: np.ndarray
    trigger: np.ndarray
    note: str = ""


def difference(triggered: np.ndarray, clean: np.ndarray) -> tuple[np.ndarray, float]:
    """What a trigger changes in an image, around mid-gray, and the factor that it is shown with:
    the one at which the largest change just becomes black or white.
    """
    changed = triggered - clean
    factor = 0.5 / max(float(np.abs(changed).max()), 1 / 255)
    return np.clip(0.5 + factor * changed, 0, 1), factor


def show(axes: Axes, image: np.ndarray, title: str = "") -> None:
    """Draws one image without ticks; ``ValueError`` unless it is [H, W, 3] in [0, 1]."""
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image must be [H, W, 3], not {list(image.shape)}")
    if not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(f"image values must lie in [0, 1], not {image.min()}..{image.max()}")
    axes.imshow(image, interpolation="nearest", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[], title=title)
    for spine in axes.spines.values():
        spine.set_visible(False)


@mpl.rc_context(STYLE)
def figure7(original: Mapping[str, Example], inverted: Mapping[str, Example]) -> Figure:
    """Figure 7: per attack a triggered image above its trigger, for the original trigger and below
    it for the inverted one. An empty ``inverted`` leaves the upper half only.
    """
    names = in_order(original, inverted)
    differs = any(example.note for example in original.values())
    halves = (
        ("Original trigger", "Trigger alone" + "\nor difference" * differs, original),
        ("Inverted trigger", "Trigger alone", inverted),
    )
    shown = [half for half in halves if half[2]]
    width = PAGE_IN if len(names) > 2 else COLUMN_IN
    figure, axes = canvas(2 * len(shown), len(names), width, 2.3 * len(shown) + 0.2)
    for half, (title, below, examples) in enumerate(shown):
        for column, name in enumerate(names):
            upper, lower = axes[2 * half : 2 * half + 2, column]
            show(upper, examples[name].image)
            show(lower, examples[name].trigger)
            lower.set_xlabel(examples[name].note, labelpad=1)
            if half == 0:
                upper.set_title(label("attack", name))
        axes[2 * half, 0].set_ylabel(title)
        axes[2 * half + 1, 0].set_ylabel(below)
    return figure


@mpl.rc_context(STYLE)
def figure1(
    attack: str,
    clean: np.ndarray,
    triggered: np.ndarray,
    predicted: tuple[str, str],
    increases: Mapping[str, float],
    identified: str,
    inverted: np.ndarray,
    asr: tuple[Values, Values],
) -> Figure:
    """Figure 1: the attack, then the three steps, from left to right.

    ``predicted``: classes of the clean and of the triggered image; ``increases`` in points;
    ``identified``: the class that step 1 found; ``inverted``: the inverted trigger as an image;
    ``asr``: (before, after) tuning, in percent.
    """
    figure, axes = canvas(1, 5, PAGE_IN, 1.85, width_ratios=[1, 1, 1.2, 1, 1.6])
    show(axes[0, 0], clean, "Clean image")
    show(axes[0, 1], triggered, f"{label('attack', attack)} trigger")
    for chart, name in zip(axes[0], predicted, strict=False):
        chart.set_xlabel(f"predicted:\n{name}")
    increase_bars(axes[0, 2], increases, identified, top=5)
    axes[0, 2].set(title="1 Target", xlabel="Increase (points)")
    show(axes[0, 3], inverted, "2 Inverted trigger")
    before, after = asr
    bars(axes[0, 4], in_order(before, after), {"before": before, "after": after})
    percent_axis(axes[0, 4], "Zero-shot ASR (%)")
    axes[0, 4].set_title("3 Tuning")
    figure.legend(**legend(axes[0, 4]), loc="outside upper right", ncols=2)
    return figure
