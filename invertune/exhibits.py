"""The notebooks' tables and figures: results and artifacts in, a frame or a Figure out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from invertune import data as datasets
from invertune import figures, image_figures, steps, tables, triggers
from invertune.chain import Chain, class_head, pool
from invertune.image_figures import Example
from invertune.metrics import predictions
from invertune.models import embed_images, to_pixels
from invertune.reports import increases_by_class, inverted_energy
from invertune.rows import TASK_KS, own_rows
from invertune.sections import NULLS, Attacks
from invertune.settings import suspects
from invertune.target_identification import ranked_increases, strongest, weighted_mask


def _column(results: pd.DataFrame, **where: str | Sequence[str]) -> pd.Series:
    """Mean over seeds per attack of the rows that ``where`` selects."""
    means = {k: float(np.mean(v)) for k, v in tables.by_seed(results, "attack", **where).items()}
    return pd.Series(means, dtype=float)


def _by_attack(
    chain: Chain, columns: dict[str, pd.Series], nulls: Sequence[str] = ()
) -> pd.DataFrame:
    names = [*nulls, *chain.settings.attacks.names]
    frame = pd.DataFrame({title: column.reindex(names) for title, column in columns.items()})
    frame.insert(0, "attack", [tables.label("attack", name) for name in names])
    return frame.reset_index(drop=True)


def gate_table(chain: Chain, results: pd.DataFrame) -> pd.DataFrame:
    """Per attack: CA, both tasks' ASR with its floors, and in which seeds the gate was missed."""
    rows, gate = own_rows(chain, results), chain.settings.attacks
    failed = _failed(rows, gate)
    where = {"defense": "none", "task": "zeroshot", "k": "1"}
    columns = {
        "CA": _column(rows, metric="ca", **where),
        "CA loss": _column(rows, metric="ca_loss", **where),
    }
    for (task, k), name in zip(TASK_KS, ("ASR", "retrieval ASR"), strict=True):
        where = {"defense": "none", "task": task, "k": k, "metric": "asr"}
        columns[name] = _column(rows, variant="", **where)
        columns[f"{name}, clean model"] = _column(rows, variant="floor=clean_model", **where)
        columns[f"{name}, no trigger"] = _column(rows, variant="floor=untriggered", **where)
    frame = _by_attack(chain, columns)
    frame["gate"] = [failed.get(name, "passed") for name in gate.names]
    return frame


def _failed(rows: pd.DataFrame, gate: Attacks) -> dict[str, str]:
    """What each attack missed, e.g. "failed in seed 7 (CA loss 2.38)"."""
    texts: dict[str, list[str]] = {}
    for row in tables.gate_failures(rows, gate).itertuples():
        number = f"{tables.label('metric', str(row.metric))} {row.value:.2f}"
        texts.setdefault(str(row.attack), []).append(f"seed {row.seed} ({number})")
    return {attack: f"failed in {', '.join(parts)}" for attack, parts in texts.items()}


def gate_figure(chain: Chain, results: pd.DataFrame) -> Figure:
    """ASR and CA loss of the poisoned models with the gate's lines."""
    rows, gate = own_rows(chain, results), chain.settings.attacks
    rows = rows[rows.attack.isin(gate.names)]
    where = {"defense": "none", "task": "zeroshot", "k": "1", "variant": ""}
    asr, ca_loss = (tables.by_seed(rows, "attack", metric=m, **where) for m in ("asr", "ca_loss"))
    return figures.attack_gate(
        asr, ca_loss, gate.gate_asr_percent, gate.gate_ca_drop_points, _failed(rows, gate)
    )


def ranking_table(chain: Chain) -> pd.DataFrame:
    """Per model and seed: the candidates, lowest score first, with its factors: the mask's size and
    100 minus the largest increase, but at least 1.
    """
    names, lines = datasets.distinct_names(chain.settings.data), []
    for attack, seed in suspects(chain.settings, nulls=True):
        found = steps.identified(chain, attack, seed).metrics
        gains = increases_by_class(chain, attack, seed)
        chosen = [names[i] for i in found["ranking"]]
        sizes = [math.inf if s is None else s for s in found["scores"]]
        weighted = [weighted_mask(s, gains[c]) for s, c in zip(sizes, chosen, strict=True)]
        right = "yes" if chosen[0] == chain.settings.target else "NO"
        lines.append(
            {
                "attack": tables.label("attack", attack),
                "seed": seed,
                "candidates": ", ".join(chosen),
                "mask L1 after a short inversion": _whole(sizes),
                "largest increase": ", ".join(f"{gains[c]:+.1f}" for c in chosen),
                "score (mask L1 x (100 - increase))": _whole(weighted),
                "found": "(null)" if attack in NULLS else right,
            }
        )
    return pd.DataFrame(lines)


def _whole(values: Sequence[float]) -> str:
    return ", ".join("never" if value == math.inf else f"{value:.0f}" for value in values)


def increase_table(chain: Chain, attack: str) -> pd.DataFrame:
    """Tables 6-11 for one attack (first seed): the classes that gain most, under the perturbation
    that drives one class most.
    """
    names = datasets.distinct_names(chain.settings.data)
    found = steps.increases(steps.identified(chain, attack, chain.settings.seeds[0]))
    kind = strongest(found)
    total = int(found[kind].clean.sum())
    lines = [
        {
            "perturbation": tables.label("perturbation", kind),
            "class": name,
            f"clean (of {total})": before,
            f"adversarial (of {total})": after,
            "increase (points)": points,
        }
        for name, before, after, points in ranked_increases(found[kind], names)
    ]
    return pd.DataFrame(lines)


def inversion_table(chain: Chain, results: pd.DataFrame) -> pd.DataFrame:
    """Per model: ASR of the true and of the inverted trigger, mask size, and its ratio to that
    of the clean model where that reached the ASR floor.
    """
    rows = own_rows(chain, results)
    where = {"defense": "none", "task": "zeroshot"}
    sizes = _column(rows, metric="mask_l1", variant="", **where)
    ratios = _column(rows, metric="mask_l1_ratio", **where)
    if sizes.get("none") == math.inf:
        ratios[:] = np.nan
    return _by_attack(
        chain,
        {
            "ASR": _column(rows, metric="asr", paper_item="figure5", **where),
            "inverted ASR": _column(rows, metric="inverted_asr", variant="", **where),
            "mask L1 at the ASR floor": sizes,
            "mask L1 / clean model's": ratios,
            "mask energy under the patch (%)": _column(
                rows, metric="mask_energy", variant="", **where
            ),
            "clean model's under the patch (%)": _column(
                rows, metric="mask_energy", variant="floor=clean_model", **where
            ),
            "mask energy in the patch's quarter (%)": _column(
                rows, metric="mask_energy", variant="place=quarter", **where
            ),
            "clean model's in the quarter (%)": _column(
                rows, metric="mask_energy", variant="floor=clean_model;place=quarter", **where
            ),
        },
        NULLS,
    )


def figure5b(chain: Chain, results: pd.DataFrame) -> Figure:
    """Figure 5(b): ASR of original and inverted triggers, with the clean model's null."""
    rows = own_rows(chain, results)
    inverted = tables.by_seed(rows, "attack", metric="inverted_asr", variant="")
    original = tables.by_seed(rows, "attack", metric="asr", paper_item="figure5")
    return figures.figure5b(original, inverted)


def figure7(chain: Chain, inverted: bool = True) -> Figure:
    """Figure 7: triggered images and triggers; with ``inverted`` also the inverted ones, and the
    share of their mask's energy at the place of the true trigger, where it has one, and around it.
    """
    names: tuple[str, ...] = chain.settings.attacks.names
    seed, found = chain.settings.seeds[0], {}
    original = {name: trigger_example(chain, name, seed) for name in names}
    for name in names if inverted else ():
        note = ""
        if shares := inverted_energy(chain, name, name, seed):
            note = "mask's energy: {:.0f} %\nat the patch, {:.0f} %\nin its quarter"
            note = note.format(shares[""], shares["quarter"])
        found[name] = replace(trigger_example(chain, name, seed, True), note=note)
    return image_figures.figure7(original, found)


def trigger_example(
    chain: Chain, attack: str, seed: int, inverted: bool = False, part: str = "evaluation"
) -> Example:
    """A triggered evaluation image and the trigger alone.

    A patch and an inverted trigger are shown on mid-gray; of any other trigger, what it changes in
    this image, around mid-gray, as strong as it can be shown.
    """
    if inverted:
        trigger = steps.inverted_trigger(chain, steps.inverted(chain, attack, seed))
    else:
        trigger = triggers.required(steps.planted_trigger(chain, attack, seed), attack)
    image = to_pixels(example_image(chain, part), chain.device)
    triggered = as_picture(triggers.apply(trigger, image)[0])
    if trigger.kind in ("patch", "mask"):
        gray = torch.full_like(image, 0.5)
        return Example(triggered, as_picture(triggers.apply(trigger, gray)[0]))
    changed, factor = image_figures.difference(triggered, as_picture(image[0]))
    return Example(triggered, changed, f"difference x{factor:.1f}")


def example_image(chain: Chain, part: str = "evaluation") -> Tensor:
    """The first labeled image of ``part`` that is not of the target class, uint8 [1, 3, H, W]."""
    shown = pool(chain, part)
    first = int((shown.labels != chain.target).nonzero()[0])
    return shown.images[first : first + 1]


def as_picture(image: Tensor) -> np.ndarray:
    """[3, H, W] in [0, 1] to a NumPy array [H, W, 3]."""
    return image.detach().cpu().permute(1, 2, 0).numpy()


def layer_table(chain: Chain) -> pd.DataFrame:
    """Tables 12-15, per attack and seed: impact of the inverted trigger per layer, threshold,
    critical layers; and the neurons that step 3 tuned, which may go by other triggers and another
    rule.
    """
    lines = []
    for attack, seed in suspects(chain.settings):
        moved = steps.layer_impacts(chain, attack, seed)
        critical = steps.critical(chain, attack, seed)
        neurons = steps.in_depth(steps.tuned(chain, attack, seed).metrics["neurons"])
        lines.append(
            {
                "attack": tables.label("attack", attack),
                "seed": seed,
                **{tables.label("layer", k): v for k, v in moved.items()},
                "mean": critical.mean,
                "std": critical.std,
                "threshold": critical.threshold,
                "critical": tables.layers(critical.layers),
                "tuned neurons": ", ".join(
                    f"{tables.label('layer', k)}: {count}" for k, count in neurons.items()
                ),
            }
        )
    return pd.DataFrame(lines)


def layer_figure(chain: Chain) -> Figure:
    """Layer impacts of the last attack (BadCLIP in the paper's order), first seed."""
    attack, seed = chain.settings.attacks.names[-1], chain.settings.seeds[0]
    moved, critical = steps.layer_impacts(chain, attack, seed), steps.critical(chain, attack, seed)
    title = tables.label("attack", attack)
    return figures.layer_impact(moved, critical.threshold, critical.layers, title)


def tuning_table(chain: Chain, results: pd.DataFrame) -> pd.DataFrame:
    """Per attack: CA and ASR of both tasks before and after, the perturbation's ASR, and the rate
    of each seed.
    """
    rows, columns = own_rows(chain, results), {}
    for task, k in TASK_KS:
        for metric in ("ca", "asr"):
            where = {"task": task, "k": k, "metric": metric, "variant": "", "paper_item": "table1"}
            for defense, title in (("none", "before"), ("invertune", "after")):
                name = f"{tables.label('task', task)} {metric.upper()} {title}"
                columns[name] = _column(rows, defense=defense, **where)
    for defense, title in (("none", "before"), ("invertune", "after")):
        name = f"perturbation's ASR {title}"
        columns[name] = _column(rows, defense=defense, metric="universal_asr")
    frame = _by_attack(chain, columns)
    frame["lr, each seed"] = [
        ", ".join(f"{steps.tuned(chain, a, s).metrics['lr']:g}" for s in chain.settings.seeds)
        for a in chain.settings.attacks.names
    ]
    return frame


def before_after_figure(chain: Chain, results: pd.DataFrame) -> Figure:
    """CA and ASR of both tasks before and after InverTune."""
    return figures.before_after(
        {
            f"{tables.label('task', task)} {metric.upper()} (%)": _before_after(
                chain, results, metric, task, k
            )
            for task, k in TASK_KS
            for metric in ("ca", "asr")
        }
    )


def _before_after(
    chain: Chain, results: pd.DataFrame, metric: str, task: str = "zeroshot", k: str = "1"
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Table 1's rates without defense and after InverTune: per attack, of each seed."""
    where = {"task": task, "k": k, "variant": "", "paper_item": "table1", "metric": metric}
    rows = own_rows(chain, results)
    before, after = (
        tables.by_seed(rows, "attack", defense=d, **where) for d in ("none", "invertune")
    )
    return before, after


def figure1(chain: Chain, results: pd.DataFrame) -> Figure:
    """Figure 1: one attack and the three steps, drawn from the artifacts of a run."""
    attack, seed = chain.settings.attacks.names[-1], chain.settings.seeds[0]
    suspect, image = steps.poisoned(chain, attack, seed), example_image(chain)
    example = trigger_example(chain, attack, seed)
    triggered = torch.from_numpy(example.image).permute(2, 0, 1)[None].to(chain.device)
    names, head = datasets.distinct_names(chain.settings.data), class_head(chain, suspect.clip)
    features = torch.cat([embed_images(suspect.clip, shown) for shown in (image, triggered)])
    seen = [names[i] for i in predictions(features, head).tolist()]
    return image_figures.figure1(
        attack,
        as_picture(to_pixels(image, chain.device)[0]),
        example.image,
        (seen[0], seen[1]),
        increases_by_class(chain, attack, seed),
        names[steps.suspected_target(chain, attack, seed)],
        trigger_example(chain, attack, seed, True).trigger,
        _before_after(chain, results, "asr"),
    )
