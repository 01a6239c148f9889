"""What a model can do and what a trigger makes of it: the rates of both tasks.

Zero-shot classification and image-to-text retrieval, each measured by the one function of
``invertune.metrics`` that defines it; results do not depend on batch size or order.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor

from invertune import data as datasets
from invertune import metrics, triggers
from invertune.chain import Chain, Model, class_head, pool
from invertune.metrics import Rate
from invertune.models import Clip, embed_images, embed_texts
from invertune.store import Artifact, Made
from invertune.triggers import Trigger

RECALL_KS = (1, 3, 5, 10)


def evaluated(
    chain: Chain, model: Model, trigger: Trigger | None, trigger_key: str, seed: int
) -> Artifact:
    """CA and ASR of a model under a trigger, zero-shot and retrieval.

    ``trigger_key`` names where the trigger comes from; without a trigger the model's floor is
    measured: how often clean images already count as attacked. There is no ASR in retrieval where
    no caption names the target.
    """
    settings = chain.settings

    def compute(_: Path) -> Made:
        zero_shot = _zero_shot(chain, model.clip, trigger)
        return {}, {**zero_shot, **_retrieval(chain, model.clip, trigger)}

    keyed = {
        "target": settings.target,
        "trigger": trigger_key,
        "images": settings.data.evaluation_images,
        "retrieval": settings.data.retrieval_images,
    }
    return chain.run("evaluation", keyed, [model.key], compute, seed, f"of {model.name}")


def clean_and_triggered(
    clip: Clip, images: Tensor, trigger: Trigger | None, batch: int = 256
) -> tuple[Tensor, Tensor]:
    """Features [N, D] of the clean and of the triggered images, the same without a trigger.

    ``images`` are uint8 or float in [0, 1], [N, 3, H, W]; a pass takes ``batch`` of them.
    """
    clean = embed_images(clip, images, batch)
    if trigger is None:
        return clean, clean
    return clean, embed_images(clip, images, batch, partial(triggers.apply, trigger))


def utility(chain: Chain, clip: Clip) -> dict[str, Rate]:
    """What a clean model can do: zero-shot top-1 and image-to-text recall."""
    rates = {**_zero_shot(chain, clip, None), **_retrieval(chain, clip, None)}
    return {
        "zero-shot top-1": rates["zeroshot.ca.1"],
        **{f"recall@{k}": rates[f"retrieval.ca.{k}"] for k in RECALL_KS},
    }


def _zero_shot(chain: Chain, clip: Clip, trigger: Trigger | None) -> dict[str, Rate]:
    images, head = pool(chain, "evaluation"), class_head(chain, clip)
    clean, attacked = clean_and_triggered(clip, images.images, trigger)
    rates = {"zeroshot.ca.1": metrics.clean_accuracy(clean, head, images.labels)}
    for k in RECALL_KS:
        rates[f"zeroshot.asr.{k}"] = metrics.attack_success_rate(
            attacked, head, images.labels, chain.target, k
        )
    rates["zeroshot.asr_all.1"] = metrics.attack_success_rate(
        attacked, head, images.labels, chain.target, exclude_target=False
    )
    return rates


def _retrieval(chain: Chain, clip: Clip, trigger: Trigger | None) -> dict[str, Rate]:
    scenes = datasets.retrieval_scenes(chain.settings.data, chain.store)
    texts = embed_texts(clip, scenes.captions)
    clean, attacked = clean_and_triggered(clip, scenes.images, trigger)
    rates = {}
    for k, rate in metrics.recall_at_k(clean, texts, scenes.owner, RECALL_KS).items():
        rates[f"retrieval.ca.{k}"] = rate
    for k, rate in metrics.text_to_image_recall(clean, texts, scenes.owner, RECALL_KS).items():
        rates[f"retrieval.t2i.{k}"] = rate
    matches = metrics.word_matches(scenes.captions, [chain.settings.target])
    if matches.any():
        rates["retrieval.asr.10"] = metrics.retrieval_asr_at_k(
            attacked, texts, matches, scenes.owner, 10
        )
    return rates
