"""Rows for the results table, and what is read from them: the parts that notebooks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from invertune import tables
from invertune.chain import Chain
from invertune.metrics import Rate
from invertune.results import row
from invertune.sections import NULLS
from invertune.store import Artifact

Rows = list[dict[str, str]]  # as ``results.row`` makes them
TASK_KS = (("zeroshot", "1"), ("retrieval", "10"))  # with the k of Table 1


def own_rows(chain: Chain, results: pd.DataFrame) -> pd.DataFrame:
    """The rows of this profile's backbone, target and attacks, of every item.

    Notebook 06 adds other backbones and targets, an earlier run perhaps other attacks. The size of
    a mask that never reached the ASR floor is infinite.
    """
    settings = chain.settings
    rows = results[(results.backbone == settings.backbone) & (results.target == settings.target)]
    rows = rows[rows.attack.isin([*NULLS, *settings.attacks.names])]
    never = (rows.metric == "mask_l1") & (rows.value == full_mask(chain))
    return rows.assign(value=rows.value.mask(never, np.inf))


def mean(results: pd.DataFrame, **where: str | Sequence[str]) -> float:
    """Mean over everything that ``tables.select`` gives; NaN for nothing."""
    return float(tables.select(results, **where).value.mean())


def shared_columns(
    chain: Chain, attack: str, seed: int, key: str, defense: str = "none", **columns: Any
) -> dict[str, Any]:
    """The columns that rows of one model share; rows are extras unless they say otherwise."""
    settings = chain.settings
    place = {"profile": settings.profile, "backbone": settings.backbone, "target": settings.target}
    about = {"attack": attack, "seed": seed, "key": key, "defense": defense}
    return {**place, **about, "paper_item": "extra", **columns}


def metric_row(
    base: dict[str, Any], metric: str, value: Rate | float, **columns: Any
) -> dict[str, str]:
    """A row of ``base`` with one number, and its interval where it is a rate."""
    return row(**{**base, **columns, "metric": metric, "value": value})


def rates(artifact: Artifact) -> dict[str, Rate]:
    """The measured rates of an evaluation artifact, e.g. "zeroshot.asr.1"."""
    return {name: Rate(*value) for name, value in artifact.metrics.items()}


def mask_size(chain: Chain, size: float | None) -> float:
    """A mask's L1 at the ASR floor as the results have it; None: that ASR was never reached."""
    return full_mask(chain) if size is None else size


def full_mask(chain: Chain) -> int:
    """Number of mask entries: the size given to a run that never reached the ASR floor."""
    return 3 * chain.settings.data.image_size_px**2
