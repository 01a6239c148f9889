"""What fills the store for a notebook, as calls that can run several at once.

What is left to the notebook are evaluations. The small networks of smoke and mini do not keep two
threads busy: two processes of one thread each get through more of them (benchmarks/README.md).
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

import torch
from joblib import cpu_count

from invertune import ablations, defenses, generalization, passing_claims, plan, reports, steps
from invertune.chain import no_gpu, open_chain
from invertune.provenance import free_bytes
from invertune.sections import NULLS, SWEEPS, Settings
from invertune.settings import SettingsError, compared, other_models, suspects
from invertune.store import MissingError
from invertune.terminal import progress

Call = tuple[Callable[..., object], tuple[Any, ...]]  # a function of (chain, *arguments)


class JobError(RuntimeError):
    """A job that ended without an answer; says what to change."""


def calls(settings: Settings) -> dict[str, list[Call]]:
    """Per notebook what it needs trained, inverted or tuned, in the order to be called.

    Calls that need one artifact stand far apart, so that few wait for each other.
    """
    attacked, models = suspects(settings), suspects(settings, nulls=True)
    again = suspects(settings, among=settings.rebound.attacks)
    names = settings.baselines.names
    tuned: list[Call] = [(steps.tuned, model) for model in attacked]
    return {
        "01_attacks": [
            *((steps.attacked, ("clean_finetuned", seed)) for seed in settings.seeds),
            *((reports.undefended_rows, model) for model in attacked),
        ],
        "02_target_identification": [(steps.identified, model) for model in models],
        "03_trigger_inversion": [(steps.inverted, model) for model in models],
        "04_activation_tuning": [
            *((reports.defense_rows, ("invertune", *model)) for model in attacked),
            *((steps.impacts, model) for model in attacked),
        ],
        "05_baselines": [
            *tuned,
            *((reports.defense_rows, (name, *m)) for name in names for m in attacked),
            *((defenses.rebounded, (n, *m)) for n in ("none", *names, "invertune") for m in again),
        ],
        "06_generalization": [*tuned, *_generalization(settings)],
        "07_ablations": [*tuned, *_ablations(settings)],
    }


def _generalization(settings: Settings) -> list[Call]:
    section, seeds = settings.generalization, settings.seeds
    cases = [(item, name) for item, _, name in other_models(settings)]
    defended = ("none", "invertune", *section.baselines)
    return [
        *((steps.identified, (null, seed)) for null in NULLS for seed in seeds),
        *((steps.impacts, model) for model in suspects(settings)),
        *(
            (defenses.baseline, (d, section.attack, seed))
            for d in section.baselines
            for seed in seeds
        ),
        *((passing_claims.variant_rows, ((name,),)) for name in passing_claims.VARIANTS),
        *(
            (generalization.fill, (*case, defense, seed))
            for defense, case, seed in itertools.product(defended, cases, seeds)
        ),
    ]


def _ablations(settings: Settings) -> list[Call]:
    section = settings.ablations
    return [
        *((steps.identified, (null, seed)) for null in NULLS for seed in settings.seeds),
        *((ablations.table3_rows, ((attack,),)) for attack in section.perturbation_attacks),
        *((ablations.round_rows, ((attack,),)) for attack in section.round_attacks),
        *(
            (ablations.SWEEP_ROWS[sweep.step], ((attack,), (name,), sweep.item))
            for sweep in SWEEPS.values()
            for name, attack in itertools.product(
                compared(settings, sweep.step, sweep.names), getattr(section, sweep.attacks)
            )
        ),
    ]


def chosen(settings: Settings, only: str | None) -> list[str]:
    """The notebooks with ``calls`` whose names start with ``only`` (``SettingsError`` for none)."""
    known = list(calls(settings))
    found = [name for name in known if name.startswith(only or "")]
    if not found:
        raise SettingsError(f"no notebook starts with {only!r}; there are: {', '.join(known)}")
    return found


def default_count(settings: Settings) -> int:
    """How many jobs to run at once: one a core, as far as memory is free; one on a GPU.

    A minute of work for each at least: on smoke starting them costs more than they save.
    """
    peak = plan.peak_mb(settings)
    if peak is None or (settings.device != "cpu" and not no_gpu()):
        return 1
    minutes = sum(plan.minutes_of(plan.planned(settings), settings))
    return max(1, min(cpu_count(), int(free_bytes() / 1e6 / peak), int(minutes)))


def fill(settings: Settings, notebook: str, count: int) -> None:
    """Does the ``calls`` of ``notebook``, in ``count`` processes.

    They share the threads that one would have, and end with this process, however it ends; where
    the store has everything, none is started.
    Raises the first error of a call, or ``JobError`` where a process died.
    """
    if count == 1:
        for call in calls(settings).get(notebook, []):
            _run(settings, *call)
        return
    left = missing(settings, notebook)
    if not left:
        return
    threads = max(1, torch.get_num_threads() // count)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])  # torch is imported once for all processes
    with ProcessPoolExecutor(count, server, _start, (threads,)) as pool:
        made = [pool.submit(_run, settings, *call) for call in left]
        try:
            for done in progress(as_completed(made), notebook, total=len(made)):
                done.result()
        except BrokenProcessPool:
            raise JobError(
                f"{notebook}: a process died, most likely for lack of memory; run again with fewer "
                f"(--jobs {max(1, count // 2)}) to go on where it was"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def missing(settings: Settings, notebook: str) -> list[Call]:
    """Those of the notebook's ``calls`` that want something that the store lacks."""
    chain, left = replace(open_chain(settings), only_finds=True), []
    for function, arguments in calls(settings).get(notebook, []):
        try:
            function(chain, *arguments)
        except MissingError:
            left.append((function, arguments))
    return left


def held(settings: Settings, only: str = "") -> list[str]:
    """Per notebook whose name starts with ``only``: how many of its calls the store already
    answers.
    """
    return [
        f"{name:25}{len(made) - len(missing(settings, name))} of {len(made)}"
        for name, made in calls(settings).items()
        if name.startswith(only)
    ]


def _start(threads: int) -> None:
    """In each process, before its first call."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all; the one that waits tells it
    torch.set_num_threads(threads)
    os.environ["INVERTUNE_PROGRESS"] = "0"  # bars of several processes would mix
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


_opened = functools.lru_cache(maxsize=1)(open_chain)


def _run(settings: Settings, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    function(_opened(settings), *arguments)
