"""Data-parallel fine-tuning under torchrun: each process takes its share of the same batch.

Every process has the loss of the whole batch, or the mean over its own share, and gradients are
averaged: either way they are those of one process. The first process alone writes to the store.
Without torchrun every function here returns what it was given.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Value = TypeVar("Value")
_ALONE = ContextVar("alone", default=False)
PATIENCE = timedelta(days=7)  # the first process may wait that long for another job's artifact


class DistributedError(ValueError):
    """Training that cannot be divided among processes; says why, and what would be right."""


def start() -> None:
    """Joins the processes that torchrun started: one GPU each, or gloo on the CPU."""
    if dist.is_initialized() or not dist.is_torchelastic_launched():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    warnings.filterwarnings("ignore", r"torch\.distributed\.nn", FutureWarning)  # in open_clip
    if not first():
        os.environ["INVERTUNE_PROGRESS"] = "0"


def stop() -> None:
    """Leaves the processes that ``start`` joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """What runs inside runs in this process only: the others wait for something else."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def processes() -> int:
    """How many processes train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() and not _ALONE.get() else 1


def first() -> bool:
    """Whether this process writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_first(value: Value) -> Value:
    """The first process's ``value``, in every process; waits for it.

    ``value`` must not hold CUDA tensors.
    """
    if processes() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def share(batch: Tensor) -> Tensor:
    """This process's part of ``batch`` [N, ...]; raises ``DistributedError`` if N is no multiple
    of the number of processes.
    """
    count = processes()
    if len(batch) % count:
        raise DistributedError(
            f"a batch of {len(batch)} cannot be divided among {count} processes; "
            f"give torchrun a --nproc-per-node that divides {len(batch)}"
        )
    return batch if count == 1 else batch.chunk(count)[dist.get_rank()]


def gather(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, D] of the whole batch from each process's own, with gradients (open_clip's)."""
    if processes() == 1:
        return images, texts
    from open_clip.loss import gather_features  # slow to import, and the store has no use for it

    rank, count = dist.get_rank(), processes()
    return gather_features(images, texts, gather_with_grad=True, rank=rank, world_size=count)


def average(gradients: Iterable[Tensor | None], terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Averages ``gradients`` over the processes, in place; returns the averaged ``terms``."""
    if processes() == 1:
        return dict(terms)
    named = {name: term.detach().clone() for name, term in terms.items()}
    tensors = [*(g for g in gradients if g is not None), *named.values()]
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= processes()
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
    return named


def share_batch_norm(net: nn.Module) -> None:
    """Makes BatchNorm in train mode use the whole batch's statistics, as SyncBatchNorm; in place.

    Raises ``DistributedError`` on the CPU, for which SyncBatchNorm does not exist.
    """
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if processes() == 1 or not any(m.training for m in norms):
        return
    if not next(net.parameters()).is_cuda:
        raise DistributedError(
            "BatchNorm in train mode needs SyncBatchNorm, which exists on CUDA only, not on gloo; "
            "train this ResNet in one process, or a ViT"
        )
    nn.SyncBatchNorm.convert_sync_batchnorm(net)
