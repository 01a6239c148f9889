"""Trigger inversion: ``invert_triggers`` for one setting, and for K settings in one batch.

ceiling: forward and input gradient of the network (eval mode, weights frozen) on as many ready
images, and a forward pass for every clean image of the pool. "folded" is the same with batch norm
multiplied into the convolutions, as ours runs it. plain: algorithm 1 line by line, with
pytorch-msssim, nothing cached, one setting after the other; weights frozen there too. Ours includes
everything it prepares. The held-out measurements are left out of all three.
"""

from __future__ import annotations

import pytorch_msssim
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import OURS, Contender
from invertune.models import (
    Clip,
    clone,
    forward_precision,
    frozen_copy,
    image_features,
    normalize,
    to_pixels,
)
from invertune.sampling import batch_indices
from invertune.sections import Inversion
from invertune.settings import load_settings
from invertune.trigger_inversion import Run, initial_trigger, invert_triggers

EPOCHS = 6  # the mini profile draws each image of its pool about this often
CLASSES = 210
SETTINGS = 4  # loss weights that share a batch, as in Table 2


def ways(clip: Clip, steps: int, batch: int) -> dict[str, Contender]:
    """The contenders, on random images; times are per image and setting."""
    folded, network, size = frozen_copy(clip), clone(clip), clip.image_size
    network.net.eval().requires_grad_(False)
    many = OURS * steps
    pool = max(batch, batch * many // EPOCHS)
    images = torch.randint(0, 256, (pool, 3, size, size), dtype=torch.uint8)
    ready = normalize(clip, torch.rand(SETTINGS * batch, 3, size, size, device=clip.device))
    with torch.no_grad():
        width = image_features(network, to_pixels(images[:1], clip.device)).shape[1]
    head = F.normalize(torch.randn(CLASSES, width, device=clip.device), dim=1)
    own = load_settings("mini").inversion
    own = own.model_copy(update={"batch": batch, "steps": many, "measure_every_steps": many})
    runs = [Run.of(target, own) for target in range(SETTINGS)]

    def ours(count: int) -> None:
        invert_triggers(clip, images, images[:1], head, runs[:count], own, 0)

    clean, together, four = steps * batch // EPOCHS, SETTINGS * batch, f"ceiling, K = {SETTINGS}"
    return {
        "ours": Contender(lambda: ours(1), many, many * batch),
        "plain": Contender(
            lambda: plain(network, images, head, own, runs[0], steps), steps, steps * batch
        ),
        "ceiling": Contender(
            lambda: bare(network, ready[:batch], steps, clean), steps, steps * batch
        ),
        "ceiling, folded": Contender(
            lambda: bare(folded, ready[:batch], steps, clean), steps, steps * batch
        ),
        f"ours, K = {SETTINGS}": Contender(lambda: ours(SETTINGS), many, many * together, four),
        four: Contender(lambda: bare(network, ready, steps, clean), steps, steps * together, four),
    }


def bare(clip: Clip, ready: Tensor, steps: int, clean: int) -> None:
    """The network alone: triggered passes with gradients, and ``clean`` forward passes."""
    for _ in range(steps):
        pixels = ready.detach().requires_grad_()
        with forward_precision(clip):
            features = clip.net.encode_image(pixels)
        features.sum().backward()
    with torch.no_grad(), forward_precision(clip):
        clip.net.encode_image(ready[:clean])


def plain(
    clip: Clip, images: Tensor, head: Tensor, settings: Inversion, run: Run, steps: int
) -> None:
    """Algorithm 1, line by line, for one setting."""
    mask, pattern = (t.clone().requires_grad_() for t in initial_trigger(clip, settings, 0))
    optimizer = torch.optim.Adam([mask, pattern], lr=settings.lr)
    for step in range(steps):
        index = batch_indices(len(images), settings.batch, 0, step)
        pixels = to_pixels(images[index], clip.device)
        tilde = mask * (pattern * clip.std[0] + clip.mean[0]) + (1 - mask) * pixels
        features = image_features(clip, tilde)
        with torch.no_grad():
            clean = image_features(clip, pixels)
        wanted = torch.full((len(features),), run.target, device=clip.device)
        loss = run.lambda1 * F.cross_entropy(features @ head.T / settings.temperature, wanted)
        loss = loss + run.lambda2 * (features - clean).norm(dim=1).mean()
        loss = loss + run.lambda3 * (1 - pytorch_msssim.ssim(tilde, pixels, data_range=1.0))
        loss = loss + run.lambda4 * mask.abs().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            mask.clamp_(0, 1)
            pattern.clamp_((-clip.mean / clip.std).min(), ((1 - clip.mean) / clip.std).max())
