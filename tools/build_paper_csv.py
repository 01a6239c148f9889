"""Builds expected/paper.csv, the paper's numbers in the columns of results.csv.

Usage: python tools/build_paper_csv.py FOLDER, where FOLDER holds the paper's tables as CSV
(table1_main.csv and the like). What is measured on the suspected model itself (inverted ASR,
increases, layer impacts) has defense "none". Zero-shot rates are top-1 (k 1), retrieval top-10.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from invertune.files import write_atomic
from invertune.results import COLUMNS, IDENTITY, csv_bytes, merge, row

OUTPUT = Path(__file__).resolve().parent.parent / "expected" / "paper.csv"
PAPER = {"profile": "paper", "backbone": "RN50", "target": "mushroom"}
TASKS = {"imagenet_zeroshot": ("zeroshot", 1), "mscoco_i2t_top10": ("retrieval", 10)}
EVALUATION_IMAGES = 50_000  # ImageNet-1K val, section 4.1
IDENTIFICATION = dict(
    zip(("badnet", "blended", "sig", "wanet", "badencoder", "badclip"), range(6, 12), strict=True)
)
LAYERS = {"RN50": 12, "RN101": 13, "ViT-B/16": 14, "ViT-B/32": 15}
STATISTICS = {"significance_threshold": "layer_threshold", "mean": "layer_mean", "std": "layer_std"}

Row = dict[str, str]


def rates(ca: float, asr: float, **columns: Any) -> Iterator[Row]:
    """CA and ASR in percent; a number that the paper does not give has no row."""
    for metric, value in (("ca", ca), ("asr", asr)):
        if not pd.isna(value):
            yield row(**{**PAPER, **columns}, metric=metric, value=value)


def table1(tables: Path) -> Iterator[Row]:
    for line in pd.read_csv(tables / "table1_main.csv", keep_default_na=False).itertuples():
        task, k = TASKS[line.task]
        yield from rates(
            line.ca,
            line.asr,
            paper_item="table1",
            attack=line.attack,
            defense=line.defense,
            task=task,
            k=k,
        )


def table2(tables: Path) -> Iterator[Row]:
    for line in pd.read_csv(tables / "table2_lambda_sweep.csv").itertuples():
        about = {**PAPER, "paper_item": "table2", "attack": line.attack, "defense": "none"}
        yield row(
            **about,
            task="zeroshot",
            k=1,
            metric="inverted_asr",
            variant={line.weight: line.value},
            value=line.inverted_trigger_asr,
        )


def table3(tables: Path) -> Iterator[Row]:
    sources = {"uap": "uap", "invertune": "inverted"}
    for line in pd.read_csv(tables / "table3_uap_vs_inverted.csv").itertuples():
        yield from rates(
            line.ca,
            line.asr,
            paper_item="table3",
            attack=line.attack,
            k=line.top_k,
            defense="invertune",
            task="zeroshot",
            variant={"trigger": sources[line.trigger_source]},
        )


def table4(tables: Path) -> Iterator[Row]:
    name = "table4_target_labels.csv"
    for line in pd.read_csv(tables / name, keep_default_na=False).itertuples():
        yield from rates(
            line.ca,
            line.asr,
            paper_item="table4",
            attack="badclip",
            target=line.target,
            defense=line.defense,
            task="zeroshot",
            k=1,
        )


def table5(tables: Path) -> Iterator[Row]:
    for line in pd.read_csv(
        tables / "table5_architectures.csv", keep_default_na=False
    ).itertuples():
        yield from rates(
            line.ca,
            line.asr,
            paper_item="table5",
            attack="badclip",
            k=1,
            backbone=line.backbone.replace("/", "-"),
            defense=line.defense,
            task="zeroshot",
        )


def tables6_to_11(tables: Path) -> Iterator[Row]:
    name = "table6_11_target_identification.csv"
    for line in pd.read_csv(tables / name, keep_default_na=False).itertuples():
        one = {
            **PAPER,
            "paper_item": f"table{IDENTIFICATION[line.attack]}",
            "attack": line.attack,
            "defense": "none",
            "task": "zeroshot",
        }
        about = {**one, "variant": {"class": line[3]}, "n": EVALUATION_IMAGES}
        yield row(**about, metric="clean_count", value=line.clean_count)
        yield row(**about, metric="adversarial_count", value=line.adversarial_count)
        yield row(**about, metric="increase", value=line.absolute_increase_pct)
        if line[3] == PAPER["target"]:
            yield row(**one, metric="target_rank", value=line.rank)


def tables12_to_15(tables: Path) -> Iterator[Row]:
    for line in pd.read_csv(tables / "table12_15_layer_impact.csv").itertuples():
        about = {**_layer_table(line.backbone), "variant": {"layer": line.layer}}
        yield row(**about, metric="layer_impact", value=line.impact)
        yield row(**about, metric="layer_selected", value=int(line.selected))
    for line in pd.read_csv(tables / "table12_15_layer_threshold.csv").itertuples():
        metric = STATISTICS[line.statistic]
        yield row(**_layer_table(line.backbone), metric=metric, value=line.value)


def _layer_table(backbone: str) -> dict[str, Any]:
    return {
        **PAPER,
        "paper_item": f"table{LAYERS[backbone]}",
        "attack": "badclip",
        "backbone": backbone.replace("/", "-"),
        "defense": "none",
    }


def figure6(tables: Path) -> Iterator[Row]:
    for line in pd.read_csv(tables / "figure6_beta.csv").itertuples():
        yield from rates(
            line.ca,
            line.asr,
            paper_item="figure6",
            attack="badclip",
            k=1,
            defense="invertune",
            task="zeroshot",
            variant={"beta": line.beta},
        )


PARTS = (table1, table2, table3, table4, table5, tables6_to_11, tables12_to_15, figure6)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tools/build_paper_csv.py FOLDER_WITH_THE_PAPER_TABLES")
    tables = Path(sys.argv[1])
    rows = merge([], [one for part in PARTS for one in part(tables)], IDENTITY)
    write_atomic(OUTPUT, csv_bytes(rows, COLUMNS))
    print(f"{len(rows)} numbers in {OUTPUT}")


if __name__ == "__main__":
    main()
