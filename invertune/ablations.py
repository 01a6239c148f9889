"""Ablations: one setting changed at a time (sections 4.3 and 4.4: Tables 2 and 3, Figure 6).

Rows for the results table first, then the tables of notebook 07. Rates are in percent.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from invertune import data as datasets
from invertune import metrics, steps, tables, triggers
from invertune.ablation_steps import found_triggers, inversions, scored, second_round, with_value
from invertune.chain import Chain
from invertune.evaluation import RECALL_KS
from invertune.metrics import Rate
from invertune.results import variant_text
from invertune.rows import Rows, mask_size, metric_row, own_rows, shared_columns
from invertune.sections import NULLS, SWEEPS, WEIGHTS, Tuning
from invertune.settings import compared, load_settings, suspects, sweep_values
from invertune.store import Artifact

TABLE3 = {"inverted": ("inverted",), "uap": ("universal",), "both": ("inverted", "universal")}
FORMS = set(Tuning.model_fields) - {
    *("lrs", "steps", "measure_every_steps", "allowed_ca_drop_points")
}


def variant(name: str, value: Any) -> str:
    """The text of one changed setting in the results, e.g. "lambda4=0.05" or "lrs=0.001/0.003"."""
    if isinstance(value, tuple):
        value = "/".join(f"{v:g}" for v in value)
    return variant_text({name: value})


def variants(chain: Chain, section: str, names: Iterable[str]) -> list[str]:
    """The texts of all values of these settings, of those that have more than one."""
    several = compared(chain.settings, section, names)
    return [variant(n, v) for n in several for v in sweep_values(chain.settings, section, n)]


def inversion_rows(chain: Chain, attacks: Sequence[str], names: Iterable[str], item: str) -> Rows:
    """Inverted ASR, mask size at the ASR floor and SSIM at every compared value of some settings.

    Besides, as extras, the last state of each inversion: what step 2 gives without choosing.
    """
    rows: Rows = []
    several = compared(chain.settings, "inversion", names)
    for (attack, seed), name in itertools.product(suspects(chain.settings, among=attacks), several):
        suspect = steps.poisoned(chain, attack, seed)
        for artifact, values in inversions(chain, attack, seed, name):
            found = found_triggers(chain, artifact)
            done = scored(chain, suspect, [t for t, _ in found], artifact.key, seed)
            for place, (value, (_, kept)) in enumerate(zip(values, found, strict=True)):
                about = {"paper_item": item, "variant": variant(name, value)}
                base = shared_columns(chain, attack, seed, done.key, task="zeroshot", **about)
                asr, last = Rate(*done.metrics["asr"][place]["1"]), kept["states"][-1]
                rows.append(metric_row(base, "inverted_asr", asr, k=1))
                size = mask_size(chain, kept["mask_l1_at_equal_asr"])
                rows.append(metric_row(base, "mask_l1", size))
                rows.append(metric_row(base, "ssim", done.metrics["ssim"][place]))
                base |= {"paper_item": "extra", "key": artifact.key}
                base["variant"] += ";state=last"
                rows.append(metric_row(base, "inverted_asr", last["inverted_asr"], k=1))
                rows.append(metric_row(base, "mask_l1", last["mask_l1"]))
    return rows


def tuning_rows(chain: Chain, attacks: Sequence[str], names: Iterable[str], item: str) -> Rows:
    """CA and ASR after tuning at every compared value of some settings (Figure 6 and beyond).

    Besides, as extras, what step 3 measured on held-out images at the highest rate's last step: CA,
    and the ASR of the suspected triggers.
    """
    rows: Rows = []
    several = compared(chain.settings, "tuning", names)
    for (attack, seed), name in itertools.product(suspects(chain.settings, among=attacks), several):
        for value in sweep_values(chain.settings, "tuning", name):
            done = steps.tuned(with_value(chain, "tuning", name, value), attack, seed)
            text = variant(name, value)
            about = {"paper_item": item, "variant": text}
            rows += _purified_rows(chain, attack, seed, done, (1,), **about)
            last = max(done.metrics["states"], key=lambda state: (state["lr"], state["step"]))
            base = shared_columns(chain, attack, seed, done.key, "invertune", task="zeroshot", k=1)
            base["variant"] = f"{text};state=last"
            rows.append(metric_row(base, "ca", last["clean_accuracy"]))
            rows.append(metric_row(base, "suspected_asr", last["inverted_asr"]))
    return rows


SWEEP_ROWS = {"inversion": inversion_rows, "tuning": tuning_rows}


def sweep_rows(chain: Chain, title: str) -> Rows:
    """The rows of one of ``sections.SWEEPS``, on the attacks that the settings name for it."""
    sweep = SWEEPS[title]
    attacks = getattr(chain.settings.ablations, sweep.attacks)
    return SWEEP_ROWS[sweep.step](chain, attacks, sweep.names, sweep.item)


def _purified_rows(
    chain: Chain, attack: str, seed: int, artifact: Artifact, ks: Sequence[int], **columns: Any
) -> Rows:
    """Zero-shot CA and ASR under the true trigger of one tuned model."""
    suspect = steps.poisoned(chain, attack, seed)
    trigger = triggers.required(suspect.trigger, attack)
    done = scored(chain, suspect.after(artifact, attack), [trigger], suspect.key, seed)
    base = shared_columns(chain, attack, seed, done.key, "invertune", task="zeroshot", **columns)
    return [
        metric_row(base, metric, Rate(*rates[str(k)]), k=k)
        for metric, rates in (("ca", done.metrics["ca"]), ("asr", done.metrics["asr"][0]))
        for k in ks
    ]


def table3_tunings(chain: Chain) -> dict[str, Tuning]:
    """Step 3's settings for each line of Table 3, by its variant.

    With either trigger, or both, all else as in the profile; and with the inverted one in the
    paper's form: all that ``params/paper.yml`` says of step 3 but its rates, steps, measurements
    and allowance.
    """
    own = chain.settings.tuning
    lines = {f"trigger={n}": own.model_copy(update={"triggers": t}) for n, t in TABLE3.items()}
    paper = load_settings("paper").tuning.model_dump(include=FORMS)
    return {"form=paper;trigger=inverted": own.model_copy(update=paper), **lines}


def table3_rows(chain: Chain, attacks: Sequence[str]) -> Rows:
    """CA and ASR at top 1, 3, 5 and 10 of each line of Table 3 (``table3_tunings``)."""
    rows: Rows = []
    for attack, seed in suspects(chain.settings, among=attacks):
        for text, tuning in table3_tunings(chain).items():
            done = steps.tuned(chain.with_settings(tuning=tuning), attack, seed)
            about: dict[str, Any] = {"paper_item": "table3", "variant": text}
            rows += _purified_rows(chain, attack, seed, done, RECALL_KS, **about)
    return rows


def round_rows(chain: Chain, attacks: Sequence[str]) -> Rows:
    """CA and ASR after one and after two rounds of steps 2 and 3; the mask that each inverts."""
    rows: Rows = []
    for attack, seed in suspects(chain.settings, among=attacks):
        first, again = steps.inverted(chain, attack, seed), second_round(chain, attack, seed)
        rounds = (
            (steps.tuned(chain, attack, seed), first.key, first.metrics),
            (again, again.key, again.metrics["inversion"]),
        )
        for number, (done, key, found) in enumerate(rounds, 1):
            text = variant("rounds", number)
            rows += _purified_rows(chain, attack, seed, done, (1,), variant=text)
            base = shared_columns(chain, attack, seed, key, "invertune", task="zeroshot")
            size = mask_size(chain, found["mask_l1_at_equal_asr"])
            rows.append(metric_row({**base, "variant": text}, "mask_l1", size))
    return rows


def update_rows(chain: Chain) -> Rows:
    """Held-out inverted ASR and mask size after every so many updates of the longest inversion."""
    rows: Rows = []
    longest = max(sweep_values(chain.settings, "inversion", "steps"))
    other = with_value(chain, "inversion", "steps", longest)
    for attack, seed in suspects(chain.settings, among=chain.settings.ablations.switch_attacks):
        target = steps.suspected_target(chain, attack, seed)
        found = steps.inverted(other, attack, seed, target)
        base = shared_columns(chain, attack, seed, found.key, task="zeroshot")
        for state in found.metrics["states"]:
            base["variant"] = variant_text({"updates": state["step"]})
            rows.append(metric_row(base, "inverted_asr", state["inverted_asr"], k=1))
            rows.append(metric_row(base, "mask_l1", state["mask_l1"]))
    return rows


def perturbation_rows(chain: Chain) -> Rows:
    """Share of images that each kind of universal perturbation drives to two classes.

    The true target, and the class that gains most; from step 1's artifacts, at no cost.
    """
    rows: Rows = []
    names = datasets.class_names(chain.settings.data)
    for attack, seed in suspects(chain.settings, nulls=True):
        done = steps.identified(chain, attack, seed)
        base = shared_columns(chain, attack, seed, done.key, task="zeroshot", k=1)
        for kind, increase in steps.increases(done).items():
            for label in dict.fromkeys((chain.target, int(increase.points.argmax()))):
                count, n = int(increase.adversarial[label]), int(increase.adversarial.sum())
                share = metrics.share(count, n)
                about = {"class": names[label], "perturbation": kind}
                rows.append(metric_row(base, "adversarial_share", share, variant=about))
    return rows


def ours(chain: Chain, results: pd.DataFrame, wanted: Sequence[str], **where: str) -> pd.DataFrame:
    """The rows of this backbone and target whose variant is among ``wanted``."""
    return tables.select(own_rows(chain, results), variant=wanted, **where)


def table2(chain: Chain, results: pd.DataFrame) -> pd.DataFrame:
    """Table 2: inverted ASR, mask size at the ASR floor and SSIM, a line per weight and value."""
    wanted = variants(chain, "inversion", WEIGHTS)
    rows = ours(chain, results, wanted, paper_item="table2")
    return tables.wide(rows, *tables.LAYOUT["table2"])


def table3(chain: Chain, results: pd.DataFrame) -> pd.DataFrame:
    """Table 3: CA and ASR at every k, a line per trigger and form of step 3."""
    rows = ours(chain, results, list(table3_tunings(chain)), paper_item="table3")
    return tables.wide(rows, *tables.LAYOUT["table3"])


def switch_table(
    chain: Chain, results: pd.DataFrame, section: str, names: Iterable[str]
) -> pd.DataFrame:
    """A line per value of some settings; a column marks the profile's."""
    wanted = variants(chain, section, names)
    frame = tables.wide(ours(chain, results, wanted), ["variant"], ["attack", "metric"])
    texts = [variant(n, sweep_values(chain.settings, section, n)[0]) for n in names]
    own = {tables.label("variant", text) for text in texts}
    frame.insert(
        1, "this profile's value", ["yes" if text in own else "" for text in frame["variant"]]
    )
    return frame


def round_table(chain: Chain, results: pd.DataFrame) -> pd.DataFrame:
    """CA, ASR and mask size by number of rounds, a line per attack."""
    rows = ours(chain, results, [variant("rounds", n) for n in (1, 2)], defense="invertune")
    return tables.wide(rows, ["attack"], ["metric", "variant"])


def perturbation_table(chain: Chain) -> pd.DataFrame:
    """Per model and kind (first seed): images driven to the target, and to the class that gains."""
    names, seed, lines = datasets.class_names(chain.settings.data), chain.settings.seeds[0], []
    for attack in (*NULLS, *chain.settings.attacks.names):
        for kind, increase in steps.increases(steps.identified(chain, attack, seed)).items():
            shares = 100 * increase.adversarial.double() / increase.adversarial.sum()
            top = int(increase.points.argmax())
            line: dict[str, Any] = {"attack": tables.label("attack", attack)}
            line["perturbation"] = tables.label("perturbation", kind)
            line["to the target (%)"] = float(shares[chain.target])
            line |= {"top class": names[top], "to the top class (%)": float(shares[top])}
            lines.append(line)
    return pd.DataFrame(lines)
