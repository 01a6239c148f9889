"""Figures 2-4: where clean, triggered and adversarial images lie in feature space (section 3.1).

The poisoned encoder stands beside the clean one, the null. Each sees the same triggered images, and
adversarial images made with the strongest universal perturbation that step 1 finds on itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples
from torch import Tensor

from invertune import data as datasets
from invertune import figures, metrics, steps, triggers
from invertune.chain import Chain, class_head, pool, pretrained
from invertune.figures import AFTER, COLUMN_IN, MARKED, PLAIN, STYLE
from invertune.metrics import Rate
from invertune.models import embed_images, to_pixels
from invertune.perturbations import perturb
from invertune.rows import Rows, metric_row, shared_columns
from invertune.settings import suspects
from invertune.tables import label
from invertune.target_identification import strongest

CLASSES = 10  # the target and nine drawn by the data's seed, the same for every attack
ATTACKED = ("triggered", "adversarial")
LOOKS: dict[str, dict[str, Any]] = {
    "clean": {"label": "clean, nine classes", "marker": "o", "color": PLAIN, "s": 4},
    "target": {"label": "clean, target class", "marker": "s", "color": MARKED, "s": 7},
    "triggered": {"label": "triggered", "marker": "^", "color": "#56B4E9", "s": 7},
    "adversarial": {"label": "adversarial", "marker": "x", "color": AFTER, "s": 7},
}


@dataclass(frozen=True)
class View:
    """One encoder's unit features of images and texts of ten classes, the target first (index 0).

    ``images``: "target" [T, D], its clean ones; "clean", "triggered" and "adversarial" [M, D], of
    the other classes with ``labels`` [M] (1-9). ``texts`` [10, D] belong to ``names``; ``attack``
    is that of the trigger.
    """

    names: tuple[str, ...]
    images: dict[str, Tensor]
    labels: Tensor
    texts: Tensor
    attack: str = ""

    def title(self, text: str) -> str:
        """A chart's title: the attack, then ``text``."""
        return f"{label('attack', self.attack)}: {text}"

    def similarities(self, kind: str) -> dict[str, np.ndarray]:
        """Cosines [M] of the images of a kind to the target's text and to their original one."""
        cosines = self.images[kind] @ self.texts.T
        original = cosines[torch.arange(len(cosines)), self.labels]
        return {"target": cosines[:, 0].numpy(), "original": original.numpy()}


def encoder_views(chain: Chain, attack: str, seed: int) -> dict[str, View]:
    """Both encoders' views of evaluation images; ``ValueError`` for a null: it has no trigger."""
    poisoned = steps.poisoned(chain, attack, seed)
    trigger = triggers.required(poisoned.trigger, attack)
    data = chain.settings.data
    names = datasets.class_names(data)
    drawn = np.random.default_rng(data.seed).permutation(len(names)).tolist()
    chosen = [chain.target, *[i for i in drawn if i != chain.target][: CLASSES - 1]]
    shown = pool(chain, "evaluation")
    parts = [to_pixels(shown.images[shown.labels == i], chain.device) for i in chosen]
    clean = torch.cat(parts[1:])
    labels = torch.cat([torch.full((len(part),), i) for i, part in enumerate(parts) if i > 0])
    triggered = triggers.apply(trigger, clean)
    images = {"clean": clean, "target": parts[0], "triggered": triggered}
    encoders = {"clean": ("none", pretrained(chain)), "poisoned": (attack, poisoned)}
    views = {}
    for encoder, (suspect, model) in encoders.items():
        images["adversarial"] = perturb(*strongest_perturbation(chain, suspect, seed), clean)
        features = {kind: embed_images(model.clip, x).cpu() for kind, x in images.items()}
        texts = class_head(chain, model.clip)[chosen].cpu()
        ten = tuple(names[i] for i in chosen)
        views[encoder] = View(ten, features, labels, texts, attack)
    return views


def strongest_perturbation(chain: Chain, attack: str, seed: int) -> tuple[str, Tensor]:
    """Kind and tensor of step 1's perturbation that drives any class most (as in Tables 6-11)."""
    found = steps.identified(chain, attack, seed)
    kind = strongest(steps.increases(found))
    return kind, found.tensors("perturbations")[kind].to(chain.device)


def silhouettes(view: View) -> dict[str, float]:
    """Mean silhouettes (-1 to 1; cosine distance of the features themselves, not of a t-SNE).

    ``triggered``, ``adversarial``: these images as one cluster among the ten clean classes;
    ``together``: both kinds as one cluster. A cluster that merges with a class is below 0.
    """
    found = {}
    for name, kinds in {**{k: [k] for k in ATTACKED}, "together": ATTACKED}.items():
        features = torch.cat([view.images[kind] for kind in (*kinds, "clean", "target")])
        labeled, target = len(kinds) * len(view.labels), len(view.images["target"])
        marks = np.concatenate([np.full(labeled, -1), view.labels, np.zeros(target)])
        found[name] = float(silhouette_samples(features, marks, metric="cosine")[:labeled].mean())
    return found


def centroid_cosines(view: View) -> dict[str, float]:
    """Cosines between the centroids of triggered, adversarial and the target's clean images."""
    units = {k: x.mean(0) / x.mean(0).norm() for k, x in view.images.items()}
    pairs = (ATTACKED, ("triggered", "target"), ("adversarial", "target"))
    return {f"{a}_{b}": float(units[a] @ units[b]) for a, b in pairs}


def embedding_rows(chain: Chain) -> Rows:
    """Notebook 02: the numbers behind Figures 2-4 on both encoders, for every attack and seed."""
    rows = []
    for attack, seed in suspects(chain.settings):
        key = steps.identified(chain, attack, seed).key
        base = shared_columns(chain, attack, seed, key, task="zeroshot")
        for encoder, view in encoder_views(chain, attack, seed).items():
            rows += _view_rows(view, encoder, base)
    return rows


def _view_rows(view: View, encoder: str, base: dict[str, Any]) -> Rows:
    rows = []

    def add(figure: int, metric: str, value: Rate | float, k: str = "", **part: object) -> None:
        about = {"paper_item": f"figure{figure}", "variant": {"encoder": encoder, **part}}
        rows.append(metric_row(base, metric, value, k=k, **about))

    for name, value in silhouettes(view).items():
        add(2, "silhouette", value, cluster=name)
    for name, value in centroid_cosines(view).items():
        add(2, "cosine", value, pair=name)
    for kind in ("clean", *ATTACKED):
        for text, cosines in view.similarities(kind).items():
            add(3, "cosine", float(cosines.mean()), images=kind, text=text)
        rate = metrics.attack_success_rate(view.images[kind], view.texts, view.labels, target=0)
        add(4, "asr", rate, "1", images=kind, texts=CLASSES)
    return rows


@mpl.rc_context(STYLE)
def figure2(views: Mapping[str, View]) -> Figure:
    """Figure 2: t-SNE of the image features, with numbers measured on the features themselves."""
    figure, axes = figures.canvas(1, 2, COLUMN_IN, 2.75)
    for chart, (encoder, view) in zip(axes[0], views.items(), strict=True):
        points = torch.cat([view.images[kind] for kind in LOOKS]).double().numpy()
        tsne = TSNE(perplexity=min(30, len(points) // 4), method="exact", random_state=0)
        places, kinds = tsne.fit_transform(points), [[k] * len(view.images[k]) for k in LOOKS]
        for kind, look in LOOKS.items():
            chart.scatter(*places[np.concatenate(kinds) == kind].T, linewidth=0.6, **look)
        text = "t-SNE\nsilhouettes: triggered {triggered:.2f},\nadversarial {adversarial:.2f},\n"
        text += "the two together {together:.2f};\n"
        text += "cosine of their centroids {triggered_adversarial:.2f}"
        numbers = text.format(**silhouettes(view), **centroid_cosines(view))
        chart.set(title=view.title(f"{encoder} encoder"), xticks=[], yticks=[], xlabel=numbers)
    figures.legend_above(figure, axes[0, 0])
    return figure


@mpl.rc_context(STYLE)
def figure3(views: Mapping[str, View]) -> Figure:
    """Figure 3: per image, how its similarity to the target's and to its own text changes."""
    figure, axes = figures.canvas(1, 2, COLUMN_IN, 2.1, sharey=True)
    look: dict[str, Any] = {"inner": "quart", "cut": 0, "palette": [MARKED, PLAIN]}
    look |= {"x": "kind", "y": "change", "hue": "text", "linewidth": 0.6, "density_norm": "width"}
    for chart, (encoder, view) in zip(axes[0], views.items(), strict=True):
        before = view.similarities("clean")
        parts = [
            pd.DataFrame({"change": after - before[text], "kind": kind, "text": f"{text} text"})
            for kind in ATTACKED
            for text, after in view.similarities(kind).items()
        ]
        sns.violinplot(pd.concat(parts), ax=chart, **look)
        chart.axhline(0, color="black", linewidth=0.6)
        chart.set(
            title=view.title(f"{encoder} encoder"), xlabel="", ylabel="Change in cosine similarity"
        )
        chart.get_legend().remove()
    axes[0, 0].plot([], [], color="0.25", linestyle="--", label="median")
    axes[0, 0].plot([], [], color="0.25", linestyle=":", label="quartiles")
    figures.legend_above(figure, axes[0, 0])
    return figure


@mpl.rc_context(STYLE)
def figure4(views: Mapping[str, View]) -> Figure:
    """Figure 4: cosines of attacked images (rows, by class) to the ten texts (columns)."""
    figure, axes = figures.canvas(2, 2, COLUMN_IN, 3.7, sharex=True, sharey=True)
    values = torch.cat([v.images[kind] @ v.texts.T for v in views.values() for kind in ATTACKED])
    look = {"vmin": float(values.min()), "vmax": float(values.max()), "cmap": "viridis"}
    for line, (encoder, view) in zip(axes, views.items(), strict=True):
        for chart, kind in zip(line, ATTACKED, strict=True):
            table = (view.images[kind] @ view.texts.T).numpy()
            drawn = chart.imshow(table, aspect="auto", interpolation="nearest", **look)
            chart.set_title(view.title(kind))
        line[0].set_ylabel(f"{encoder} encoder:\nimages, by class")
    middles = [float((view.labels == i).nonzero().double().mean()) for i in range(1, CLASSES)]
    axes[0, 0].set_yticks(middles, view.names[1:])
    for chart in axes[1]:
        chart.set_xticks(range(CLASSES), view.names, rotation=90)
        chart.set_xlabel("texts")
    figure.colorbar(drawn, ax=axes, label="Cosine similarity", aspect=40, location="top")
    return figure
