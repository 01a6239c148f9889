"""What the notebooks' own cells compute, as lists of calls of a chain."""

from __future__ import annotations

import functools
from collections.abc import Callable

from invertune import ablations, comparison, generalization, passing_claims, reports
from invertune.chain import Chain
from invertune.rows import Rows
from invertune.sections import SWEEPS

ROWS: dict[str, list[Callable[[Chain], Rows]]] = {
    "01_attacks": [reports.attack_rows],
    "02_target_identification": [reports.identification_rows],
    "03_trigger_inversion": [reports.inversion_rows],
    "04_activation_tuning": [reports.tuning_rows],
    "05_baselines": [comparison.comparison_rows, comparison.rebound_rows],
    "06_generalization": [generalization.generalization_rows, passing_claims.passing_rows],
    "07_ablations": [
        *(functools.partial(ablations.sweep_rows, title=title) for title in SWEEPS),
        lambda chain: ablations.table3_rows(chain, chain.settings.ablations.perturbation_attacks),
        lambda chain: ablations.round_rows(chain, chain.settings.ablations.round_attacks),
        ablations.update_rows,
        ablations.perturbation_rows,
    ],
}
