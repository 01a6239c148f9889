"""Figures: they show the numbers given, and the same data give the same bytes."""

from __future__ import annotations

import re

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from invertune import curve_figures, figures, image_figures
from invertune.results import ATTACKS, DEFENSES

ASR = {"badclip": [98.0, 99.0], "badnet": [87.0, 85.0], "blended": [96.0, 94.0]}
LOW = {"badclip": [0.5, 0.3], "badnet": [0.02, 0.04], "blended": [0.1, 0.2]}
CA = {"badclip": [58.0, 58.2], "badnet": [58.5, 58.1], "blended": [55.0, 55.2]}
LOSS = {"badclip": [1.0, 1.2], "badnet": [0.02, 0.04], "blended": [1.9, 2.1]}
IMPACTS = {"visual.layer1": 0.1, "visual.layer4": 1.4}
INCREASES = {"mushroom": 97.23, "agaric": 2.13, "crane": 0.0, "bow": -0.02, "ashcan": 0.0}
LOG = pd.DataFrame({"step": [0, 20, 40], "align": [6.0, 5.0, 4.0], "inverted_asr": [1, None, 80.0]})


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((16, 16, 3))


def examples(first: int) -> dict[str, image_figures.Example]:
    return {
        name: image_figures.Example(
            image(first + i), image(first + 9 + i), "x8" if name == "blended" else ""
        )
        for i, name in enumerate(ASR)
    }


DRAW = {
    "figure5a": lambda: figures.figure5a(INCREASES, "mushroom"),
    "figure5b": lambda: figures.figure5b(ASR, {**LOW, "none": [20.0]}),
    "attack_gate": lambda: figures.attack_gate(ASR, LOSS, 80, 2, {"badnet": "failed in seed 7"}),
    "before_after": lambda: figures.before_after(
        {"CA (%)": (CA, CA), "ASR (%)": (ASR, LOW), "Retrieval CA (%)": (CA, CA), "R (%)": ({}, {})}
    ),
    "layer_impact": lambda: figures.layer_impact(IMPACTS, 1.5, ["visual.layer4"]),
    "loss_curves": lambda: curve_figures.loss_curves(
        {"badnet": LOG}, curve_figures.INVERSION_CURVES, {"badnet": 40}
    ),
    "figure7": lambda: image_figures.figure7(examples(0), examples(50)),
    "figure7_upper": lambda: image_figures.figure7(examples(0), {}),
    "figure1": lambda: image_figures.figure1(
        "sig", image(1), image(2), ("lemon", "crane"), INCREASES, "agaric", image(3), (ASR, LOW)
    ),
}


@pytest.mark.parametrize("name", DRAW)
def test_same_data_give_same_bytes_without_dates(name, tmp_path):
    for folder in ("a", "b"):
        figures.save(DRAW[name](), tmp_path / folder, name)
    for suffix in ("png", "pdf"):
        a, b = ((tmp_path / folder / f"{name}.{suffix}").read_bytes() for folder in "ab")
        assert a == b
        assert not re.search(rb"CreationDate|ModDate|tIME|Matplotlib", a)


@pytest.mark.parametrize("name", DRAW)
def test_size_fits_the_paper_and_nothing_stays_open_or_changes(name):
    before = dict(mpl.rcParams)
    figure = DRAW[name]()
    assert isinstance(figure, Figure)
    assert round(figure.get_figwidth(), 2) in (figures.COLUMN_IN, figures.PAGE_IN)
    assert plt.get_fignums() == []
    assert {k: v for k, v in mpl.rcParams.items() if k != "backend"} == {
        k: v for k, v in before.items() if k != "backend"
    }


@pytest.mark.parametrize("name", DRAW)
def test_nothing_is_cut_off(name):
    figure = DRAW[name]()
    with mpl.rc_context(figures.STYLE):
        FigureCanvasAgg(figure).draw()
        drawn, page = figure.get_tightbbox(), figure.bbox_inches
    assert drawn.x0 > -0.01 and drawn.y0 > -0.01
    assert drawn.x1 < page.x1 + 0.01 and drawn.y1 < page.y1 + 0.01


def test_axes_have_units():
    for name in ("figure5b", "before_after"):
        assert all(axes.get_xlabel().endswith("(%)") for axes in DRAW[name]().axes)
    assert [axes.get_xlabel() for axes in DRAW["attack_gate"]().axes] == [
        "ASR (%), at least 80",
        "CA loss (points), at most 2",
    ]
    assert "points" in DRAW["figure5a"]().axes[0].get_xlabel()
    assert "ratio" in DRAW["layer_impact"]().axes[0].get_xlabel()


def test_colors_are_distinct_and_cover_every_name():
    assert set(figures.ATTACK_COLORS) == set(ATTACKS)
    assert set(figures.DEFENSE_COLORS) == set(DEFENSES)
    for looks in (figures.ATTACK_COLORS, figures.ATTACK_MARKERS, figures.DEFENSE_COLORS):
        assert len(set(looks.values())) == len(looks)


def test_figure5a_shows_the_largest_increases_in_order():
    axes = figures.figure5a(INCREASES, "agaric", top=4).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        "mushroom",
        "agaric",
        "ashcan",
        "crane",
    ]
    assert [bar.get_width() for bar in axes.patches] == [97.23, 2.13, 0.0, 0.0]
    marked = mpl.colors.to_rgba(figures.MARKED)
    assert [bar.get_facecolor() == marked for bar in axes.patches] == [False, True, False, False]
    plain = figures.figure5a(INCREASES).axes[0]
    assert all(bar.get_facecolor() != marked for bar in plain.patches)


def test_bars_show_means_in_the_one_order_with_min_and_max():
    axes = figures.figure5b(ASR, {**LOW, "none": [20.0, 22.0]}).axes[0]
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert names == ["Clean model", "BadNet", "Blended", "BadCLIP"]
    places = [round(bar.get_y() + bar.get_height() / 2, 6) for bar in axes.patches]
    assert places == [0.8, 1.8, 2.8, 0.2, 1.2, 2.2, 3.2]
    assert [bar.get_width() for bar in axes.patches[:4]] == [86.0, 95.0, 98.5, 21.0]
    whiskers = axes.containers[1].errorbar[2][0].get_segments()
    assert [list(segment[:, 0]) for segment in whiskers] == [[85, 87], [94, 96], [98, 99]]
    assert "<0.1" in [text.get_text() for text in axes.texts]
    assert axes.get_legend_handles_labels()[1].count(figures.WHISKERS) == 1
    alone = figures.figure5b({"badnet": [86.0]}, {"badnet": [1.0]}).axes[0]
    assert figures.WHISKERS not in alone.get_legend_handles_labels()[1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.02, "<0.1"), (-0.02, "<0.1"), (0.05, "0.1"), (99.94, "99.9"), (99.97, "100")],
)
def test_only_zero_is_shown_as_zero(value, text):
    assert figures.rate_text(value) == text


def test_gate_lines_stand_at_the_gate():
    asr, loss = figures.attack_gate(ASR, LOSS, 80, 2).axes
    assert asr.lines[-1].get_xdata()[0] == 80 and loss.lines[-1].get_xdata()[0] == 2
    assert [text.get_text() for text in loss.texts] == ["<0.1", "2.0", "1.1"]
    assert DRAW["attack_gate"]().get_supxlabel() == "BadNet failed in seed 7"


def test_critical_layers_are_colored_even_below_the_threshold():
    bars = {bar.get_y(): bar.get_facecolor() for bar in DRAW["layer_impact"]().axes[0].patches}
    colors = [mpl.colors.to_hex(bars[place]).upper() for place in sorted(bars)]
    assert colors == [figures.PLAIN, figures.MARKED]


def test_figure1_marks_the_class_that_step_1_found():
    bars = DRAW["figure1"]().axes[2].patches
    marked = mpl.colors.to_rgba(figures.MARKED)
    assert [bar.get_facecolor() == marked for bar in bars] == [False, True, False, False, False]


def test_loss_curves_skip_missing_values_and_columns():
    panels = curve_figures.loss_curves({"badnet": LOG}, curve_figures.INVERSION_CURVES).axes
    drawn = {axes.get_title(): axes.lines for axes in panels}
    assert list(drawn["Held-out inverted ASR (%)"][0].get_xdata()) == [0, 40]
    assert len(drawn["$L_{align}$"]) == 1 and len(drawn["$L_{sim}$"]) == 0


def test_a_circle_marks_the_kept_step():
    panels = curve_figures.loss_curves({"badnet": LOG}, {"align": "loss"}, {"badnet": 20}).axes
    line, circle, legend = panels[0].lines
    assert list(line.get_ydata()) == [6, 5, 4]
    assert circle.get_xydata().tolist() == [[20, 5]]
    assert legend.get_label() == "kept state"


def test_a_difference_is_shown_as_strong_as_it_can_without_saturating():
    clean, change = np.full((2, 1, 3), 0.5), np.array([[[0.1]], [[-0.2]]])
    shown, factor = image_figures.difference(clean + change, clean)
    assert factor == pytest.approx(2.5)
    assert np.allclose(shown, np.array([[[0.75]], [[0]]]))
    assert np.allclose(image_figures.difference(clean, clean)[0], 0.5)


def test_percent_axes_have_one_of_two_scales():
    for lowest, bottom, title in ((89.0, 0, ""), (90.0, 90, "zoomed: 90 to 100 %")):
        axes = figures.canvas(1, 1, 3, 2)[1][0, 0]
        axes.plot([lowest, 100.0])
        figures.zoom(axes)
        assert axes.get_yticks()[0] == bottom and axes.get_title() == title


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((3, 8, 8)), r"an image must be \[H, W, 3\], not \[3, 8, 8\]"),
        (np.full((8, 8, 3), 1.5), r"image values must lie in \[0, 1\], not 1.5..1.5"),
        (np.full((8, 8, 3), np.nan), "image values must lie"),
    ],
)
def test_images_are_checked(bad, message):
    with pytest.raises(ValueError, match=message):
        image_figures.figure7({"badnet": image_figures.Example(bad, bad)}, {})
