"""Defended models on disk: the baselines' artifacts beside step 3's, and the rebound of each.

attacked -> baseline (FT, CleanCLIP, CleanerCLIP, PAR)
any defended model -> rebounded
"""

from __future__ import annotations

import functools
from pathlib import Path

from invertune import data as datasets
from invertune.baselines import BASELINES, defend
from invertune.chain import Chain, Model, class_head, pool
from invertune.steps import poisoned, tuned
from invertune.store import Artifact, Made
from invertune.training import Recipe, finetune


@functools.lru_cache(maxsize=128)
def baseline(chain: Chain, defense: str, attack: str, seed: int) -> Artifact:
    """One baseline on one suspected model; metrics: the chosen rate, the grid, its log."""
    suspect, settings = poisoned(chain, attack, seed), chain.settings.baselines

    def compute(work: Path) -> Made:
        pairs = datasets.caption_pairs(chain.settings.data, "defense", settings.pairs, chain.store)
        heldout = pool(chain, "heldout")
        result = defend(
            defense,
            suspect.clip,
            pairs,
            heldout.images,
            heldout.labels,
            lambda clip: class_head(chain, clip),
            settings,
            seed,
            work,
        )
        metrics = {k: v for k, v in vars(result).items() if k != "clip"}
        return {"weights": result.clip.net.state_dict()}, metrics

    others = {"names", *BASELINES} - {defense}
    shared = settings.model_dump(mode="json", exclude=others)
    keyed = {
        "defense": defense,
        **shared.pop(defense),
        **shared,
        "heldout": chain.settings.data.heldout_images,
    }
    return chain.run("baseline", keyed, [suspect.key], compute, seed, f"{defense} on {attack}")


def defended(chain: Chain, defense: str, attack: str, seed: int) -> Model:
    """The model after ``defense`` ("none": the poisoned one), with the true trigger for scoring."""
    suspect = poisoned(chain, attack, seed)
    if defense == "none":
        return suspect
    if defense == "invertune":
        artifact = tuned(chain, attack, seed)
    else:
        artifact = baseline(chain, defense, attack, seed)
    return suspect.after(artifact, f"{defense} on {attack}")


@functools.lru_cache(maxsize=128)
def rebounded(chain: Chain, defense: str, attack: str, seed: int) -> Artifact:
    """Benign fine-tuning of a defended model, as its user might do.

    Contrastive, at the attack's own peak rate, constant, on pairs that nothing else has seen.
    """
    model, rebound = defended(chain, defense, attack, seed), chain.settings.rebound
    lr = getattr(chain.settings.attacks, attack).lr

    def compute(work: Path) -> Made:
        pairs = datasets.caption_pairs(chain.settings.data, "rebound", rebound.pairs, chain.store)
        recipe = Recipe(rebound.steps, lr, weight_decay=rebound.weight_decay, schedule="constant")
        log = finetune(
            model.clip,
            pairs.images,
            pairs.captions,
            recipe,
            rebound.batch,
            seed,
            work,
            "rebound",
            cycled=pairs.cycled,
        )
        return {"weights": model.clip.net.state_dict()}, {"lr": lr, "log": log}

    keyed = {**rebound.model_dump(mode="json", exclude={"attacks"}), "lr": lr}
    label = f"{defense} on {attack}"
    return chain.run("rebound", keyed, [model.key], compute, seed, label)


def rebound_model(chain: Chain, defense: str, attack: str, seed: int) -> Model:
    """The defended model after the benign fine-tuning of ``rebounded``."""
    model = defended(chain, defense, attack, seed)
    return model.after(rebounded(chain, defense, attack, seed), f"rebound of {model.name}")
