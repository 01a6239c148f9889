"""InverTune on a model of one's own: the suspected target, its trigger, and a purified copy.

The steps and settings are those of the notebooks; nothing is known of any attack. What is found is
reported without a verdict: a clean model has classes that perturbations reach, too.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from invertune import data as datasets
from invertune import exhibits, figures, image_figures, reports, steps, tables
from invertune.ablation_steps import second_round
from invertune.chain import Chain, open_chain, pretrained
from invertune.files import REPOSITORY
from invertune.models import WEIGHTS, save_weights, to_pixels
from invertune.real_data import fitted
from invertune.results import read_results
from invertune.rows import full_mask
from invertune.sections import EMBEDDED, NULLS, PICTOGRAMS, Settings
from invertune.store import Artifact
from invertune.target_identification import weighted_mask
from invertune.weights import configuration, local_dir, shipped_as

SUSPECT = "none"  # the model of the profile's ``weights``, as it comes


class PurifyError(ValueError):
    """A folder that cannot take the results; says what to change."""


def purify(settings: Settings, out: Path, rounds: int = 1) -> str:
    """Runs steps 1 to 3 on the model that ``settings.weights`` names, and writes folder ``out``.

    ``out`` gets the purified weights (float32 safetensors; with open_clip's configuration where the
    suspect came with one, so that the folder is a local-dir), trigger.png, and README.md, whose
    text is returned. With two ``rounds`` steps 2 and 3 are run again on what the first left. Of a
    user's folder of images (``data.source``) at most the profile's counts are taken.
    Raises ``PurifyError`` where ``out`` is not an empty or new folder.
    """
    if out.name in ("", "..") or out.is_symlink():
        raise PurifyError(f"{out} names no folder of its own; name a new one")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PurifyError(f"{out} exists and is not an empty folder; name a new one")
    settings = fitted(settings)
    datasets.check(settings)
    chain, seed = open_chain(settings), settings.seeds[0]
    step1 = steps.identified(chain, SUSPECT, seed)
    target = steps.first_candidate(chain, SUSPECT, seed)
    chain = chain.with_settings(target=target)
    made = [(steps.inverted(chain, SUSPECT, seed).metrics, steps.tuned(chain, SUSPECT, seed))]
    if rounds > 1:
        again = second_round(chain, SUSPECT, seed)
        made.append((again.metrics["inversion"], again))
    text = _report(chain, step1, made)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        part = Path(work) / out.name  # out gets all of it or nothing
        part.mkdir()
        figures.save(trigger_figure(chain), part, "trigger")
        _save(chain, made[-1][1], part)
        (part / "README.md").write_text(text)
        part.replace(out)
    return text


def _save(chain: Chain, artifact: Artifact, out: Path) -> None:
    settings = chain.settings
    save_weights(pretrained(chain).after(artifact, SUSPECT).clip, out / WEIGHTS)
    folder = local_dir(settings.backbone, settings.weights)
    for path in configuration(folder) if folder else ():
        shutil.copy(path, out / path.name)


def _report(chain: Chain, step1: Artifact, rounds: list[tuple[dict[str, Any], Artifact]]) -> str:
    """The text of README.md; ``rounds``: what is kept of each inversion, and what was tuned."""
    settings, found = chain.settings, step1.metrics
    data = settings.data
    gains = reports.increases_by_class(chain, SUSPECT, settings.seeds[0])
    names = datasets.distinct_names(data)
    candidates = [
        _candidate(names[i], gains[names[i]], size)
        for i, size in zip(found["ranking"], found["scores"], strict=True)
    ]
    tuned = [_round(number, *made) for number, made in enumerate(rounds, 1)]
    trigger = rounds[0][0]
    share = 100 * trigger["mask_l1"] / full_mask(chain)
    parts = [
        f"# InverTune on {settings.weights} ({settings.backbone})",
        f"Profile {settings.profile}, seed {settings.seeds[0]}, {len(names):,} classes, "
        f"{data.inversion_images:,} images ({data.source}). Rates are in percent, on "
        f"{data.heldout_images:,} others held out; no attack is known, so what a true trigger "
        "would still do is not measured.",
        f"## 1 Suspected target: {settings.target}",
        tables.frame_markdown(pd.DataFrame(candidates), 1).strip(),
        "The classes that universal perturbations reach most. *Score*, the lower the more "
        "suspicious: the mask that a short inversion needs (L1, at the ASR floor) times 100 minus "
        f"the largest increase (at least 1). {comparison(settings)}",
        "## 2 Inverted trigger",
        f"It drives {trigger['inverted_asr']:.1f} % of the images to the target, with "
        f"{share:.1f} % of the mask.",
        "![the inverted trigger](trigger.png)",
        "## 3 Tuning",
        tables.frame_markdown(pd.DataFrame(tuned), 1).strip(),
        "*Triggers*: images that the suspected triggers of that round drive to the target. "
        f"The purified weights: `{WEIGHTS}`.",
    ]
    return "\n\n".join(parts) + "\n"


def _candidate(name: str, gain: float, size: float | None) -> dict[str, Any]:
    """A class's row; ``size`` is the mask L1 of a short inversion, None where none sufficed."""
    return {
        "class": name,
        "largest increase (points)": gain,
        "mask L1": "never" if size is None else size,
        "score": "none" if size is None else weighted_mask(size, gain),
    }


def _round(number: int, trigger: dict[str, Any], tuned: Artifact) -> dict[str, Any]:
    metrics = tuned.metrics
    kept = next(
        s for s in metrics["states"] if (s["lr"], s["step"]) == (metrics["lr"], metrics["step"])
    )
    ends = (metrics["suspected"], kept)
    return {
        "round": str(number),
        "inverted mask L1": trigger["mask_l1"],
        "clean accuracy": " → ".join(f"{state['clean_accuracy']:.1f}" for state in ends),
        "triggers": " → ".join(f"{state['inverted_asr']:.1f}" for state in ends),
        "critical layers": tables.layers(metrics["layers"]),
        "critical neurons": ", ".join(
            str(metrics["neurons"][layer]) for layer in metrics["layers"]
        ),
    }


def comparison(settings: Settings) -> str:
    """In a sentence, the scores of the first candidates of known models, clean and attacked.

    From the published results of the same profile and backbone, where there are any.
    """
    alike = shipped_as(settings.weights) == settings.backbone or settings.weights == EMBEDDED
    known = settings.profile == "mini" and settings.data.source == PICTOGRAMS and alike
    found = known_scores(settings.backbone) if known else []
    clean = [value for attack, value in found if attack in NULLS]
    attacked = [value for attack, value in found if attack not in NULLS]
    if not (clean and attacked):
        return "Run a model known to be clean beside it: it has such classes, too."
    return (
        f"For the first candidates of clean models it is {min(clean):.0f} to {max(clean):.0f}, "
        f"of attacked ones {min(attacked):.0f} to {max(attacked):.0f}."
    )


def known_scores(backbone: str) -> list[tuple[str, float]]:
    """Attack and first candidate's score of each published model of mini with this backbone."""
    rows = read_results(REPOSITORY / "expected" / "mini.csv", "mini")
    rows = rows[(rows.backbone == backbone) & (rows.defense == "none")]
    place, name = (rows.variant.str.extract(f"{key}=([^;]+)")[0] for key in ("candidate", "class"))
    rows = rows.assign(name=name)
    model = ["attack", "target", "seed", "name"]
    gains = rows[rows.metric == "increase"].groupby(model).value.max()
    first = rows[(rows.metric == "mask_l1") & (place == "1")].set_index(model).value
    both = pd.concat([first.rename("mask"), gains.rename("gain")], axis=1, join="inner")
    return [(key[0], weighted_mask(r["mask"], r["gain"])) for key, r in both.iterrows()]


@mpl.rc_context(figures.STYLE)
def trigger_figure(chain: Chain) -> Figure:
    """A clean image, the same with the inverted trigger, and the trigger alone."""
    seed, part = chain.settings.seeds[0], "heldout"
    example = exhibits.trigger_example(chain, SUSPECT, seed, inverted=True, part=part)
    image = exhibits.example_image(chain, part)
    clean = exhibits.as_picture(to_pixels(image, chain.device)[0])
    shown = {"clean": clean, "with the trigger": example.image, "trigger": example.trigger}
    figure, axes = figures.canvas(1, len(shown), figures.COLUMN_IN, 1.3)
    for chart, (title, picture) in zip(axes[0], shown.items(), strict=True):
        image_figures.show(chart, picture, title)
    return figure
