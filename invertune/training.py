"""One training loop, shared by pretraining, attacks and baselines.

Batch order and augmentation are pure functions of (seed, step), so a run that is killed and goes on
from its checkpoint ends with the numbers of a run that was never stopped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from invertune import distributed
from invertune.files import sync
from invertune.models import Clip, image_features, to_pixels, token_features
from invertune.prefetch import Batch, Prefetcher
from invertune.sampling import pair_indices
from invertune.terminal import progress

MAX_LOGIT_SCALE = math.log(100)
Terms = dict[str, Tensor]
Log = list[dict[str, float]]  # the losses of some steps
Method = tuple[Callable[[Tensor, int], Batch], Callable[..., Terms]]  # of rows, step; of a batch
LOG_EVERY = 20  # steps
SAVES, SAVED_APART = 10, 100  # checkpoints a run; their distance in steps, at least


class TrainingError(RuntimeError):
    """Training that cannot go on, with the step and the setting to look at."""


@dataclass(frozen=True)
class Recipe:
    """How to optimize: ``steps`` updates at peak rate ``lr`` after ``warmup`` steps.

    ``schedule`` is "cosine" (down to zero), or "constant". Weight decay never touches biases,
    normalization parameters or the logit scale (CleanCLIP's goes by name, and so misses a
    few). Of the baselines' released codes: warm-up begins at ``start_ratio`` of the peak rate (PAR;
    0: a plain warm-up), and the schedule runs ``offset`` steps late (CleanCLIP).
    """

    steps: int
    lr: float
    warmup: int = 0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: str = "cosine"
    start_ratio: float = 0.0
    offset: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of the 0-based ``step``."""
        if self.start_ratio and step < self.warmup:
            done = step / self.warmup
            return self.lr * (self.start_ratio * (1 - done) + done)
        step += self.offset
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))


def fit(
    net: nn.Module,
    loss_at: Callable[[int], Mapping[str, Tensor]],
    recipe: Recipe,
    *,
    label: str = "training",
    checkpoint: Path | None = None,
) -> Log:
    """Trains every parameter of ``net`` that requires a gradient, with AdamW.

    ``loss_at(step)`` returns named scalars; "loss" is minimized and all of them are logged. With
    ``checkpoint`` (a safetensors path) the loop goes on where a killed run stopped; it is written
    ten times a run, but at least 100 steps apart. Returns the log, a row per 20 steps. Raises
    ``TrainingError`` at the first loss or gradient that is not finite, before it reaches the
    weights or the checkpoint.

    After each step the logit scale is clamped to CLIP's limit of 100, or to its initial value if
    that is higher. Clamped in the loss instead, a scale at the limit would get no gradient, and
    OpenAI's are there.
    """
    save_every = max(SAVED_APART, recipe.steps // SAVES)
    distributed.share_batch_norm(net)
    parameters = {n: p for n, p in net.named_parameters() if p.requires_grad}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters.values() if p.ndim >= 2]},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    scale = parameters.get("logit_scale")
    limit = MAX_LOGIT_SCALE if scale is None else max(MAX_LOGIT_SCALE, scale.item())
    start, log = _resume(net, parameters, optimizer, checkpoint)
    for step in progress(range(start, recipe.steps), label, start, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        optimizer.zero_grad(set_to_none=True)
        terms = loss_at(step)
        terms["loss"].backward()
        terms = distributed.average((p.grad for p in parameters.values()), terms)
        grad_norm = get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
        if not (torch.isfinite(terms["loss"]) and torch.isfinite(grad_norm)):
            raise TrainingError(
                f"{label}: the loss is {terms['loss'].item()} and the norm of its gradient "
                f"{grad_norm.item()} at step {step} of {recipe.steps}; lower lr (now {recipe.lr:g})"
            )
        optimizer.step()
        if scale is not None:
            scale.data.clamp_(max=limit)
        if step % LOG_EVERY == 0 or step == recipe.steps - 1:
            log.append({"step": step, **{k: v.item() for k, v in terms.items()}})
        if checkpoint and distributed.first() and (step + 1) % save_every == 0:
            _save(net, parameters, optimizer, checkpoint, step + 1, log)
    return log


def _save(
    net: nn.Module,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    path: Path,
    step: int,
    log: Log,
) -> None:
    tensors = {f"net.{k}": v.contiguous() for k, v in net.state_dict().items()}
    for name, parameter in parameters.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary, {"step": str(step), "log": json.dumps(log)})
    sync(temporary)
    os.replace(temporary, path)


def _resume(
    net: nn.Module,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    path: Path | None,
) -> tuple[int, Log]:
    if path is None or not path.exists():
        return 0, []
    device = next(iter(parameters.values())).device
    try:
        opened = safe_open(path, "pt", device=str(device))
    except SafetensorError as error:  # cut off, by a loss of power for example
        print(f"{path} is damaged ({error}); training begins anew", flush=True)
        return 0, []
    with opened as file:
        meta = file.metadata()
        step = int(meta["step"])
        net.load_state_dict({k: file.get_tensor(f"net.{k}") for k in net.state_dict()})
        for name, parameter in parameters.items():
            moments = {  # laid out in memory as the parameter: fused AdamW pairs raw memory
                moment: torch.empty_like(parameter).copy_(file.get_tensor(f"{moment}.{name}"))
                for moment in ("exp_avg", "exp_avg_sq")
            }
            done = torch.tensor(float(step), device=device)  # fused AdamW wants it there
            optimizer.state[parameter] = {"step": done, **moments}
    return step, json.loads(meta["log"])


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of unit features [N, D] (CLIP, figure 3)."""
    logits = logit_scale.exp() * image @ text.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def pair_features(
    clip: Clip, images: Tensor, tokens: Tensor, shared: bool = False
) -> tuple[Tensor, Tensor]:
    """Unit image and text features of a batch of uint8 or float images and token ids.

    Under torchrun each process encodes its share, and all get the whole. ``shared``: the batch is
    this process's share already.
    """
    if not shared:
        images, tokens = distributed.share(images), distributed.share(tokens)
    image = image_features(clip, to_pixels(images, clip.device))
    return distributed.gather(image, token_features(clip, tokens))


def contrastive_method(clip: Clip, images: Tensor, captions: Sequence[str]) -> Method:
    """The contrastive loss of both towers of ``clip``, in train mode, on pairs: one of the
    ``captions`` to each of the ``images`` (uint8 [N, 3, H, W]).
    """
    tokens = clip.tokenizer(list(captions))
    clip.net.train()

    def batch_at(rows: Tensor, step: int) -> Batch:
        mine = distributed.share(rows)
        return images[mine], tokens[mine]

    def terms(pictures: Tensor, words: Tensor) -> Terms:
        image, text = pair_features(clip, pictures, words, shared=True)
        return {"loss": contrastive_loss(image, text, clip.net.logit_scale)}

    return batch_at, terms


def finetune(
    clip: Clip,
    images: Tensor,
    captions: Sequence[str],
    recipe: Recipe,
    batch: int,
    seed: int,
    work: Path,
    label: str = "fine-tuning",
    *,
    cycled: bool,
) -> Log:
    """Contrastive fine-tuning of both towers of ``clip`` in place; resumes in folder ``work``.

    Pairs as in ``contrastive_method``, ``cycled`` as in ``pair_indices``. Returns the log.
    """
    method = contrastive_method(clip, images, captions)
    rows_at = partial(pair_indices, len(images), batch, seed, cycled=cycled)
    return train(clip, method, rows_at, recipe, label, work / "finetuning.safetensors")


def train(
    clip: Clip,
    method: Method,
    rows_at: Callable[[int], Tensor],
    recipe: Recipe,
    label: str,
    checkpoint: Path | None,
) -> Log:
    """Trains ``clip`` in place by a ``method`` on the rows of each step; ends in eval mode.

    On a GPU a thread prepares the next batch meanwhile. ``checkpoint`` as in ``fit``.
    """
    batch_at, terms = method
    batches = Prefetcher(lambda step: batch_at(rows_at(step), step), clip.device)
    log = fit(
        clip.net, lambda step: terms(*batches(step)), recipe, label=label, checkpoint=checkpoint
    )
    clip.net.eval()
    return log


def choose_lr(
    lrs: Sequence[float], run_at: Callable[[float], tuple[Clip, float]], lowest: float
) -> tuple[Clip, float, bool, tuple[tuple[float, float | None], ...]]:
    """The model of the largest rate with a held-out accuracy of at least ``lowest``, that rate, and
    whether there is one.

    ``run_at(lr)`` trains a model and measures its accuracy; it is called from the largest rate
    down, and no more after the first that qualifies. If none does: the rate with the highest
    accuracy. The last value pairs every rate, largest first, with its accuracy (None: not run).
    """
    order, measured = sorted(lrs, reverse=True), {}
    for lr in order:
        clip, measured[lr] = run_at(lr)
        best = max(measured, key=measured.__getitem__)  # the one that qualifies, too
        if best == lr:
            kept = clip
        del clip  # a GPU need not hold the model of every rate
        if measured[lr] >= lowest:
            break
    tried = tuple((rate, measured.get(rate)) for rate in order)
    return kept, best, measured[best] >= lowest, tried
